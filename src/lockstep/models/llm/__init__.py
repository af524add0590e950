"""Language models, one file per architecture. Read first: `decoder.py`, then `llama.py`."""
