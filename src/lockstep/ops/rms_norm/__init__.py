"""Root-mean-square normalisation of the last dim."""
