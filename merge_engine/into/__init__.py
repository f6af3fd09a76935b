"""Merges whose result is a full model: of adapters into a base, and of full models with each other."""
