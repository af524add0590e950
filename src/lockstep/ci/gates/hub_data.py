"""Rows of a data set on the Hugging Face Hub, which keeps them as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError

_INSTEAD = "or give its files with --data DIR"


def read_hub_split(hub_id: str, split: str, subset: str = "main") -> list[dict[str, Any]]:
    """All rows of one split. Raises ConfigError without huggingface_hub, pyarrow, or a network."""
    try:
        from huggingface_hub import snapshot_download
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f'fetching {hub_id} needs {error.name}: pip install "lockstep-engine[hub]", {_INSTEAD}'
        ) from None
    try:
        pattern = f"{subset}/{split}-*.parquet"
        snapshot = snapshot_download(hub_id, repo_type="dataset", allow_patterns=[pattern])
    except Exception as error:  # Its errors come from several HTTP libraries, by version.
        raise ConfigError(
            f"{hub_id} cannot be fetched from the Hub ({type(error).__name__}): check the network, {_INSTEAD}"
        ) from error
    paths = sorted(Path(snapshot).glob(pattern))
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows += parquet.read_table(path).to_pylist()
    return rows
