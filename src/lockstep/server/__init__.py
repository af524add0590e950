"""HTTP: the OpenAI-compatible API, the native one, and the page at `/`.

Owns: wire formats, error shapes, streaming, tool-call parsing, metrics. Speaks only to `engine.client`.
Must not know: tensors, queues, processes. Read first: `app.py`, then `gateway.py`.
"""
