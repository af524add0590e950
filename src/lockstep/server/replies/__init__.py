"""From engine outputs to response bodies and stream chunks, one builder per dialect.

Owns: the shape of answers on the wire. Must not know: requests' bodies, HTTP. Read first: `common.py`.
"""
