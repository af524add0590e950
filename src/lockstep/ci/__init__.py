"""What a project's continuous integration asks: suites of tests, gates on accuracy and speed, what a change touches.

Owns: the registry of suites, parts, runs with retries, reports, gates, the review page of a change.
Must not know: which command line calls it; nothing but `cli` imports this room.
Read first: `marks.py`, `registry.py`, `run.py`.
"""
