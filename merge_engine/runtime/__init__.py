"""Threads, processes, memory, and whether numbers are finite."""
