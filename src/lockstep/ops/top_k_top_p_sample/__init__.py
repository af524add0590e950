"""Seeded choice of a token of each row, after temperature, top-k, top-p and min-p."""
