"""Plan, backend, cut and output of one merge."""
