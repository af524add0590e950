"""Attention of the newest token of each sequence over keys and values in pages."""
