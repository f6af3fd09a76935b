"""Files on disk: weights, small texts, folders that appear whole or not at all, and what the hub has."""
