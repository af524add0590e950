"""Attention over paged keys and values.

Owns: backends with `plan` (once a step, on the host) and `run` (once a layer), over the kernels of the operators
attention_decode and attention_extend. Must not know: queues and requests. Read first: `backend.py`, then
`paged_backend.py`.
"""
