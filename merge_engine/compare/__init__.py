"""How adapters conflict, before they are merged."""
