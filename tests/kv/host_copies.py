"""Copies of pages between a pool and the host, against the same copies made one after the other on host tensors."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from lockstep.core.step import PageCopy
from lockstep.kv.pool.host_pool import HostPool
from lockstep.kv.pool.pool import KVPool, KVShape

LAYERS = (KVShape(2, 8), KVShape(1, 16), KVShape(2, 8))
NUM_PAGES, NUM_HOST_PAGES, PAGE_SIZE = 50, 70, 4


def make(
    device: torch.device | str, new_stream: Callable[[], torch.Stream | None] = lambda: None
) -> tuple[KVPool, HostPool]:
    """A pool of layers of two kinds, filled with numbers that occur once, and pages on the host."""
    pool = KVPool(
        LAYERS,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        dtype=torch.float32,
        allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device),
    )
    for number, stack in enumerate(pool.stacks):
        values = torch.arange(stack.numel(), dtype=torch.float32).reshape(stack.shape) + 1e6 * number
        stack.copy_(values.to(device))
    return pool, HostPool(pool, num_pages=NUM_HOST_PAGES, new_stream=new_stream)


def draw(rng: random.Random, count: int, saved: set[int]) -> list[PageCopy]:
    """Copies in both directions, of which runs are long; only pages that were `saved` come back."""
    copies: list[PageCopy] = []
    while len(copies) < count:
        to_host = not saved or rng.random() < 0.5
        for _ in range(rng.randint(1, 90)):
            host_id = rng.randrange(NUM_HOST_PAGES) if to_host else rng.choice(sorted(saved))
            saved |= {host_id}
            copies.append(PageCopy(rng.randrange(NUM_PAGES), host_id, to_host))
    # A page is never given two contents by copies back of one run: nobody could say which one it should have.
    return [copy for at, copy in enumerate(copies) if copy.to_host or not _comes_again(copies, at)]


def _comes_again(copies: list[PageCopy], at: int) -> bool:
    for later in copies[at + 1 :]:
        if later.to_host:
            return False
        if later.page_id == copies[at].page_id:
            return True
    return False


def mismatches(device: torch.device | str, new_stream: Callable[[], torch.Stream | None], seed: int) -> int:
    """How many layers differ, after several rounds of copies, from what copying page by page gives."""
    print(f"seed {seed}")
    rng, saved = random.Random(seed), set[int]()
    pool, host = make(device, new_stream)
    expected = [stack.cpu().clone() for stack in pool.stacks]
    kept: dict[int, list[torch.Tensor]] = {}
    for _ in range(4):
        copies = draw(rng, 150, saved)
        host.perform(copies)
        for copy in copies:
            if copy.to_host:
                kept[copy.host_page_id] = [stack[:, :, copy.page_id].clone() for stack in expected]
            else:
                for stack, values in zip(expected, kept[copy.host_page_id], strict=True):
                    stack[:, :, copy.page_id] = values
        # What the next round saves was changed by work that comes after the copies.
        touched = rng.randrange(NUM_PAGES)
        for stack, twin in zip(pool.stacks, expected, strict=True):
            stack[:, :, touched] += 1.0
            twin[:, :, touched] += 1.0
    return sum(not torch.equal(stack.cpu(), twin) for stack, twin in zip(pool.stacks, expected, strict=True))
