"""Plain types and errors that every room shares.

Owns: requests, sampling parameters, the step seam, outputs, errors, capabilities, probe points, the clock.
Must not know: that torch exists. Read first: `step.py`.
"""
