"""Runs a StepPlan: inputs, forward, sampling; nothing of it waits for the device until the result is asked for.

Owns: the token ids and page tables of running sequences, the model of this rank, the sampler, memory sizing.
Must not know: HTTP, queues. Read first: `runner.py`, then `pending.py`.
"""
