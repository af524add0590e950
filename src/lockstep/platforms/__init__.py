"""Device families: what they can do and which kernels they prefer.

Owns: one folder per family, capability records, memory figures, ordered kernel preferences.
Must not know: which operators or models exist. Read first: `base.py`, then `cpu/__init__.py`.
"""
