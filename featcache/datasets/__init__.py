"""One reader per data set, found by its file's name."""
