"""What each command parses, calls and prints; `featcache.cli` puts them together."""
