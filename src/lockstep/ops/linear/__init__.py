"""Products with a constant weight."""
