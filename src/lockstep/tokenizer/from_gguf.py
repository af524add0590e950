"""A tokenizer from GGUF metadata; the keys mean what the GGUF specification and llama.cpp say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from lockstep.core.errors import ModelFileError, nearest
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.pre_tokenizers import pre_tokenization
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary, byte_level_bytes, sentencepiece_bytes

if TYPE_CHECKING:
    from lockstep.formats import ModelFiles

_TEMPLATE_KEY = "tokenizer.chat_template"


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Metadata:
    """The `tokenizer.ggml.*` keys of one file. Raises ModelFileError for what is missing or contradictory."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table
        self.tokens: list[str] = list(self.required("tokens"))
        kinds = self.get("token_type")
        self.token_types: list[int] = [TokenType.NORMAL] * len(self.tokens) if kinds is None else list(kinds)
        if len(self.token_types) != len(self.tokens):
            raise ModelFileError(
                f"the GGUF tokenizer has {len(self.tokens)} tokens but {len(self.token_types)} token types; "
                "the file is damaged"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self._table.get(f"tokenizer.ggml.{key}", default)

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelFileError(
                f"the GGUF file has no tokenizer: key 'tokenizer.ggml.{key}' is missing; use a complete file"
            )
        return value

    def ids_of(self, *kinds: TokenType) -> frozenset[int]:
        return frozenset(i for i, kind in enumerate(self.token_types) if kind in kinds)

    def token_id(self, name: str) -> int | None:
        """The id under `<name>_token_id`, or None when it is absent or past the vocabulary."""
        value = self.get(f"{name}_token_id")
        return int(value) if value is not None and 0 <= value < len(self.tokens) else None

    @property
    def adds_space(self) -> bool:
        """True when SentencePiece puts a space before every text."""
        return bool(self.get("add_space_prefix", True))

    def surroundings(self, *, adds_bos: bool) -> processors.TemplateProcessing:
        """Puts the beginning and end tokens around a text, as the file says or by the kind's default."""
        bos, eos = self.token_id("bos"), self.token_id("eos")
        before = [bos] if bos is not None and self.get("add_bos_token", adds_bos) else []
        after = [eos] if eos is not None and self.get("add_eos_token", False) else []
        text = self.tokens.__getitem__
        return processors.TemplateProcessing(
            single=[*map(text, before), "$A", *map(text, after)],
            special_tokens=[(text(i), i) for i in dict.fromkeys([*before, *after])],
        )

    def chat_template(self) -> ChatTemplate | None:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
        ids = {f"{name}_token": self.token_id(key) for name, key in names.items()}
        special_tokens = {name: self.tokens[i] for name, i in ids.items() if i is not None}
        sources = {
            key.removeprefix(_TEMPLATE_KEY).lstrip(".") or "default": source
            for key, source in self._table.items()
            if key == _TEMPLATE_KEY or key.startswith(f"{_TEMPLATE_KEY}.")
        }
        return ChatTemplate(sources, special_tokens) if sources else None


def gguf_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises ModelFileError when it has none or one of an unknown kind."""
    metadata = _Metadata(files.metadata)
    model = metadata.required("model")
    builders = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}
    if model not in builders:
        raise ModelFileError(
            f"the GGUF tokenizer model {model!r} is not supported{nearest(str(model), builders)}. "
            f"Supported: {', '.join(builders)}"
        )
    try:
        backend, adds_bos = builders[model](metadata)
    except ModelFileError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFileError(f"the GGUF tokenizer is damaged: {error}") from error
    special = metadata.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
    user_defined = metadata.ids_of(TokenType.USER_DEFINED)
    backend.add_tokens(
        [
            AddedToken(metadata.tokens[i], special=i in special, normalized=False)
            for i in sorted(special | user_defined)
        ]
    )
    backend.post_processor = metadata.surroundings(adds_bos=adds_bos)
    return Tokenizer(
        backend,
        Vocabulary(
            metadata.tokens,
            byte_level_bytes if model == "gpt2" else sentencepiece_bytes,
            special=special,
            verbatim=special | user_defined,
        ),
        eos_token_ids=files.eos_token_ids,
        bos_token_id=metadata.token_id("bos"),
        strips_leading_space=model == "llama" and metadata.adds_space,
        chat_template=metadata.chat_template(),
    )


def _byte_level_backend(metadata: _Metadata) -> tuple[Backend, bool]:
    """GPT-2's BPE over bytes, and whether it adds a beginning token by default."""
    kind = pre_tokenization(metadata.get("pre", "default"))
    vocab = {text: i for i, text in enumerate(metadata.tokens)}
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in metadata.required("merges"))]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind.ignores_merges))
    backend.pre_tokenizer = kind.build()
    return backend, kind.adds_bos


def _sentencepiece_backend(metadata: _Metadata) -> tuple[Backend, bool]:
    """SentencePiece's BPE, and that it adds a beginning token by default.

    The adjacent pair whose union scores best merges first; characters that are no tokens become bytes.
    """
    vocab = {text: i for i, text in enumerate(metadata.tokens)}
    unknown = metadata.token_id("unknown")
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(metadata.tokens, metadata.required("scores"), metadata.token_types, vocab),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else metadata.tokens[unknown],
        )
    )
    space = normalizers.Replace(" ", "\u2581")
    prefix = [normalizers.Prepend("\u2581")] if metadata.adds_space else []
    backend.normalizer = normalizers.Sequence([*prefix, space])
    return backend, True


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], token_types: Sequence[int], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score of the result first."""
    normal = [i for i, kind in enumerate(token_types) if kind == TokenType.NORMAL and len(tokens[i]) > 1]
    normal.sort(key=lambda i: -scores[i])
    merges = []
    for token_id in normal:
        text = tokens[token_id]
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    return merges
