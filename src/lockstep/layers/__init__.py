"""What models are made of: products, norms, rope, embeddings, attention.

Owns: layers written over placements; each loads its own slice of the weights when it is made.
Must not know: requests. Read first: `build.py`, then `linear.py`.
"""
