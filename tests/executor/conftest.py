"""The helper of a neighbouring suite: small models of every architecture."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
