"""The mirror of kernels/ on the CPU: one merge, tile by tile."""
