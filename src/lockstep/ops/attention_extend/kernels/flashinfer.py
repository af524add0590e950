"""FlashInfer's attention over pages, in the form that Hopper's matrix units want (FlashAttention-3).

The package is a generator: its kernels are compiled once for each dtype and head size, before they are used, and kept
in its folder. Its calls are planned on the host, once for all layers of a kind.
Source of the interfaces: flashinfer-python 0.6.12, `prefill.py`, `decode.py` and `jit`. Shah et al., FlashAttention-3,
2024. Shapes: T rows, N query heads, K KV heads, P pages, S page size, H head dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from lockstep.ops.attention_extend.page_lists import OwnedPages, PageLists
from lockstep.ops.contract import Kernel, Signature

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
WORKSPACE_BYTES = 128 * 2**20
"""Room for partial results of keys in parts: what the library's documentation recommends."""
LAYOUT = "HND"
"""Its word for pools whose pages hold the tokens of one head together."""

_LOG = logging.getLogger("lockstep.attention")
_failed: dict[str, str] = {}
"""Why a variant could not be compiled in this process."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What the library compiles at once. `program`: fa3 or fa2 for tiles of rows, decode for single ones."""

    program: Literal["fa3", "fa2", "decode"]
    dtype: torch.dtype
    head_dim: int
    has_window: bool

    @property
    def name(self) -> str:
        """The library's name for it."""
        jit = library().jit
        if self.program == "decode":
            return str(jit.get_batch_decode_uri(*self._arguments()))
        return str(jit.get_batch_prefill_uri(self.program, *self._arguments(), False))

    def sources(self) -> Any:
        """Writes its sources into the library's folder; what the library builds it from."""
        jit = library().jit
        if self.program == "decode":
            return jit.gen_batch_decode_module(*self._arguments())
        return jit.gen_batch_prefill_module(self.program, *self._arguments(), False)

    def _arguments(self) -> tuple[Any, ...]:
        """dtypes of queries, keys, results and page numbers, head sizes, no positions, window, no soft cap."""
        return (*(self.dtype,) * 3, torch.int32, self.head_dim, self.head_dim, 0, self.has_window, False)


def variants(program: Literal["fa3", "fa2", "decode"], signature: Signature) -> tuple[Variant, ...]:
    """What layers of this signature need: with a window, some of them may have none."""
    windows = (False, True) if signature["window"] else (False,)
    return tuple(Variant(program, signature["dtype"], signature["head_dim"], each) for each in windows)


@cache
def library() -> Any:
    """The package. What was compiled once is loaded as it is, with no second look at its sources or for a compiler."""
    found = importlib.import_module("flashinfer")
    env = found.jit.env
    if not env.has_flashinfer_jit_cache():
        env.FLASHINFER_AOT_DIR = env.FLASHINFER_JIT_DIR
    return found


def refuses_call(signature: Signature) -> str | None:
    """What neither decoding nor extending serves, whatever is compiled."""
    dtype = signature["dtype"]
    if dtype not in DTYPES or signature["pool_dtype"] != dtype:
        return f"serves {' or '.join(map(str, DTYPES))}, queries and pool alike"
    if signature["head_dim"] not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"is generated for heads of {sizes} elements, not {signature['head_dim']}"
    if signature["soft_cap"] or signature["sinks"]:
        return "is generated without soft caps and sinks here"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return _import_error()


def why_not_compiled(needed: Sequence[Variant]) -> str | None:
    """Why these variants cannot be called now, and what to do; None when they can."""
    for variant in needed:
        if variant.name in _failed:
            return _failed[variant.name]
        if not _is_compiled(variant):
            return (
                _no_compiler()
                or "its kernel is not compiled yet: loading a model compiles it, for minutes, once"
            )
    return None


def compile_variants(needed: Sequence[Variant]) -> None:
    """Compiles those that are missing, side by side, where there is a compiler; a failure is kept for the refusal."""
    missing = [variant for variant in needed if not _is_compiled(variant) and variant.name not in _failed]
    if not missing or _no_compiler() is not None:
        return
    names = ", ".join(variant.name for variant in missing)
    _LOG.warning("compiling %d attention kernels of FlashInfer for this GPU, once: %s", len(missing), names)
    try:
        library().jit.build_jit_specs([variant.sources() for variant in missing])
    except Exception as error:
        reason = f"could not be compiled: {_first_complaint(str(error)) or type(error).__name__}"
        _failed.update({variant.name: reason for variant in missing})
        return
    _LOG.warning("compiled; kept in %s", library().jit.env.FLASHINFER_JIT_DIR)


def _first_complaint(text: str) -> str:
    """The line of a build's output that says what went wrong, or its last."""
    lines = text.strip().splitlines()
    says = (line for line in lines if re.search(r"\b(error|cannot)\b", line) and len(line) < 300)
    return next(says, lines[-1] if lines else "")


@cache
def _import_error() -> str | None:
    try:
        library()
    except Exception as error:
        return f"flashinfer cannot be imported: {type(error).__name__}: {error}"
    return None


def _is_compiled(variant: Variant) -> bool:
    """Waits while another process compiles: a file that is being linked is there before it is whole."""
    from filelock import FileLock

    jit = library().jit
    with FileLock(jit.core.get_tmpdir() / "flashinfer_jit.lock", thread_local=False):
        kept = Path(variant.name) / f"{variant.name}.so"
        return any(
            (folder / kept).exists() for folder in (jit.env.FLASHINFER_AOT_DIR, jit.env.FLASHINFER_JIT_DIR)
        )


def _no_compiler() -> str | None:
    kept = library().jit.env.FLASHINFER_JIT_DIR
    advice = f"install it, or copy {kept} from a machine that has compiled"
    try:
        nvcc = Path(library().jit.cpp_ext.get_cuda_path()) / "bin" / "nvcc"
    except RuntimeError:
        nvcc = Path()
    if not nvcc.is_file():
        return f"its kernel is not compiled and CUDA's compiler nvcc is not here: {advice}"
    if shutil.which("ninja") is None:
        return f"its kernel is not compiled and the command ninja is not on the path: {advice}"
    return None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that share a plan. `window` 0 sees every earlier token."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    window: int

    @classmethod
    def of(cls, q_TNH: torch.Tensor, k_KPSH: torch.Tensor, window: int) -> LayerKind:
        kv_heads, _, page_size, head_dim = k_KPSH.shape
        return cls(q_TNH.shape[1], kv_heads, head_dim, page_size, q_TNH.dtype, window)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, KV heads, head size and page size: the order of the library's plans."""
        return self.heads, self.kv_heads, self.head_dim, self.page_size

    def options(self) -> dict[str, Any]:
        """What both of the library's plans take. Scales are given with each call, so that layers may differ in them."""
        # It counts the keys before a token's own.
        left = self.window - 1 if self.window else -1
        return {"window_left": left, "sm_scale": 1.0, "q_data_type": self.dtype, "kv_data_type": self.dtype}


class PlannedCall:
    """One of the library's wrappers, with plans that do not overtake each other.

    A plan leaves through one pinned buffer: it waits until the one before has left.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._left: torch.Event | None = None

    def plan(self, *arguments: Any, **options: Any) -> None:
        if self._left is not None:
            self._left.synchronize()
        self._wrapper.plan(*arguments, **options)
        device = self._wrapper.device
        if device.type != "cpu":
            self._left = torch.Event(device=device)
            self._left.record()

    def run(
        self,
        q_TNH: torch.Tensor,
        k_KPSH: torch.Tensor,
        v_KPSH: torch.Tensor,
        out_TNH: torch.Tensor,
        scale: float,
    ) -> None:
        pools_PKSH = (k_KPSH.transpose(0, 1), v_KPSH.transpose(0, 1))
        self._wrapper.run(q_TNH, pools_PKSH, out=out_TNH, q_scale=scale)


def new_workspace(device: torch.device) -> torch.Tensor:
    """Room for partial results; calls that follow each other on one stream may share it."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class ExtendCalls:
    """attention_extend for every kind of layer: planned when a step's first layer of the kind asks."""

    def __init__(self, workspace: torch.Tensor, program: Literal["fa3", "fa2"] = "fa3") -> None:
        self._workspace = workspace
        self._program = program
        self._calls: dict[LayerKind, PlannedCall] = {}

    def planned(self, kind: LayerKind, lists: PageLists) -> PlannedCall:
        """The call of this kind for these sequences; it stands until the next plan of the kind."""
        if kind not in self._calls:
            made = library().BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT, backend=self._program)
            self._calls[kind] = PlannedCall(made)
        call = self._calls[kind]
        call.plan(
            lists.row_starts_B1,
            lists.page_starts_B1,
            lists.pages_P,
            lists.last_page_tokens_B,
            *kind.sizes(),
            causal=True,
            # Found by the library one tensor element at a time if it is not told.
            max_token_per_sequence=lists.most_rows,
            **kind.options(),
        )
        return call


def refuses(signature: Signature) -> str | None:
    """What attention_extend by FlashInfer cannot serve, or cannot yet."""
    return refuses_call(signature) or why_not_compiled(variants("fa3", signature))


def compile_ahead(signature: Signature) -> None:
    """Compiles what calls of this signature lack, where it can."""
    if refuses_call(signature) is None:
        compile_variants(variants("fa3", signature))


def attention_extend(
    q_TNH: torch.Tensor,
    k_KPSH: torch.Tensor,
    v_KPSH: torch.Tensor,
    page_table_BP: torch.Tensor,
    cu_rows_B1: torch.Tensor,
    num_keys_B: torch.Tensor,
    sinks_N: torch.Tensor | None,
    out_TNH: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """See the contract. Lengths are read on the host; a backend plans once for all layers instead."""
    lists = PageLists.of(OwnedPages.read(page_table_BP, cu_rows_B1, num_keys_B), k_KPSH.shape[2])
    out_TNH[lists.num_rows :].zero_()
    if lists.num_rows:
        call = ExtendCalls(new_workspace(q_TNH.device)).planned(LayerKind.of(q_TNH, k_KPSH, window), lists)
        call.run(q_TNH[: lists.num_rows], k_KPSH, v_KPSH, out_TNH[: lists.num_rows], scale)


KERNELS = (
    Kernel(
        op="attention_extend",
        provider="flashinfer",
        verified_on=("NVIDIA H100",),
        function=attention_extend,
        platforms=frozenset({"cuda"}),
        features=frozenset({"sm_90"}),
        refuses=refuses,
        asks_host=True,
        compile_ahead=compile_ahead,
    ),
)
