"""Steps that begin with copies of pages between device and host."""

from __future__ import annotations

from lockstep.core.step import Executor, Pending, StepPlan
from lockstep.kv.pool.host_pool import HostPool


class CopyingExecutor:
    """An executor, behind a pool of host memory that does a plan's copies first."""

    def __init__(self, executor: Executor, host: HostPool) -> None:
        self.executor = executor
        self.host = host

    def submit(self, plan: StepPlan) -> Pending:
        """Has the copies and the step under way. See Executor."""
        if plan.page_copies:
            self.host.perform(plan.page_copies)
        return self.executor.submit(plan)

    def record_next(self) -> bool:
        """See Executor."""
        return self.executor.record_next()
