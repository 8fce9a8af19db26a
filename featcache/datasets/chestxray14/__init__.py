"""What the reader of NIH ChestX-ray14 is made of."""
