"""Adversarial training: attacks, gradients through them, losses, weights, and evaluation."""
