"""Training speed beside the peers, on the same weights and rows: `python -m benchmarks.speed --help`."""
