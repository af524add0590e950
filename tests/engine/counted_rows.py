"""How many rows an engine computes."""

from __future__ import annotations

from lockstep.core.step import Executor, Pending, StepPlan
from lockstep.engine.llm import LLM


class Counting:
    """An executor that adds up the rows that it is asked to compute."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.num_rows = 0

    def submit(self, plan: StepPlan) -> Pending:
        self.num_rows += plan.num_tokens
        return self.executor.submit(plan)


def counting(llm: LLM) -> Counting:
    core = llm._engine.rank.core
    core.executor = counter = Counting(core.executor)
    return counter
