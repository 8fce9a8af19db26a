"""The token cache, format version 1."""
