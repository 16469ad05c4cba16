"""Few-shot meta-learning: one backbone, nine methods."""
