"""What the reader of COVIDx is made of."""
