"""Frozen encoders behind one small interface."""
