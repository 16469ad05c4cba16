"""Classifiers that resist attacks, on balanced and on long-tailed data."""
