"""The merge-engine command: one file for each command."""
