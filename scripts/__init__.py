"""Reproducible claims: one file is one claim."""
