"""The kinds of benchmark, one file each; `table` lists them."""
