"""The merge-engine command: one file a command."""
