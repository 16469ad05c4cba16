"""Adversarial training and evaluation: attacks, the smoothed lower level of DONE, robust metrics."""
