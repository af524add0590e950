"""Where a rank's weights come from, by the options: files, read the way the device likes best, or dummies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lockstep.config import EngineConfig
from lockstep.engine.model_files import DUMMY
from lockstep.formats import ModelFiles
from lockstep.models.loading.direct import DirectReader
from lockstep.models.loading.sources import DummyWeights, StoredWeights
from lockstep.models.loading.weights import FileWeights
from lockstep.platforms.base import Platform


@contextmanager
def open_weights(
    files: ModelFiles, config: EngineConfig, platform: Platform, rank: int
) -> Iterator[StoredWeights | DummyWeights]:
    """A rank's source of weights, closed at the end.

    A device with queues of its own gets what can be copied as it is straight from the files. The host maps them: it
    would hold everything twice for a while, and pages of a map are the file's.
    """
    device = platform.device(rank)
    if config.model.load_format == DUMMY:
        yield DummyWeights(device)
        return
    reader = None
    if platform.capabilities().has_streams:
        reader = DirectReader(device, lambda: platform.new_stream(rank))
    stored = StoredWeights(FileWeights(files), reader)
    try:
        yield stored
    finally:
        stored.close()
