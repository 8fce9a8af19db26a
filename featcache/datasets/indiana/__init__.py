"""What the reader of Open-I is made of."""
