"""The first run on a GPU: what it does, in order, and the file of results that it leaves."""
