"""Operators: one folder each, with its contract, its reference and its kernels.

Owns: what each operator means (contract), how it is computed (reference and kernels), which kernel a call site gets.
Must not know: which model calls them. Read first: `contract.py`, then `rms_norm/`, then `selection.py`.
"""
