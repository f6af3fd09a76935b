"""Searches for the recipe with the best score, by Optuna."""
