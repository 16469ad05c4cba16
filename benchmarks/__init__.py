"""Measurements side by side with baselines, one table each."""
