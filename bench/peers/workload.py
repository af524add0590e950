"""What every peer is asked, decided by a seed: the same token lists for all, new ones in every round."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Counts of the three questions. `repeats` answers are timed for a single prompt, after one that is not."""

    seed: int = 0
    repeats: int = 3
    decode_prompt_tokens: int = 32
    decode_tokens: int = 127
    long_prompt_tokens: int = 512
    num_concurrent: int = 16
    concurrent_prompt_tokens: int = 128
    concurrent_tokens: int = 128

    def long_prompt(self, vocab_size: int, round_number: int, repeat: int) -> list[int]:
        """The prompt whose first token is waited for."""
        return self._draw(f"long/{round_number}/{repeat}", vocab_size, self.long_prompt_tokens)

    def decode_prompt(self, vocab_size: int, round_number: int, repeat: int) -> list[int]:
        """The prompt that `decode_tokens` follow, after its first token."""
        return self._draw(f"decode/{round_number}/{repeat}", vocab_size, self.decode_prompt_tokens)

    def concurrent_prompts(self, vocab_size: int, round_number: int) -> list[list[int]]:
        """Prompts that are answered together."""
        return [
            self._draw(f"concurrent/{round_number}/{at}", vocab_size, self.concurrent_prompt_tokens)
            for at in range(self.num_concurrent)
        ]

    def _draw(self, what: str, vocab_size: int, count: int) -> list[int]:
        return random.Random(f"{self.seed}/{what}").choices(range(vocab_size), k=count)


QUICK = Workload(
    repeats=1,
    decode_tokens=15,
    long_prompt_tokens=64,
    num_concurrent=4,
    concurrent_prompt_tokens=16,
    concurrent_tokens=8,
)
"""To see that everything works; its figures say nothing."""

WARM_UP_TOKENS = 4
