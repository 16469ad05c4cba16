"""Bilevel optimization: the inner problem, and the responses that turn gradients into hypergradients."""
