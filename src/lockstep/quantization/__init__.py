"""How bytes are stored and become values.

Owns: storage types, from packed blocks to integers with scales, and on to floating-point values.
Must not know: the device, the file the bytes came from, the model. Read first: `storage_types.py`.
"""
