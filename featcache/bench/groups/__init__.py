"""The benches, a module for each group; a module's `BENCHES` lists them."""
