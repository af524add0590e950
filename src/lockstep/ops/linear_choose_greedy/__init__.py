"""The best output of a product for each row, kept for the next step and packed for the host."""
