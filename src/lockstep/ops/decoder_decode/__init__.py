"""A decoder's blocks for one new token of each of a few sequences. In one operator."""
