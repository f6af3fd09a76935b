"""Merged adapters by name, for servers: made once, kept on the disk within a limit."""
