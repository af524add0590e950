"""What changes how a sequence is generated without the executor knowing why: structured output.

Owns: objects with typed step hooks that the sampler calls. Must not know: HTTP.
Read first: `structured.py`; `grammar.py` is usable without torch, to check a request before it is queued.
"""
