"""Memory for keys and values, in pages.

Owns: `index/`, which page belongs to whom and which prefixes are cached (no torch); `pool/`, the device
tensors. Must not know: requests, models, attention. Read first: `index/page_index.py`.
"""
