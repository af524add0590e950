"""Rotary position embedding of halves or of neighbouring elements."""
