"""Endpoints, one file per family: a body becomes core requests, outputs become an answer.

Owns: paths, methods, the errors a body deserves. Must not know: how the engine runs. Read first: `serving.py`.
"""
