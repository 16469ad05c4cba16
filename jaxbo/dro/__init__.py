"""Distributionally robust training: weightings of a batch, and the gradient that they give."""
