"""Many merges over the same adapters."""
