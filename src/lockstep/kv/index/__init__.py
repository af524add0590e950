"""Which page belongs to whom, and which prefixes of tokens already have KV.

Owns: the free list, the radix prefix tree with its locks and LRU eviction, one page table per live sequence,
and a self-check over all of them. Must not know: tensors, requests, time. Read first: `page_index.py`.
"""
