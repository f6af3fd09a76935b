"""What a merge computes, as data and as the textbook."""
