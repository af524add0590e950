"""Putting an engine together in this process: the first rank with its workers, or one further rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lockstep.config import EngineConfig
from lockstep.config.environment import disabled_features
from lockstep.core.output import ModelCard
from lockstep.core.probe import Probe
from lockstep.engine.build import BuiltRank, Progress, build_rank
from lockstep.engine.loop import EngineLoop
from lockstep.engine.model_files import open_tokenizer
from lockstep.engine.opening import OpenedModel, open_for_running, reopen
from lockstep.engine.ranks import Ranks, new_run_dir
from lockstep.formats import ModelFiles
from lockstep.native import extension, summary, usable_instruction_sets
from lockstep.ops.native import is_native
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.processes import connect
from lockstep.platforms.registry import load_platform
from lockstep.tokenizer.tokenizer import Tokenizer

DYING_S = 2.0
"""Time that a worker whose connection broke gets to end and to say why."""


@dataclass
class AssembledRank:
    """A built rank with what clients may know of the model."""

    rank: BuiltRank
    card: ModelCard


class Engine:
    """One replica: the loop of the first rank, its workers, the tokenizer. `close` releases everything.

    `run_dir` is a private folder for the sockets to the workers; without one a temporary folder is made.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        run_dir: Path | None = None,
        progress: Progress | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.opened: OpenedModel = open_for_running(options)
        config = self.opened.config
        self.tokenizer: Tokenizer = _tokenizer(self.opened.files, config)
        self._own_dir: TemporaryDirectory[str] | None = None
        self._ranks: Ranks | None = None
        try:
            store = self._start_workers(config, run_dir)
            self.rank = self._build_first(store, progress, probe)
            if self._ranks is not None:
                self._ranks.wait_ready()
        except BaseException:
            self.close()
            raise
        broadcast = self._ranks.send if self._ranks is not None else None
        self.loop = EngineLoop(self.rank.core, seed=config.model.seed, broadcast=broadcast)

    @property
    def card(self) -> ModelCard:
        """What clients may know of the model."""
        return self.opened.card

    @property
    def native_kernels(self) -> str | None:
        """Which native kernels serve the model, or on a device for them why there are none; None where others serve."""
        serving = {binding.kernel.provider for binding in self.rank.bindings if is_native(binding.kernel)}
        could_be = self.opened.platform.runs_native_kernels and extension() is None
        if not serving and not could_be:
            return None
        disabled = disabled_features()
        # Kernels of an instruction set that was asked for bear its name, others take the best one.
        named = {provider.partition("native_")[2] for provider in serving}
        best = usable_instruction_sets(disabled)[:1] if "" in named else ()
        return summary(disabled, sorted({*named, *best} - {""}))

    def check(self, patience_s: float = 0.0) -> None:
        """Raises EngineDead when a worker is gone, or goes in this time."""
        if self._ranks is not None:
            self._ranks.check(patience_s)

    def prepare_more(self) -> bool:
        """Does a little of what later steps would wait for; False when nothing is left to do. For idle moments.

        Ranks that sum over each other record together, when a step wants it.
        """
        return self._ranks is None and self.rank.core.executor.record_next()

    def close(self) -> None:
        """Ends the workers and removes the private folder. May be called twice."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        if self._own_dir is not None:
            self._own_dir.cleanup()
            self._own_dir = None

    def _build_first(self, store: Path | None, progress: Progress | None, probe: Probe | None) -> BuiltRank:
        try:
            return self._build_and_watch(store, progress, probe)
        except RuntimeError:
            # Collectives report a peer that is gone by a broken connection; the worker's own words say why.
            self.check(DYING_S)
            raise

    def _build_and_watch(self, store: Path | None, progress: Progress | None, probe: Probe | None) -> BuiltRank:
        mesh = _connect(self.opened, 0, store, self.check)
        if self._ranks is not None:
            self._ranks.watch(mesh.abort)
        return _build(self.opened, self.tokenizer, mesh, progress, probe)

    def _start_workers(self, config: EngineConfig, run_dir: Path | None) -> Path | None:
        if config.parallel.num_ranks == 1:
            return None
        if run_dir is None:
            self._own_dir = new_run_dir()
            run_dir = Path(self._own_dir.name)
        self._ranks = Ranks(config, run_dir)
        return self._ranks.store


def assemble_rank(config: EngineConfig, *, rank: int, store: Path) -> AssembledRank:
    """A further rank under the first rank's configuration."""
    platform = load_platform(config.device.device)
    opened = reopen(platform, config)
    tokenizer = _tokenizer(opened.files, config)
    # When the first rank is gone, the lifeline ends this one.
    mesh = _connect(opened, rank, store, lambda: None)
    return AssembledRank(_build(opened, tokenizer, mesh, None, None), opened.card)


def _tokenizer(files: ModelFiles, config: EngineConfig) -> Tokenizer:
    model = config.model
    return open_tokenizer(files, model.tokenizer, model.chat_template, skip=model.skip_tokenizer_init)


def _connect(opened: OpenedModel, rank: int, store: Path | None, check_peers: Callable[[], None]) -> Mesh:
    return connect(
        opened.config.parallel.mesh_sizes,
        rank=rank,
        store=store or Path(),
        backend=opened.capabilities.collective_backend,
        device=opened.platform.device(rank),
        check_peers=check_peers,
    )


def _build(
    opened: OpenedModel, tokenizer: Tokenizer, mesh: Mesh, progress: Progress | None, probe: Probe | None
) -> BuiltRank:
    return build_rank(
        opened.files,
        opened.facts,
        opened.config,
        opened.platform,
        tokenizer,
        mesh,
        probe=probe,
        progress=progress,
    )
