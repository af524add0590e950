"""Which tokens of which sequences are computed next.

Owns: the queue, the ranking, budget, admission, preemption, and when a sequence is finished; it turns requests
into a StepPlan and a StepResult into SequenceEvents. Must not know: the model, the device, the wire format,
torch, time. Read first: `scheduler.py`.
"""
