"""How a benchmark is carried out: its inputs, the check of its results, clocks and memory."""
