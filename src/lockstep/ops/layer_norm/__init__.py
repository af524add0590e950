"""Layer normalisation of the last dim."""
