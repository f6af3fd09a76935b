"""mergekit's recipes: YAML files, read and carried out."""
