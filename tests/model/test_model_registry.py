"""Which classes of the model files count as architectures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lockstep.models.llm import llama
from lockstep.models.registry import model_classes

pytestmark = pytest.mark.suite("cpu")


class Alias:
    """Passes for a type and is none, as `list[int]` does on Python 3.10."""

    architectures = ("Alias",)
    __class__ = type  # type: ignore[assignment]


@pytest.fixture
def scanned_anew() -> Iterator[None]:
    model_classes.cache_clear()
    yield
    model_classes.cache_clear()


def test_what_only_passes_for_a_class_is_passed_over(
    scanned_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dict(model_classes())
    model_classes.cache_clear()
    alias = Alias()
    assert isinstance(alias, type)
    with pytest.raises(TypeError):
        issubclass(alias, object)
    monkeypatch.setattr(llama, "ALIAS", alias, raising=False)
    monkeypatch.setattr(llama, "GENERIC", list[int], raising=False)
    assert model_classes() == expected
    assert expected["LlamaForCausalLM"] is llama.LlamaModel
