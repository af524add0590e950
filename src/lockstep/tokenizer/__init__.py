"""Text to token ids and back, incremental detokenising, stop strings, chat templates.

Owns: what a token's bytes are, and how messages become a prompt. Must not know: torch.
Read first: `tokenizer.py`; `loading.py` builds one from a model's files.
"""
