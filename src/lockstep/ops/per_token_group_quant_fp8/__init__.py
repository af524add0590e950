"""Each row in groups of e4m3 codes, one scale a group.

`reference.py` holds the rules of all quantisers: what the scale of a group is and how scales lie in memory.
"""
