"""What fights between adapters, before they are merged."""
