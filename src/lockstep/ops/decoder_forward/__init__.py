"""A decoder from token ids to hidden rows: every block of a step as one operator."""
