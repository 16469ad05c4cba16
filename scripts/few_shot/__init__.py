"""Few-shot meta-learning: one backbone, eight methods."""
