"""How a model is spread over ranks.

Owns: the mesh with named axes, groups and their collectives, placements (`Sharded`, `Partial`).
Must not know: what a layer computes. Read first: `placement.py`.
"""
