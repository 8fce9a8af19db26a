"""Stage one: the frozen encoders run once over a manifest, and their tokens go to shards."""
