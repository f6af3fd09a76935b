"""The benchmarks: `python -m bench.report`, or `pytest bench`."""
