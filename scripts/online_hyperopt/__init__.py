"""Hyperparameters of streams that change."""
