"""Routing by sigmoid scores, with a correction bias and expert groups."""
