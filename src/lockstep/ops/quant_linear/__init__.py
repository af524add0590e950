"""Products with a constant weight of small integers with scales."""
