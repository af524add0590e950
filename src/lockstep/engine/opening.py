"""Opening a model without loading it: files, platform, resolved options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lockstep.config import Decision, EngineConfig, ModelFacts, Resolution, gather, resolve, wanted
from lockstep.config.environment import disabled_features
from lockstep.config.option import AUTO
from lockstep.core.capabilities import Capabilities
from lockstep.core.errors import ModelFileError
from lockstep.core.output import ModelCard
from lockstep.engine.model_files import open_files
from lockstep.formats import ModelFiles
from lockstep.formats.storage import BLOCK_LAYOUTS, WIDENED_BLOCK_BYTES
from lockstep.native import usable_instruction_sets
from lockstep.platforms.base import Platform
from lockstep.platforms.registry import names_from_outside, pick_platform

_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


@dataclass(frozen=True)
class OpenedModel:
    """A model that is known but not loaded, and everything decided about running it."""

    files: ModelFiles
    platform: Platform
    capabilities: Capabilities
    facts: ModelFacts
    config: EngineConfig
    decisions: tuple[Decision, ...]

    @property
    def card(self) -> ModelCard:
        """What clients may know."""
        return ModelCard(
            name=self.config.model.served_model_name,
            path=str(self.files.path),
            architecture=self.facts.architecture,
            context_length=self.config.model.context_length,
            vocab_size=self.facts.vocab_size,
            dtype=self.config.model.dtype,
            quantization=self.facts.stored_dtype,
            pooling=self.files.pooling,
            num_parameters=self.facts.num_parameters,
            eos_token_ids=self.files.eos_token_ids,
        )


def open_for_running(options: Mapping[str, Any]) -> OpenedModel:
    """Everything short of weights. `options` are names of the configuration's options, plain or as Given.

    Raises ConfigError, ModelFileError or OutOfMemory.
    """
    given = gather(options)
    names = ("model", "revision", "load_format")
    files = _with_tensors(open_files(*(wanted(given, name) for name in names)))
    device = wanted(given, "device")
    platform = pick_platform(AUTO if device is None else device)
    capabilities = with_native_kernels(platform)
    facts = model_facts(files)
    resolution = resolve(given, facts, capabilities, available_bytes=platform.memory().available_bytes)
    decisions = resolution.decisions
    if device in (None, AUTO):
        decisions = tuple(_with_platforms_passed_over(decision) for decision in decisions)
    return OpenedModel(files, platform, capabilities, facts, resolution.config, decisions)


def _with_platforms_passed_over(decision: Decision) -> Decision:
    outside = names_from_outside()
    if decision.name != "device" or not outside:
        return decision
    only = f"{', '.join(outside)} of other packages only where named"
    return replace(decision, why=f"{decision.why}; {only}")


def with_native_kernels(platform: Platform) -> Capabilities:
    """What the device can do; where it runs the extension, feature "native", and bfloat16 without doubt."""
    capabilities = platform.capabilities()
    usable = usable_instruction_sets(disabled_features()) if platform.runs_native_kernels else ()
    if usable[:1] in ((), ("scalar",)):
        return capabilities
    fast = ("bfloat16", *(dtype for dtype in capabilities.fast_dtypes if dtype != "bfloat16"))
    return replace(capabilities, fast_dtypes=fast, features=capabilities.features | {"native"})


def _with_tensors(files: ModelFiles) -> ModelFiles:
    """Files without weights get those that the model would take."""
    if files.tensors:
        return files
    # Only a model that has to be built to be known costs torch and the layers.
    from lockstep.engine.dummy import with_dummy_tensors

    return with_dummy_tensors(files)


def model_facts(files: ModelFiles) -> ModelFacts:
    """Numbers for the resolver, from the files' headers. Raises ModelFileError for what is no language model."""
    config = files.config
    _require_sizes(config)
    heads = config["num_attention_heads"]
    bytes_by_type: Counter[str] = Counter()
    num_parameters = num_expert_parameters = 0
    for name, info in files.tensors.items():
        bytes_by_type[info.storage_type] += info.nbytes
        count = 1
        for size in info.shape:
            count *= size
        num_parameters += count
        num_expert_parameters += count if ".experts." in name else 0
    most = bytes_by_type.most_common(1)[0][0] if bytes_by_type else "F32"
    words = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return ModelFacts(
        name=files.name,
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        context_length=_context_length(config),
        num_parameters=num_parameters,
        weight_bytes=sum(bytes_by_type.values()),
        widened_bytes=sum(
            count // BLOCK_LAYOUTS[kind].num_bytes * (widened - BLOCK_LAYOUTS[kind].num_bytes)
            for kind, widened in WIDENED_BLOCK_BYTES.items()
            if (count := bytes_by_type[kind])
        ),
        stored_dtype=words.get(most, most.lower()),
        num_experts=config.get("num_experts", config.get("num_local_experts")) or 0,
        num_expert_parameters=num_expert_parameters,
    )


def _context_length(config: Mapping[str, Any]) -> int:
    """What the model was trained for with attention as it is computed here."""
    length: int = config.get("max_position_embeddings") or 2048
    # Beyond this, Qwen 2.5's models of a million tokens attend in another way.
    dual_chunk = config.get("dual_chunk_attention_config") or {}
    return min(length, int(dual_chunk.get("original_max_position_embeddings") or length))


def _require_sizes(config: Mapping[str, Any]) -> None:
    wrong = [name for name in _SIZES if not isinstance(size := config.get(name), int) or size < 1]
    if wrong:
        # An architecture that nobody knows may spell its sizes in its own way. Only this takes the model classes.
        from lockstep.models.registry import model_class

        model_class(config)
        raise ModelFileError(
            f"the model's config lacks a positive {wrong[0]!r}; is this a language model's config.json?"
        )


def resolve_options(options: Mapping[str, Any]) -> Resolution:
    """Every option decided, with reasons; headers are read, weights are not.

    Raises what `open_for_running` does, and ConfigError or KernelError for a name that no backend or kernel has.
    """
    opened = open_for_running(options)
    _require_known_kernels(opened.config)
    return Resolution(opened.config, opened.decisions)


def _require_known_kernels(config: EngineConfig) -> None:
    """Whether they can serve shows when the model is built; what they are called need not wait for it."""
    kernels = config.kernels
    if kernels.attention_backend is not None:
        from lockstep.attention.choice import check_backend

        check_backend(kernels.attention_backend)
    if kernels.force_kernel:
        from lockstep.ops.selection import check_forced

        check_forced(kernels.forced)


def reopen(platform: Platform, config: EngineConfig) -> OpenedModel:
    """The same model on a further rank, under a configuration that the first rank resolved.

    Raises ModelFileError.
    """
    model = config.model
    files = _with_tensors(open_files(model.model, model.revision, model.load_format))
    return OpenedModel(files, platform, with_native_kernels(platform), model_facts(files), config, ())
