"""Inner problems with many minima: all bilevel methods side by side."""
