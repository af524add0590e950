"""Model architectures, and their weights on the way from storage to shards.

Owns: `llm/`, one file per architecture, and `loading/`.
Must not know: platforms, processes, options. Read first: `loading/weights.py`.
"""
