"""Methods that merge whole tensors of full models: one function each, in float32, rounded once at the store."""
