"""Measurements: throughput, latency, serving over HTTP, startup, and comparisons in the same sitting.

Owns: workloads, load generation, contenders, figures, the machine's fingerprint that every result carries.
Must not know: how an answer is computed. Read first: `contender.py`, then `latency.py`.
"""
