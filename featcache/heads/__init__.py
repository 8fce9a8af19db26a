"""What is measured on held-out patients."""
