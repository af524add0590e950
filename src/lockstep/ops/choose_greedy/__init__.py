"""The best token of each row, kept for the next step and packed for the host."""
