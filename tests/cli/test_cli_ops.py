"""`lockstep ops`: what is listed, explained and checked, and how it ends."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.bench.ops_sizes import num_bytes
from lockstep.cli.main import main
from lockstep.config import Given
from lockstep.models.loading.sources import StoredWeights
from lockstep.ops import selection, suite
from lockstep.ops.contract import Contract, Kernel, Signature
from lockstep.ops.page import operators_page
from lockstep.ops.registry import contracts, kernels

pytestmark = pytest.mark.suite("cpu")

Streams = pytest.CaptureFixture[str]
PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
QUESTION = ["run", "The capital of France is", "--raw", "--max-tokens", "3", "--json"]


def printed_json(capsys: Streams) -> Any:
    return json.loads(capsys.readouterr().out)


def test_list_is_the_registry(capsys: Streams) -> None:
    assert main(["ops", "list", "--json"]) == 0
    listed = {entry["op"]: entry for entry in printed_json(capsys)}
    assert set(listed) == set(contracts())
    for op, entry in listed.items():
        assert [(each["name"], tuple(each["verified_on"])) for each in entry["kernels"]] == [
            (kernel.provider, kernel.verified_on) for kernel in kernels(op)
        ]


def test_list_as_a_table_says_where_each_kernel_was_verified(
    capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.ops import registry

    norm = contracts()["rms_norm"]
    offered = (
        kernel("seen", platforms=frozenset({"there"}), verified_on=("a board",)),
        kernel("unseen", features=frozenset({"wings"})),
    )
    monkeypatch.setattr(registry, "contracts", lambda: {"rms_norm": norm})
    monkeypatch.setattr(registry, "kernels", lambda op: offered)
    assert main(["ops", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(row[-4:] == ["seen", "there", "a", "board"] for row in rows)
    assert any(row[-5:] == ["unseen", "any", "wings", "nothing", "yet"] for row in rows)


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == operators_page(), "run: python -m lockstep.ops.page > docs/operators.md"
    assert all(f"## {op}\n" in operators_page() for op in contracts())


# -- explain


def binding(op: str, where: str, provider: str, *refused: tuple[str, str]) -> SimpleNamespace:
    found = SimpleNamespace(provider=provider)
    return SimpleNamespace(op=op, where=where, kernel=found, why="first that accepts", refused=refused)


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Given]]:
    """The options that each explanation was asked with; every one has the same three call sites."""
    asked: list[dict[str, Given]] = []

    def explain_bindings(options: dict[str, Given]) -> Iterable[SimpleNamespace]:
        asked.append(options)
        return (
            binding("linear", "layers.0.up", "torch", ("onednn", "needs bfloat16")),
            binding("rope", "layers.0", "torch"),
            binding("linear", "layers.1.up", "torch", ("onednn", "needs bfloat16")),
        )

    module = types.ModuleType("lockstep.engine.bindings")
    module.explain_bindings = explain_bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lockstep.engine.bindings", module)
    return asked


@pytest.mark.usefixtures("explained")
def test_explain_groups_equal_call_sites(capsys: Streams) -> None:
    assert main(["ops", "explain"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.up and 1 more" in out and "onednn: needs bfloat16" in out
    assert main(["ops", "explain", "--json"]) == 0
    groups = printed_json(capsys)
    assert [(group["op"], group["where"]) for group in groups] == [
        ("linear", ["layers.0.up", "layers.1.up"]),
        ("rope", ["layers.0"]),
    ]
    assert groups[0]["refused"] == [{"kernel": "onednn", "reason": "needs bfloat16"}]


def test_explain_takes_model_and_platform_under_both_names(
    explained: list[dict[str, Given]], capsys: Streams
) -> None:
    assert main(["ops", "explain", "m", "--device", "cpu"]) == 0
    assert main(["ops", "explain", "--model", "m", "--platform", "cpu"]) == 0
    assert explained[0] == explained[1]
    assert main(["ops", "explain", "m", "--model", "n"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_explain_of_an_operator_asks_for_a_model(capsys: Streams) -> None:
    assert main(["ops", "explain", "linear"]) == 2
    assert "linear is an operator: all of those that MODEL needs" in capsys.readouterr().err


def test_explain_says_what_a_run_binds_without_reading_a_weight(
    capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the bindings of an engine that did load the model."""
    from lockstep.engine.llm import LLM

    with LLM(device="cpu", max_total_tokens=512, context_length=64) as llm:
        bound = {(each.op, each.where): (each.kernel.provider, each.why) for each in llm.kernel_report()}

    def load(*arguments: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(StoredWeights, "load", load)
    assert main(["ops", "explain", "--platform", "cpu", "--context-length", "64", "--json"]) == 0
    groups = printed_json(capsys)
    said = {(each["op"], where): (each["kernel"], each["why"]) for each in groups for where in each["where"]}
    assert said == bound and len(said) > 100


def with_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that the cpu prefers, in the place of the real one."""
    picky = kernel("native", platforms=frozenset({"cpu"}), refuses=lambda signature: "not today")
    monkeypatch.setattr(
        selection,
        "kernels",
        lambda op: (
            (*(k for k in kernels(op) if not k.provider.startswith("native")), picky)
            if op == "rms_norm"
            else kernels(op)
        ),
    )


def test_explain_shows_refusals_and_strict_refuses_them(
    capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_kernel_that_refuses(monkeypatch)
    assert main(["ops", "explain", "--platform", "cpu", "--dtype", "float32", "--json"]) == 0
    norm = next(group for group in printed_json(capsys) if group["op"] == "rms_norm")
    assert norm["kernel"] == "torch" and norm["refused"][0] == {"kernel": "native", "reason": "not today"}
    # Native products take no float32.
    strict = ["--strict-kernels", "--force-kernel", "linear=onednn"]
    assert main(["ops", "explain", "--platform", "cpu", "--dtype", "float32", *strict]) == 2
    assert "--strict-kernels: rms_norm.native refuses" in capsys.readouterr().err


def test_explain_refuses_unknown_names(capsys: Streams) -> None:
    assert main(["ops", "explain", "--platform", "cupu"]) == 2
    assert "did you mean 'cpu'?" in capsys.readouterr().err
    assert main(["ops", "explain", "--platform", "cpu", "--force-kernel", "rms_nrom=torch"]) == 2
    assert "did you mean 'rms_norm'?" in capsys.readouterr().err


# -- forcing kernels, to find the operator that is wrong


def counted_references(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of each operator's reference as a kernel."""
    calls: dict[str, int] = {}

    def counting(kernel: Kernel) -> Kernel:
        def call(*arguments: Any) -> Any:
            calls[kernel.op] = calls.get(kernel.op, 0) + 1
            return kernel.function(*arguments)

        return replace(kernel, function=call) if kernel.provider == "reference" else kernel

    offered = {op: tuple(map(counting, kernels(op))) for op in contracts()}
    monkeypatch.setattr(selection, "kernels", lambda op: offered[op])
    return calls


def answered(capsys: Streams, *options: str) -> list[int]:
    small = ("--dtype", "float32", "--max-total-tokens", "512", "--context-length", "64")
    assert main([*QUESTION, "--device", "cpu", *small, *options]) == 0
    return list(printed_json(capsys)["token_ids"])


def test_forced_kernels_run_and_answer_alike(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_references(monkeypatch)
    expected = answered(capsys)
    assert not calls and len(expected) == 3
    assert answered(capsys, "--force-kernel", "rms_norm=reference") == expected
    assert set(calls) == {"rms_norm"}
    calls.clear()
    assert answered(capsys, "--force-kernel", "*=reference") == expected
    assert set(calls) >= {"rms_norm", "add_rms_norm", "linear", "rope", "kv_store", "silu_and_mul"}


SMALL = ("--device", "cpu", "--max-total-tokens", "512", "--context-length", "64")


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_every_operator_of_the_default_model_can_be_forced(provider: str, capsys: Streams) -> None:
    """In the model's own dtype, where one kernel computes the whole decoder unless something is forced."""
    assert main([*QUESTION, *SMALL, "--force-kernel", f"*={provider}"]) == 0
    assert " Paris" in printed_json(capsys)["text"]


def test_a_forced_kernel_serves_the_default_model_in_the_place_of_the_whole_decoder(
    capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong kernel must change the answer, or whoever looks for one by bisection is told lies."""
    wrong = kernel("mine", function=lambda x, weight, eps: -exact(x, weight, eps))
    monkeypatch.setattr(
        selection, "kernels", lambda op: (*kernels(op), wrong) if op == "rms_norm" else kernels(op)
    )
    assert main([*QUESTION, *SMALL, "--force-kernel", "add_rms_norm=torch"]) == 0
    right = printed_json(capsys)["token_ids"]
    assert main([*QUESTION, *SMALL, "--force-kernel", "rms_norm=mine"]) == 0
    assert printed_json(capsys)["token_ids"] != right
    assert main(["ops", "explain", *SMALL, "--force-kernel", "rms_norm=mine", "--json"]) == 0
    groups = {group["op"]: group for group in printed_json(capsys)}
    assert groups["rms_norm"]["kernel"] == "mine" and groups["decoder_forward"]["kernel"] == "parts"
    reasons = {each["kernel"]: each["reason"] for each in groups["decoder_forward"]["refused"]}
    assert reasons["native"] == "--force-kernel rms_norm=mine asks for the parts"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attention-backend", "natve"], "unknown attention backend 'natve'; did you mean 'native'?"),
        (
            ["--force-kernel", "moe_align=torch"],
            "moe_align=torch would change nothing: this model has no call of",
        ),
        (
            ["--force-kernel", "linear=torch"],
            "linear=torch would change nothing: this model has no call of linear",
        ),
        (
            ["--force-kernel", "rms_norm=torch", "--force-kernel", "rms_norm=native"],
            "--force-kernel asks for rms_norm=torch and for rms_norm=native; give one of them",
        ),
        (
            ["--force-kernel", "decoder_forward=native", "--force-kernel", "rms_norm=torch"],
            "decoder_forward=native cannot serve all blocks: --force-kernel rms_norm=torch asks for the parts",
        ),
        (
            ["--force-kernel", "decoder_forward=native", "--attention-backend", "torch"],
            "decoder_forward=native cannot serve all blocks: --attention-backend torch asks for",
        ),
    ],
)
@pytest.mark.parametrize("command", [["run", "x"], ["ops", "explain"]])
def test_choices_that_cannot_be_followed_are_errors(
    command: list[str], options: list[str], says: str, capsys: Streams
) -> None:
    assert main([*command, *SMALL, *options]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out


def test_a_named_attention_backend_serves_the_default_model(capsys: Streams) -> None:
    assert main(["ops", "explain", *SMALL, "--attention-backend", "torch", "--json"]) == 0
    groups = {group["op"]: group for group in printed_json(capsys)}
    assert groups["decoder_forward"]["kernel"] == "parts"
    assert {groups[op]["kernel"] for op in ("attention_decode", "attention_extend")} == {"torch"}


def test_explain_says_what_the_kernel_of_the_whole_decoder_covers(capsys: Streams) -> None:
    assert main(["ops", "explain", *SMALL, "--json"]) == 0
    groups = {group["op"]: group for group in printed_json(capsys)}
    inside = {op for op, group in groups.items() if group["why"] == "inside decoder_forward.native"}
    assert inside == set(groups) - {"decoder_forward", "argmax", "top_k_top_p_sample", "copy_words"}
    assert inside >= {"rms_norm", "kv_store", "attention_decode", "attention_extend"}
    assert {groups[op]["kernel"] for op in inside} == {"decoder_forward.native"}


def test_the_default_model_needs_no_fallback(capsys: Streams) -> None:
    assert main(["ops", "explain", *SMALL, "--strict-kernels", "--json"]) == 0
    (argmax,) = (group for group in printed_json(capsys) if group["op"] == "argmax")
    assert argmax["kernel"] == "numpy" and len(argmax["where"]) == 2


def test_explain_gives_every_other_kernel_a_reason(capsys: Streams) -> None:
    assert main(["ops", "explain", *SMALL, "--dtype", "float32", "--json"]) == 0
    groups = [group for group in printed_json(capsys) if not group["kernel"].startswith("parts")]
    for group in groups:
        told = {each["kernel"] for each in group["refused"]}
        assert told == {kernel.provider for kernel in kernels(group["op"])} - {group["kernel"]}
        is_first = group["why"] == "first in this platform's preference"
        assert is_first == (group["kernel"] == "native") or group["why"] == "first that accepts"
    norm = next(group for group in groups if group["op"] == "rms_norm")
    assert {"kernel": "triton", "reason": "made for cuda, musa, rocm, not cpu"} in norm["refused"]
    assert main(["ops", "explain", *SMALL, "--dtype", "float32"]) == 0
    assert "reference, torch: native is bound" in " ".join(capsys.readouterr().out.split())


def test_a_forced_kernel_whose_needs_are_unmet_says_which(capsys: Streams) -> None:
    assert main([*QUESTION, "--device", "cpu", "--force-kernel", "rms_norm=triton"]) == 2
    err = capsys.readouterr().err
    assert "rms_norm=triton cannot serve" in err and "made for cuda, musa, rocm, not cpu" in err


# -- check


def kernel(provider: str, **fields: Any) -> Kernel:
    return Kernel(**{"op": "rms_norm", "provider": provider, "function": exact, **fields})


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rms_norm(x.double(), x.shape[-1:], weight.double(), eps).to(x.dtype)


def offer(monkeypatch: pytest.MonkeyPatch, *offered: Kernel, contract: Contract | None = None) -> None:
    """Makes these the only kernels of the only operator, rms_norm."""
    only = {"rms_norm": contract or contracts()["rms_norm"]}
    monkeypatch.setattr(suite, "contracts", lambda: only)
    monkeypatch.setattr(suite, "kernels", lambda op: offered)


def test_check_reports_cases_errors_and_mutants(capsys: Streams) -> None:
    assert main(["ops", "check", "--platform", "cpu", "--op", "rms_norm", "--seed", "3", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert (found["platform"], found["seed"], found["passed"]) == ("cpu", 3, True)
    (operator,) = found["operators"]
    norm = contracts()["rms_norm"]
    assert operator["mutants"] == {"total": len(norm.mutants), "rejected": len(norm.mutants), "accepted": []}
    ran = {each["name"]: each for each in operator["kernels"]}
    assert set(ran) >= {"reference", "torch"}
    assert ran["reference"]["cases"] == len(list(norm.cases()))
    assert all(0.03 < each["worst_share"] <= 1 and not each["failures"] for each in ran.values())
    assert {"kernel": "triton", "reason": "made for cuda, musa, rocm, not cpu"} in operator["not_run"]
    assert main(["ops", "check", "--platform", "cpu", "--op", "rms_norm", "--seed", "3", "--json"]) == 0
    assert capsys.readouterr().out == text


def test_check_takes_several_operators_and_says_how_far_it_is(capsys: Streams) -> None:
    """Without a terminal too: a line for each operator, apart from the result."""
    two = ["rms_norm", "--op", "kv_store", "--op", "rms_norm", "--kernel", "torch"]
    assert main(["ops", "check", "--platform", "cpu", *two, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [each["op"] for each in json.loads(out)["operators"]] == ["rms_norm", "kv_store"]
    assert err.splitlines() == ["1 of 2: rms_norm passed", "2 of 2: kv_store passed"]


def test_check_in_several_processes_says_the_same(capsys: Streams) -> None:
    three = ["rms_norm", "argmax", "rope", "--kernel", "torch", "--seed", "3", "--json"]
    for jobs in ("1", "2"):
        assert main(["ops", "check", "--platform", "cpu", *three, "--jobs", jobs]) == 0
    out, err = capsys.readouterr()
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    assert sorted(line.partition(": ")[2] for line in err.splitlines()[3:]) == [
        "argmax passed",
        "rms_norm passed",
        "rope passed",
    ]


def die(*given: Any) -> None:
    """As a kernel does that kills its process."""
    os._exit(1)


def test_a_process_that_dies_ends_the_check(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_check_by_name", die)
    assert main(["ops", "check", "--platform", "cpu", "rms_norm", "rope", "--jobs", "2"]) == 2
    out, err = capsys.readouterr()
    assert "a process that checked an operator died; without --jobs" in err and not out


def test_lines_of_progress_are_there_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator's check prints reaches stderr before the next check begins."""
    said: list[str] = []
    before: list[list[str]] = []

    def check(selected: suite.Selected, *given: Any) -> suite.OperatorReport:
        before.append(list(said))
        return suite.OperatorReport(selected.contract.name, (), (), 0, ())

    monkeypatch.setattr(suite, "check", check)
    monkeypatch.setattr("lockstep.cli.ops.note", said.append)
    main(["ops", "check", "--platform", "cpu", "--op", "rope", "--op", "linear"])
    assert before == [[], ["1 of 2: rope passed"]]


@pytest.mark.parametrize(
    "command", [["check"], ["bench", "rms_norm"], ["explain"]], ids=lambda command: command[0]
)
def test_a_platform_that_is_not_here_is_named_as_it_was_given(command: list[str], capsys: Streams) -> None:
    assert main(["ops", *command, "--platform", "musa"]) == 2
    assert "--platform musa cannot be used: the package torch_musa" in capsys.readouterr().err


def test_check_draws_fresh_inputs_and_says_how_to_draw_them_again(capsys: Streams) -> None:
    seeds = set()
    for _ in range(2):
        assert main(["ops", "check", "--platform", "cpu", "--op", "rms_norm", "--kernel", "torch"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("passed on cpu")
        seeds.add(int(last.rpartition("--seed ")[2]))
    assert len(seeds) == 2


def test_check_fails_on_a_wrong_kernel(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = kernel("wrong", function=lambda x, weight, eps: exact(x, weight, eps) * 1.01)
    offer(monkeypatch, kernel("right"), wrong)
    assert main(["ops", "check", "--platform", "cpu"]) == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    ended = {row[-4]: row[-1] for row in rows if row and row[-1] in ("passed", "failed")}
    assert ended == {"right": "passed", "wrong": "failed"}
    assert "rms_norm.wrong: " in out and "times what is accepted" in out and "more (--json has them all)" in out
    assert "failed on cpu" in out
    assert main(["ops", "check", "--platform", "cpu", "--json"]) == 1
    (operator,) = printed_json(capsys)["operators"]
    assert [each["passed"] for each in operator["kernels"]] == [True, False]


def test_check_fails_on_a_mutant_that_passes(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = contracts()["rms_norm"]
    blind = replace(norm, mutants={"nothing wrong": norm.reference, **norm.mutants})
    offer(monkeypatch, kernel("right"), contract=blind)
    assert main(["ops", "check", "--platform", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"{len(norm.mutants)} of {len(norm.mutants) + 1}" in out
    assert "rms_norm: not rejected: nothing wrong (torch.float32)" in out


def never(signature: Signature) -> str | None:
    return "never today"


def test_check_fails_when_nothing_ran(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, kernel("winged", features=frozenset({"wings"})), kernel("lazy", refuses=never))
    assert main(["ops", "check", "--platform", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "not run: the device lacks wings" in out and "not run: never today" in out
    assert out.splitlines()[-1].startswith("nothing ran on cpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rms_nrom"], "unknown operator 'rms_nrom'; did you mean 'rms_norm'?"),
        (["--op", "rms_nrom"], "unknown operator 'rms_nrom'; did you mean 'rms_norm'?"),
        (["--kernel", "tritn"], "no kernel of any operator is called 'tritn'; did you mean 'triton'?"),
        (["--op", "rms_norm", "--kernel", "onednn"], "no kernel of operator 'rms_norm' is called 'onednn'"),
        (["--op", "rms_norm", "--kernel", "triton"], "rms_norm: made for cuda, musa, rocm, not cpu"),
        (["--platform", "cuba"], "unknown device 'cuba'; did you mean 'cuda'?"),
        (["--platform", "null"], "platform null computes no values"),
    ],
)
def test_check_refuses_what_cannot_be(arguments: list[str], says: str, capsys: Streams) -> None:
    assert (
        main(["ops", "check", *([] if "--platform" in arguments else ["--platform", "cpu"]), *arguments]) == 2
    )
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out


def test_a_kernel_asked_for_by_name_says_every_need(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, kernel("winged", features=frozenset({"wings", "gills"})))
    assert main(["ops", "check", "--platform", "cpu", "--kernel", "winged"]) == 2
    assert "cannot run on cpu: rms_norm: the device lacks gills, wings" in capsys.readouterr().err


# -- bench


def test_bench_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    module = types.ModuleType("lockstep.bench.ops")
    module.main = lambda op, **options: calls.append((op, options)) or 1  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "lockstep.bench.ops", module)
    assert main(["ops", "bench", "rope"]) == 1
    given = ["--providers", "torch, triton", "--sizes", "1,16", "--platform", "cpu", "--plot", "p.png"]
    assert main(["ops", "bench", "rope", *given, "--seed", "5"]) == 1
    plain = {
        "providers": None,
        "sizes": None,
        "platform": "auto",
        "seed": 0,
        "json_out": None,
        "plot_out": None,
    }
    for _, options in calls:
        options.pop("on_size")(16)
    assert capsys.readouterr().err == "rope at 16\n" * 2
    assert calls[0] == ("rope", plain)
    asked = {"providers": ("torch", "triton"), "sizes": (1, 16), "platform": "cpu", "seed": 5}
    assert calls[1] == ("rope", {**plain, **asked, "plot_out": Path("p.png")})
    for sizes in ("0", "", "1,x", "-4"):
        assert main(["ops", "bench", "rope", f"--sizes={sizes}"]) == 2
        assert "--sizes takes positive integers" in capsys.readouterr().err
    assert main(["ops", "bench", "rope", "--providers", ","]) == 2
    assert "--providers names none" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_bench_looks_at_its_paths_before_it_measures(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    module = types.ModuleType("lockstep.bench.ops")
    module.main = lambda *given, **options: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lockstep.bench.ops", module)
    assert main(["ops", "bench", "rope", option, str(tmp_path / "nowhere" / "out")]) == 2
    assert (
        f"{option} {tmp_path}/nowhere/out cannot be written: there is no directory" in capsys.readouterr().err
    )
    assert main(["ops", "bench", "rope", option, str(tmp_path / "out")]) == 0
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["ops", "bench", "rope", option, str(tmp_path / "out")]) == 2
    assert "permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["rms_norm", "linear", "attention_decode", "moe_topk_sigmoid"])
def test_bench_refuses_sizes_that_fit_no_memory(op: str, capsys: Streams) -> None:
    assert main(["ops", "bench", op, "--platform", "cpu", "--sizes", f"1,{10**13}"]) == 2
    out, err = capsys.readouterr()
    assert f"--sizes {10**13}: the arguments of one call are " in err and err.count("\n") == 1 and not out


def test_what_a_call_takes_is_known_without_making_it() -> None:
    """Against the arguments themselves."""
    for op in ("rms_norm", "kv_store", "moe_topk_sigmoid"):
        workload = contracts()[op].workload
        assert workload is not None
        case = workload.case(min(workload.sizes))
        made = case.make(torch.Generator().manual_seed(1))
        assert num_bytes(case) == sum(each.nbytes for each in made if isinstance(each, torch.Tensor))
