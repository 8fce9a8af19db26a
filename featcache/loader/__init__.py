"""Batches of pairs from the cache."""
