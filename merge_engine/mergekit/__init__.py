"""mergekit's YAML."""
