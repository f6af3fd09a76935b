"""Whose layout a file has: PEFT adapters and full models."""
