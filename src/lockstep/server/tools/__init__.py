"""Tool calls: how a model writes them, how text becomes calls, how a call is forced.

Owns: one reader per way of writing calls, the registry, the grammars of forced calls. Must not know: HTTP.
Read first: `reader.py`.
"""
