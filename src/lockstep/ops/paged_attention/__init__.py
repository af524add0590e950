"""Attention of new tokens over keys and values in pages."""
