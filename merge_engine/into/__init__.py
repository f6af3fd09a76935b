"""Merges into a base model, and of full models."""
