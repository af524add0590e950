"""The `lockstep` command: one thin file per command.

Owns: what is typed and printed, exit codes. Must not know: how anything is computed; only the rooms that a
command calls import torch. Read first: `main.py`, then `run.py`.
"""
