"""Attention over paged keys and values.

Owns: backends with `plan` (once a step, on the host) and `run` (once a layer).
Must not know: queues and requests. Read first: `backend.py`, then `torch_backend.py`.
"""
