"""Device families: what they can do and which kernels they prefer.

Owns: one folder per family, capability records, memory, streams, graphs, ordered kernel preferences; the skeleton
of a platform package that lives elsewhere.
Must not know: which operators or models exist. Read first: `base.py`, then `cpu/__init__.py`.
"""
