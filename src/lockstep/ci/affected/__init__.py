"""What a change touches: rooms, operators, models, public names, suites and gates, and what nobody tests.

Everything is read from text, base and working tree, with git and `ast`; nothing is imported or run. Read first:
`review.py`; `graph.py` says what counts as touching.
"""
