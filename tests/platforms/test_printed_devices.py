"""Printed graphs that name the simulated device, run where nobody has opened its platform."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.platforms import printed_devices
from lockstep.platforms.printed_devices import TORCHS_LINE, make_printed_devices_importable, printed_imports

pytestmark = pytest.mark.suite("cpu")

REGISTER = torch.fx.graph._register_custom_builtin


@pytest.fixture
def without_help(sim: torch.device) -> Iterator[None]:
    """Printing as torch does it alone."""
    REGISTER("device", TORCHS_LINE, torch.device)
    yield
    REGISTER("device", TORCHS_LINE, torch.device)
    make_printed_devices_importable()


def printed(directory: Path) -> dict[str, str]:
    """A graph that makes a tensor on the device, written in both of torch's ways; the text that reads each."""
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ones, (3,), {"device": torch.device("sim", 0)}))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert "device(type='sim', index=0)" in module.code
    module.to_folder(directory / "written")
    (directory / "pickled").write_bytes(pickle.dumps(module))
    return {
        "folder": f"import sys; sys.path.insert(0, {str(directory)!r}); import written; print(written.FxModule()())",
        "pickle": f"import pickle; print(pickle.load(open({str(directory / 'pickled')!r}, 'rb'))())",
    }


def runs(text: str, fresh: Any) -> subprocess.CompletedProcess[str]:
    return fresh(f"import torch\n{text}")


@pytest.mark.parametrize("way", ["folder", "pickle"])
def test_a_printed_graph_opens_the_platform_it_names(
    way: str, sim: torch.device, tmp_path: Path, fresh: Any
) -> None:
    done = runs(printed(tmp_path)[way], fresh)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tensor([1., 1., 1.], device='sim:0')"


@pytest.mark.parametrize("way", ["folder", "pickle"])
@pytest.mark.usefixtures("without_help")
def test_help_is_given_exactly_where_the_torch_in_use_needs_it(way: str, tmp_path: Path, fresh: Any) -> None:
    """The fault itself, in a fresh process: once torch prints something that runs there, no help may be given."""
    torch_alone_fails = runs(printed(tmp_path)[way], fresh).returncode != 0
    make_printed_devices_importable()
    helped = printed_devices.OUR_LINE in printed_imports()
    assert helped == torch_alone_fails


@pytest.mark.usefixtures("without_help")
def test_help_stays_away_where_torch_prints_another_line() -> None:
    REGISTER("device", "from torch.future import device", torch.device)
    make_printed_devices_importable()
    assert "from torch.future import device" in printed_imports()


def test_graphs_still_run_and_print_here(sim: torch.device) -> None:
    make_printed_devices_importable()
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ones, (2,), {"device": torch.device("cpu")}))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert module().tolist() == pickle.loads(pickle.dumps(module))().tolist() == [1.0, 1.0]
    assert "device(type='cpu')" in module.code


def test_a_printed_device_is_torchs_own(sim: torch.device) -> None:
    assert printed_devices.device(type="sim", index=0) == torch.device("sim", 0)
    assert printed_devices.device(type="cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no platform has devices of type 'musaa'; did you mean 'musa'"):
        printed_devices.device(type="musaa")
