"""Each row in groups of int8 codes, one scale a group."""
