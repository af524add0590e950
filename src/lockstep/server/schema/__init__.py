"""What clients may send: one strict pydantic model per request body, and the fields that are accepted unused.

Owns: field names, types and shapes on the wire. Must not know: templates, the engine. Read first: `base.py`.
"""
