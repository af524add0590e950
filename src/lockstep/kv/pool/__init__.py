"""The device tensors that hold keys and values. Read first: `pool.py`."""
