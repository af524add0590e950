"""A tokenizer from the tokenizer.json and tokenizer_config.json of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from lockstep.core.errors import ModelFileError
from lockstep.tokenizer.chat_template import DEFAULT, ChatTemplate
from lockstep.tokenizer.tokenizer import Tokenizer
from lockstep.tokenizer.vocabulary import Vocabulary, byte_level_bytes, sentencepiece_bytes

if TYPE_CHECKING:
    from lockstep.formats import ModelFiles


def huggingface_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a directory. Raises ModelFileError when it is missing, broken or of an unknown kind.

    Which tokens surround a text is decided by tokenizer.json alone, as in transformers: the flags
    `add_bos_token` and `add_eos_token` of tokenizer_config.json are remarks about it.
    """
    directory = Path(files.path)
    backend = _read_backend(directory)
    config = _read_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
    decoder = _Decoder.read(backend)
    bos, eos = (backend.token_to_id(special_tokens.get(name, "")) for name in ("bos_token", "eos_token"))
    added = backend.get_added_tokens_decoder()
    return Tokenizer(
        backend,
        Vocabulary(
            _texts(backend),
            decoder.spelling,
            special=frozenset(i for i, token in added.items() if token.special),
            verbatim=frozenset(added) if decoder.spelling is byte_level_bytes else frozenset(),
        ),
        eos_token_ids=tuple(dict.fromkeys([*files.eos_token_ids, *([] if eos is None else [eos])])),
        bos_token_id=files.bos_token_id if bos is None else bos,
        strips_leading_space=decoder.strips_leading_space,
        chat_template=_chat_template(directory, config, special_tokens),
    )


def _read_backend(directory: Path) -> Backend:
    path = directory / "tokenizer.json"
    if not path.is_file():
        found = "only tokenizer.model" if (directory / "tokenizer.model").is_file() else "no tokenizer"
        raise ModelFileError(f"{directory} has {found}; tokenizer.json is needed, fetch it with the model")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFileError(f"{path} is damaged or too new for the tokenizers library: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return table


def _special_tokens(table: Mapping[str, Any]) -> dict[str, str]:
    """Entries such as "bos_token": "<s>", some of which are written {"content": "<s>", ...}."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in table.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _texts(backend: Backend) -> list[str]:
    vocab = backend.get_vocab(with_added_tokens=True)
    texts = [""] * (max(vocab.values(), default=-1) + 1)
    for text, token_id in vocab.items():
        texts[token_id] = text
    return texts


@dataclass(frozen=True, slots=True)
class _Decoder:
    """What the decoder of a tokenizer.json says about the spelling of its tokens."""

    spelling: Callable[[str], bytes]
    strips_leading_space: bool

    @classmethod
    def read(cls, backend: Backend) -> _Decoder:
        steps = list(_decoder_steps(json.loads(backend.to_str()).get("decoder")))
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level_bytes, strips_leading_space=False)
        if kinds and all(_is_sentencepiece(step) for step in steps):
            return cls(sentencepiece_bytes, strips_leading_space=any(_strips(step) for step in steps))
        raise ModelFileError(
            f"tokenizer.json has the decoder {' + '.join(kinds) or 'none'}, which is not supported; "
            "supported are byte-level BPE and SentencePiece BPE"
        )


def _decoder_steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoder_steps(step)
    else:
        yield decoder


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": "\u2581"} and step["content"] == " "
    return step["type"] in ("ByteFallback", "Fuse", "Strip", "Metaspace")


def _strips(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step["content"] == " " and step["start"] > 0


def _chat_template(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """chat_template.jinja if it is there, else the entry of tokenizer_config.json: one text, or named ones."""
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not source:
        return None
    if isinstance(source, str):
        return ChatTemplate({DEFAULT: source}, special_tokens)
    try:
        return ChatTemplate({entry["name"]: entry["template"] for entry in source}, special_tokens)
    except (TypeError, KeyError) as error:
        raise ModelFileError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be a text or a list of named templates"
        ) from error
