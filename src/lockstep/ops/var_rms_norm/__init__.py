"""Root-mean-square normalisation by the mean square of the first elements alone."""
