"""The tensors that hold keys and values, on the device and behind it on the host. Read first: `pool.py`."""
