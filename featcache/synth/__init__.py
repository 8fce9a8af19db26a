"""Procedural data sets in the published on-disk layouts."""
