"""How text is cut into words before byte-level BPE, by the names that GGUF files use (`tokenizer.ggml.pre`).

The patterns are those of the models' own tokenizer.json files; names and groups are llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from lockstep.core.errors import ModelFileError, nearest

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """Patterns applied one after the other, each cutting what the former left.

    `ignores_merges`: a word that is a token is taken whole. `adds_bos`: the default when the file does not say.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` object; every piece ends in GPT-2's byte alphabet."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, byte_level])


_KINDS: tuple[tuple[tuple[str, ...], PreTokenization], ...] = (
    (("default",), PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion"), PreTokenization((_GPT2,))),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenization((r"\p{N}", _GPT2)),
    ),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreTokenization((_LLAMA3,), ignores_merges=True, adds_bos=True),
    ),
    (
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "kormo"),
        PreTokenization((_QWEN2,)),
    ),
    (("qwen35",), PreTokenization((_QWEN35,))),
)
_BY_NAME = {name: kind for names, kind in _KINDS for name in names}


def pre_tokenization(name: str) -> PreTokenization:
    """The pre-tokenization of that name. Raises ModelFileError when Lockstep does not know it."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ModelFileError(
            f"the file asks for pre-tokenizer {name!r}, which is not supported{nearest(name, _BY_NAME)}. "
            f"Supported: {', '.join(_BY_NAME)}"
        ) from None
