"""Kernels of this operator, one file per provider."""
