"""Runs a StepPlan: inputs, forward, sampling.

Owns: the token ids and page tables of running sequences, the model of this rank, the sampler, memory sizing.
Must not know: HTTP, queues. Read first: `runner.py`.
"""
