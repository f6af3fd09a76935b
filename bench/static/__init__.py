"""What the kernels should cost on GPUs that are not here, estimated from their machine code."""
