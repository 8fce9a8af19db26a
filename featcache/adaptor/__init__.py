"""The small model that is trained."""
