"""The composition root: builds everything from resolved options, runs the loop, owns the processes.

Owns: the engine loop, its processes and messages, the protocol that clients speak (`client.py`).
Must not know: maths, HTTP. Read first: `client.py`.
"""
