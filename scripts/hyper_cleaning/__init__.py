"""Which labels are wrong, learnt from a small clean set."""
