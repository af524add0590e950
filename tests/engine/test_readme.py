"""The README's examples do what the README says, with the embedded model and a server that is listening."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from served import REAL, served

from lockstep.cli.group import lockstep
from lockstep.cli.main import main

pytestmark = pytest.mark.suite("cpu")

README = Path(__file__).parents[2] / "README.md"
PORT = "30000"
Streams = pytest.CaptureFixture[str]


def blocks(language: str) -> list[str]:
    """The README's blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Arguments of each `$ lockstep` line."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert lines and all(line.startswith("$ lockstep ") for line in lines)
    return [shlex.split(line.removeprefix("$ lockstep "), comments=True) for line in lines]


def execute(source: str) -> None:
    exec(compile(source, str(README), "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("server"), *REAL) as server:
        yield str(server.port)


def test_python_is_greedy_short_and_right(capsys: Streams) -> None:
    conversation, streaming, _ = blocks("python")
    execute(conversation)
    said = capsys.readouterr().out
    assert "Tokyo" in said and len(said) < 800
    assert said.splitlines()[-1] in ("red", "green", "blue")
    execute(streaming)
    assert capsys.readouterr().out.strip()


def test_openai_client(port: str, capsys: Streams) -> None:
    source = blocks("python")[-1]
    assert source.count(PORT) == 1
    execute(source.replace(PORT, port))
    assert capsys.readouterr().out.strip()


def test_the_client_asks_where_serve_listens() -> None:
    from lockstep.config.components import SERVER_OPTIONS

    assert ["serve"] in commands()
    assert SERVER_OPTIONS["port"].default == int(PORT)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_line_is_accepted(arguments: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Parsed, not run: what a command does with its arguments has tests of its own."""
    monkeypatch.chdir(tmp_path)
    Path("colours.json").write_text(blocks("json")[0])
    command: click.Command = lockstep
    context = click.Context(command)
    rest = list(arguments)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, name
        command = found
    command.make_context(command.name, rest)


def test_commands_answer(tmp_path: Path, monkeypatch: Any, capsys: Streams) -> None:
    monkeypatch.chdir(tmp_path)
    Path("colours.json").write_text(blocks("json")[0])
    capital, _, colours, *_ = commands()
    assert main(capital) == 0
    assert "Tokyo" in capsys.readouterr().out
    assert main(colours) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer) == 3 and all(isinstance(colour, str) for colour in answer)
    for arguments in (["explain", "config"], ["ops", "explain"]):
        assert arguments in commands()
        assert main(arguments) == 0
    assert "--page-size" in capsys.readouterr().out


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if not os.path.exists(README.parent / link)] == []
