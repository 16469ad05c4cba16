"""Reproducible claims: one package is one experiment, ``python -m scripts.<experiment>``."""
