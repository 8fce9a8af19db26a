"""What a table of one's own has in its first row."""
