"""Meta-learning from a stream of tasks that nobody announces."""
