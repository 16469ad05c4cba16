"""The mechanism of all experiments, and what two of them share: data, a problem, pictures."""
