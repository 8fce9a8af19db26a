"""The two tables that say what there is."""
