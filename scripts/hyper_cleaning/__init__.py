"""Which labels are wrong, learned from a small clean set."""
