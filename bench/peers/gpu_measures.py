"""One workload on one engine, as figures. Times are wall-clock seconds around the whole call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.bench.workload import Job
from peers.gpu_engine import Engine
from peers.gpu_workloads import Workload, WorkloadFile

REPEATS = {"decode": 3, "prefill": 5, "prefix": 3, "throughput": 5}

# Three runs are enough of workloads that take this long: what the first one records is little of them.
ENOUGH_S = 60.0


@dataclass(frozen=True)
class Ceilings:
    """What the card can do at most: operations by its datasheet, and what was measured there, if it was."""

    datasheet_flops_per_s: float
    copy_bytes_per_s: float | None = None
    gemm_flops_per_s: float | None = None


@dataclass(frozen=True)
class Measurer:
    """Measures workloads of one file for one model."""

    engine: Engine
    file: WorkloadFile
    model: str
    ceilings: Ceilings

    def measure(self, workload: Workload) -> dict[str, Any]:
        """Warms up, empties the prefix cache before each run, and gives the figures of the workload's kind."""
        warmup_s = self.engine.generate(workload.warmup, workload.temperature)
        runs_s = self._times(workload, lambda: self.engine.generate(workload.jobs, workload.temperature))
        figures = {
            "decode": self._decode,
            "prefill": self._prefill,
            "prefix": self._prefix,
            "throughput": self._throughput,
        }[workload.kind]
        return {
            "kind": workload.kind,
            "requests": len(workload.jobs),
            "tokens_in": workload.num_input_tokens,
            "tokens_out": workload.num_output_tokens,
            "temperature": workload.temperature,
            "digest": workload.digest,
            "warmup_s": warmup_s,
            "runs_s": runs_s,
            "median_s": statistics.median(runs_s),
            "output_tokens_per_s": workload.num_output_tokens / statistics.median(runs_s),
            **figures(workload, runs_s),
        }

    def _times(self, workload: Workload, run: Callable[[], float]) -> list[float]:
        times_s: list[float] = []
        for _ in range(REPEATS[workload.kind]):
            if len(times_s) >= 3 and sum(times_s) > ENOUGH_S:
                break
            self.engine.flush()
            times_s.append(run())
        return times_s

    def _throughput(self, workload: Workload, runs_s: list[float]) -> dict[str, Any]:
        num_tokens = workload.num_input_tokens + workload.num_output_tokens
        return {
            "total_tokens_per_s": num_tokens / statistics.median(runs_s),
            "best_output_tokens_per_s": workload.num_output_tokens / min(runs_s),
        }

    def _decode(self, workload: Workload, runs_s: list[float]) -> dict[str, Any]:
        """A step is what every token after the first takes: (time for N tokens - time for one) / (N - 1)."""
        first_only = [replace(job, max_tokens=1) for job in workload.jobs]
        first_s = self._times(workload, lambda: self.engine.generate(first_only, workload.temperature))
        num_steps = workload.jobs[0].max_tokens - 1
        step_s = (statistics.median(runs_s) - statistics.median(first_s)) / num_steps
        return {
            "first_token_runs_s": first_s,
            "first_token_s": statistics.median(first_s),
            "ms_per_step": step_s * 1e3,
            "decode_only_tokens_per_s": len(workload.jobs) / step_s,
            **self._floor(workload.jobs, step_s),
        }

    def _floor(self, jobs: Sequence[Job], step_s: float) -> dict[str, Any]:
        """The step's share of what reading its weights, and its keys and values at mid-run, would take."""
        costs = self.file.costs(self.model)
        bytes_per_s = self.ceilings.copy_bytes_per_s
        if bytes_per_s is None or not (costs.reads_all_weights or len(jobs) == 1):
            return {}
        num_tokens = sum(len(job.prompt) + job.max_tokens / 2 for job in jobs)
        num_bytes = costs.step_weight_bytes + num_tokens * costs.token_kv_bytes
        return {
            "floor_bw_bytes_per_s": bytes_per_s,
            "floor_weights_kv_ms": num_bytes / bytes_per_s * 1e3,
            "fraction_of_weight_floor": costs.step_weight_bytes / bytes_per_s / step_s,
            "fraction_of_weight_kv_floor": num_bytes / bytes_per_s / step_s,
        }

    def _prefill(self, workload: Workload, runs_s: list[float]) -> dict[str, Any]:
        seconds = statistics.median(runs_s)
        flops = self.file.prefill_flops(self.model, [len(job.prompt) for job in workload.jobs])
        gemm = self.ceilings.gemm_flops_per_s
        return {
            "input_tokens_per_s": workload.num_input_tokens / seconds,
            "flops": flops,
            "flops_per_s": flops / seconds,
            "mfu_datasheet": flops / seconds / self.ceilings.datasheet_flops_per_s,
            "mfu_measured_gemm": flops / seconds / gemm if gemm else None,
        }

    def _prefix(self, workload: Workload, runs_s: list[float]) -> dict[str, Any]:
        seconds = statistics.median(runs_s)
        figures = {
            "requests_per_s": len(workload.jobs) / seconds,
            "input_tokens_per_s": workload.num_input_tokens / seconds,
        }
        prefix = workload.shared_prefix
        if not prefix:
            return figures

        def primed() -> float:
            self.engine.generate([Job(prefix, 1)])
            return self.engine.generate(workload.jobs, workload.temperature)

        primed_s = self._times(workload, primed)
        return {
            **figures,
            "primed_runs_s": primed_s,
            "primed_median_s": statistics.median(primed_s),
            "primed_output_tokens_per_s": workload.num_output_tokens / statistics.median(primed_s),
        }
