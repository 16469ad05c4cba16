"""A language model trained further with reweighted losses."""
