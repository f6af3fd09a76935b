"""What comes out: rows in files, tables, plots, and the comparison with an earlier run."""
