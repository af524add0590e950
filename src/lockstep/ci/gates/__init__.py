"""Gates: accuracy on questions with known answers, and speed against a recorded baseline.

Owns: what is asked and timed, and the statistics that turn it into pass, fail or undecided. Must not know: how an
answer is computed, nor how a verdict is printed. Read first: `verdict.py`; then `proportions.py` and `accuracy.py`
for the accuracy gate, `slowdown.py` and `baseline.py` for the performance gate.
"""
