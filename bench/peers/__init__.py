"""Lockstep beside other engines on one machine: who takes part, what is measured, how it is told.

Owns: the peers' environments and files, one process per visit, the figures. Must not know: how Lockstep computes.
`peer.py`, `worker.py`, `scores.py` and each peer's own module run in that peer's environment, so they import nothing
that it lacks. Read first: `peer.py`, then `visits.py`.
"""
