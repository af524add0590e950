"""Who is measured on which file: the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.errors import ConfigError, nearest
from peers.files import SHAPE, SMALL
from peers.peer import PEERS


@dataclass(frozen=True)
class Row:
    """One line of the table. `who` is a peer, or Lockstep by another door: its command line or its server."""

    who: str
    format: str

    @property
    def name(self) -> str:
        return f"{self.who} {self.format}"

    @property
    def is_lockstep(self) -> bool:
        return self.who.startswith("lockstep")


COMMAND, SERVER = "lockstep run", "lockstep serve"

# OpenVINO's Q4_0 is left out: slower than one of its other rows in every figure. transformers expands every file.
ROWS = {
    SMALL: (
        Row("lockstep", "Q4_1"),
        Row("llama.cpp", "Q4_1"),
        Row("openvino", "Q4_1"),
        Row(SERVER, "Q4_1"),
        Row(COMMAND, "Q4_1"),
        Row("llama.cpp", "Q4_0"),
        Row("lockstep", "Q4_0"),
        Row("openvino", "Q8_0"),
        Row("llama.cpp", "Q8_0"),
        Row("lockstep", "Q8_0"),
        Row("openvino", "F16"),
        Row("transformers", "Q4_1"),
    ),
    SHAPE: (
        Row("lockstep", "Q4_0"),
        Row("llama.cpp", "Q4_0"),
        Row("openvino", "Q4_0"),
        Row(SERVER, "Q4_0"),
        Row(COMMAND, "Q4_0"),
        Row("openvino", "F16"),
        Row("llama.cpp", "Q8_0"),
        Row("transformers", "Q4_0"),
    ),
}
"""Model -> its rows, in the order in which a round visits them. Lockstep stands between its peers, not at one end."""


def chosen_rows(model: str, wanted: list[str] | None) -> tuple[Row, ...]:
    """The rows of a model whose `who` is wanted; None is all. Raises ConfigError for a name that is none's."""
    known = [*PEERS, COMMAND, SERVER]
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"unknown peer {name!r} (known: {', '.join(known)}){nearest(name, known)}")
    return tuple(row for row in ROWS[model] if wanted is None or row.who in wanted)
