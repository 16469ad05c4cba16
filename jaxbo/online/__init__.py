"""Online bilevel optimization: both losses change with time, one round after the other."""
