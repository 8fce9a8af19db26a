"""Measurements of our own speed: each a ratio to a limit of the same machine, in the same run."""
