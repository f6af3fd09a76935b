"""Sweeps over recipes, scored and kept in a table."""
