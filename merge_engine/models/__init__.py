"""What full models bring to a merge: targets, saved layers, differences, vocabularies."""
