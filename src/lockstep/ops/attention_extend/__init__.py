"""Causal attention of new tokens over keys and values in pages."""
