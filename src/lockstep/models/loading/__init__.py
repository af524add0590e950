"""Weights from storage to tensors, whole or in slices.

Owns: reading tensors by canonical name, in Hugging Face's conventions, whatever the container keeps.
Must not know: which rank wants which slice, nor what a layer does with it. Read first: `weights.py`.
"""
