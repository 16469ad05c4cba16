"""Bilevel optimization: the inner problem, its solver, and the responses to hypergradients."""
