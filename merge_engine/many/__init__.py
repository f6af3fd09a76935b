"""Many merges of the same adapters: `merge_many` in one call, `Session` one after the other."""
