"""What scripts and benchmarks share: data, problems, measurements, reports."""
