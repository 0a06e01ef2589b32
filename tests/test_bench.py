# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The benchmark without a GPU: options, lines, comparison, figures, and runs with PyTorch in place of kernels."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4_router
from dsv4_router import RouterConfig, api, cli, reference
from dsv4_router.backends import cublas
from dsv4_router.logits_config import logits_configs
from dsv4_router.profiling import bench, cases, neighbours, peers, providers, report, splits, timing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results" / "h100.jsonl"
TINY = RouterConfig(128, 16, 6, 1.5, num_layers=2, num_hash_layers=1, vocab_size=50, name="tiny")
NO_HASH = RouterConfig(64, 32, 6, 2.5, name="no hash layers")


def exit_code(*arguments: object) -> int:
    """Runs the command in this process."""
    try:
        bench.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


# Options


def test_options_default_to_everything() -> None:
    options = bench.parser().parse_args([])
    assert (options.only, options.shapes, options.modes) == (cases.BENCHES, tuple(cases.SHAPES), cases.MODES)
    assert (options.tokens, options.quick, options.out, options.plots, options.compare) == (
        None,
        False,
        None,
        None,
        None,
    )
    assert options.tolerance == 0.05


def test_options_are_lists_with_commas() -> None:
    given = ["--only", "dense,topk", "--shapes", "v4-pro", "--modes", "chain,eager", "--tokens", "1,64"]
    options = bench.parser().parse_args([*given, "--tolerance", "0.1", "--quick"])
    assert options.only == ("dense", "topk")
    assert options.shapes == ("v4-pro",)
    assert options.modes == ("chain", "eager")
    assert options.tokens == (1, 64)
    assert options.tolerance == 0.1
    assert options.quick


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "dense,fast"], "expected some of topk, hash, dense"),
        (["--shapes", "v5"], "expected some of v4-pro"),
        (["--modes", ""], "expected some of isolated"),
        (["--tokens", "1,x"], "argument --tokens: expected a number of at least 1"),
        (["--tokens", "0"], "argument --tokens: expected a number of at least 1"),
        (["--tolerance", "-0.1"], "a share of at least 0"),
        (["--tolerance", "nan"], "a share of at least 0"),
    ],
)
def test_wrong_options_are_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*given) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code() == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_command_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[object] = []
    monkeypatch.setattr(bench, "main", lambda arguments, program: given.append((list(arguments), program)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--quick", "--tokens", "1,2", "--help"])
    assert not stopped.value.code
    assert given == [(["--quick", "--tokens", "1,2", "--help"], "dsv4-router bench")]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", ["bench", "plots", "splits"])
def test_scripts_run_as_files(script: str) -> None:
    command = [sys.executable, str(ROOT / "profiling" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_splits_forces_each_kernel_and_number_of_parts() -> None:
    configs = logits_configs(7168, 384, "sm_90a")
    numbers = {"pairs": 8, "quarters": 4, "halves": 2, "whole": 1}
    found = splits.ways(range(2))
    assert found == [splits.Way(kernel, parts) for kernel in (0, 1) for parts in numbers]
    for way in found:
        assert way.choose(configs, 2049, 132, 128) == (configs[way.kernel], numbers[way.parts], 2049)


# Which cases


def session(**fields: Any) -> cases.Session:
    return cases.Session(types.SimpleNamespace(lines=[]), [], print, **fields)  # type: ignore[arg-type]


def cells(**fields: Any) -> list[tuple[str, str, str, int]]:
    chosen = cases.Selection(**fields)
    return [(c.bench, c.shape, c.mode, c.num_tokens) for c in cases.all_cases(session(), chosen)]


def test_everything_covers_what_the_figures_are_made_of() -> None:
    found = cells()
    assert len(set(found)) == len(found)
    for shape in ("v4-pro", "v4-flash", "v4.1-flash"):
        for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            assert {("dense", shape, "isolated", n), ("dense", shape, "chain", n)} <= set(found)
        for n in (256, 512, 1024, 2048, 4096, 16384):
            assert {("dense", shape, "isolated", n), ("batch_invariant", shape, "isolated", n)} <= set(found)
        assert ("dense", shape, "eager", 1) in found
    assert {case[1] for case in found if case[0] == "hash"} == {"v4-pro", "v4-flash"}
    assert {case[1] for case in found if case[0] == "topk"} == {"E256", "E384"}
    assert {case[0] for case in found} == set(cases.BENCHES)


def test_quick_is_decode_in_graphs() -> None:
    found = cells(quick=True)
    assert {(bench_name, mode) for bench_name, _, mode, _ in found} == {("dense", "isolated")}
    assert sorted({case[3] for case in found}) == list(cases.DECODE_TOKENS)


def test_selection() -> None:
    found = cells(benches=("dense", "topk"), shapes=("v4-flash",), modes=("isolated",), tokens=(5, 7))
    expected = [("topk", "E256", "isolated", 5), ("topk", "E256", "isolated", 7)]
    assert found == [*expected, ("dense", "v4-flash", "isolated", 5), ("dense", "v4-flash", "isolated", 7)]


# Peers


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ("vllm_router_peer", "vllm", "sglang", "flashinfer", "tile_kernels", "deep_gemm")
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    assert peers.find_peers(said.append) == []
    assert [text.split()[2] for text in said] == list(peers.FINDERS)
    assert all(text.startswith("missing provider: ") for text in said)


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if sys.modules.get(path) is None:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    vars(sys.modules[name]).update(functions)


def plain_topk(values: torch.Tensor, bias: torch.Tensor, scaling: float) -> providers.Outputs:
    scores = torch.nn.functional.softplus(values).sqrt()
    ids = (scores + bias).topk(peers.TOP_K, dim=-1).indices
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(dim=-1, keepdim=True) * scaling, ids.int()


def plain_logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
    return hidden_states.float() @ gate_weight.float().T


def add_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer's entry points under their names, with the arguments that they take, in plain PyTorch."""
    for name in ("vllm_router_peer", "vllm", "sglang", "flashinfer", "tile_kernels", "deep_gemm"):
        monkeypatch.setitem(sys.modules, name, None)

    def sglang(values: torch.Tensor, bias: torch.Tensor, topk: int, **options: Any) -> providers.Outputs:
        assert (topk, options["scoring_func"], options["renormalize"]) == (6, "sqrtsoftplus", True)
        assert options["apply_routed_scaling_factor_on_output"]
        return plain_topk(values, bias, options["routed_scaling_factor"])

    def tile_kernels(values: torch.Tensor, bias: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert rest[-1] == "sqrtsoftplus"
        weights, ids = plain_topk(values, bias, rest[5])
        return ids.long(), weights

    def vllm(values: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, scaling: float) -> providers.Outputs:
        assert dtype is torch.int32
        return plain_topk(values, bias, scaling)

    layers = "vllm.model_executor"
    fake_module(monkeypatch, f"{layers}.kernels.linear.cute_dsl.ll_bf16", ll_bf16_gemm=plain_logits)
    fake_module(monkeypatch, f"{layers}.layers.fused_moe.router.dsv4_topk", dsv4_topk=vllm)
    fake_module(monkeypatch, "sglang.jit_kernel.moe_fused_gate", moe_fused_gate=sglang)
    fake_module(monkeypatch, "tile_kernels.moe", top2_sum_gate=tile_kernels)
    fake_module(monkeypatch, "deep_gemm", bf16_gemm_nt=lambda x, w, out: out.copy_(plain_logits(x, w)))


def test_installed_peers_are_picked_up(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    add_peers(monkeypatch)
    monkeypatch.setattr(peers, "cublas_logits", plain_logits)
    monkeypatch.setattr(cublas, "activation_topk", write_topk)
    said: list[str] = []
    found = peers.find_peers(said.append)
    assert [peer.provider for peer in found] == ["vllm", "sglang", "tile_kernels", "deep_gemm + activation_topk"]
    assert len(said) == 1
    assert "flashinfer" in said[0]
    hidden_states = torch.randn(17, 64, generator=generator).bfloat16()
    gate_weight = torch.randn(16, 64, generator=generator).bfloat16()
    bias = torch.randn(16, generator=generator)
    expected = plain_topk(plain_logits(hidden_states, gate_weight), bias, 2.5)
    for peer in found:
        weights, ids = peer.route(hidden_states, gate_weight, bias, 2.5)
        assert torch.equal(ids.long(), expected[1].long())
        torch.testing.assert_close(weights, expected[0])


def test_the_module_of_the_peer_comes_before_an_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    add_peers(monkeypatch)
    marker = object()
    fake_module(monkeypatch, "vllm_router_peer", logits=marker, dsv4_topk=plain_topk)
    found = peers.find_peers(lambda text: None)[0]
    assert (found.logits, found.version) == (marker, "not stated")
    fake_module(monkeypatch, "vllm_router_peer", __version__="0.1.2")
    assert peers.find_peers(lambda text: None)[0].version == "0.1.2"


def test_a_peer_without_its_own_needs_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The import error of something that the module needs is not taken for the module's absence."""
    monkeypatch.delitem(sys.modules, "vllm_router_peer", raising=False)
    (tmp_path / "vllm_router_peer.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said: list[str] = []
    assert "vllm" not in [peer.name for peer in peers.find_peers(said.append)]
    assert "a_module_that_nobody_has" in said[0]


# A whole run, with PyTorch in place of kernels and of timing


def write_topk(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, scaling: float, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    selection = reference.scores(logits) + bias
    chosen = reference.order(selection)[:, :top_k]
    ids.copy_(chosen)
    weights.copy_(reference.normalize(reference.scores(logits).gather(1, chosen), scaling))


def plain_norm(hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    scale = (hidden_states.float().square().mean(dim=-1, keepdim=True) + neighbours.EPSILON).rsqrt()
    out.copy_(hidden_states.float() * scale * weight.float())


def plain_count(weights: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor) -> None:
    if ids.dtype is not torch.int32:
        raise ValueError("expected int32 ids")
    counts.zero_()
    sums.zero_()
    for token, (row, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row, row_weights, strict=True):
            counts[token // neighbours.TOKENS_PER_BLOCK, expert] += 1
            sums[token // neighbours.TOKENS_PER_BLOCK, expert] += weight


def fake_graphs(calls: Mapping[str, Sequence[Callable[[], object]]], num_tokens: int) -> dict[str, timing.Sample]:
    """Runs every call, and says that the providers take 10, 20, 30 ... microseconds, in their order."""
    for of_graph in calls.values():
        for call in of_graph:
            call()
    return {name: timing.Sample(10.0 * (i + 1), 10.0 * i + 9, 10.0 * i + 12) for i, name in enumerate(calls)}


def fake_eager(calls: Mapping[str, Callable[[], object]]) -> dict[str, timing.EagerSample]:
    whole, host = timing.Sample(8.0, 7.0, 9.0), timing.Sample(6.0, 5.0, 7.0)
    return {name: timing.EagerSample(whole, host) for name in calls}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that passes for one with an H100 and every peer."""
    add_peers(monkeypatch)
    routed = api.dense_router_dispatch

    def dense(*arguments: Any, backend: str = "auto", batch_invariant: bool = False) -> providers.Outputs:
        assert backend in ("auto", "decode", "cublas")
        return routed(*arguments, backend="reference", batch_invariant=batch_invariant)

    shapes = {"v4-pro": TINY, "v4-flash": NO_HASH}
    for target, name, value in [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3"),
        (torch, "compile", lambda function, **options: function),
        (torch, "_dynamo", types.SimpleNamespace(reset=lambda: None)),
        (dsv4_router, "dense_router_dispatch", dense),
        (cublas, "activation_topk", write_topk),
        (peers, "cublas_logits", plain_logits),
        (cases, "cublas_logits", plain_logits),
        (cases, "SHAPES", shapes),
        (bench, "SHAPES", shapes),
        (bench, "Session", lambda *fields: cases.Session(*fields, device="cpu")),
        (cases.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="1234.5")),
        (neighbours, "empty_launch", lambda like: None),
        (neighbours, "stream_weight", lambda weight: None),
        (neighbours, "rms_norm", plain_norm),
        (neighbours, "count_experts", plain_count),
        (timing, "CALLS", 2),
        (timing, "cold_weights", lambda weight: [weight, torch.roll(weight, 1, 0)]),
        (timing, "raise_clocks", lambda: None),
        (timing, "graph_samples", fake_graphs),
        (timing, "eager_samples", fake_eager),
    ]:
        monkeypatch.setattr(target, name, value, raising=name != "_dynamo")
    return monkeypatch


def run_to_file(path: Path, *arguments: object) -> list[report.Line]:
    assert exit_code("--out", path, *arguments) == 0
    return report.read_lines(path)


def of(lines: list[report.Line], **fields: object) -> list[report.Line]:
    return [line for line in lines if all(line[name] == value for name, value in fields.items())]


def test_a_whole_run(no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_to_file(tmp_path / "results.jsonl", "--tokens", "1,8")
    committed = report.read_lines(RESULTS)
    for line in lines:
        extra = ["host_us"] if (line["bench"], line["mode"]) == ("dense", "eager") else []
        assert sorted(line) == sorted([*report.LINE_FIELDS, *extra])
        assert {name: type(value) for name, value in line.items() if name in committed[0]} == {
            name: type(value) for name, value in committed[0].items()
        }
        assert line["us_min"] <= line["us"] <= line["us_max"]
        assert re.fullmatch(r"[0-9a-f]{16}", line["source_hash"])
        assert line["versions"]["torch"] == torch.__version__
    seen = {(line["bench"], line["mode"]) for line in lines}
    assert seen == {(name, "isolated") for name in ("topk", "hash", "dense", "batch_invariant")} | {
        ("dense", "chain"),
        ("dense", "eager"),
        ("host", "eager"),
        ("import", "eager"),
    }
    foreign = ["vllm", "sglang", "tile_kernels", "deep_gemm + activation_topk"]
    timed = of(lines, bench="dense", mode="isolated", shape="v4-pro", num_tokens=8, cache="cold")
    own = ["decode", "cublas", providers.EAGER, providers.COMPILED, providers.EMPTY, providers.STREAM]
    assert [line["provider"] for line in timed] == [*foreign, *own]
    assert [line["us"] for line in timed] == [10.0 * (i + 1) for i in range(len(timed))]
    assert all(line["baseline"] == "vllm" for line in timed)
    assert [line["ratio"] for line in timed] == [i + 1.0 for i in range(len(timed))]
    chain = of(lines, bench="dense", mode="chain", shape="v4-flash", num_tokens=1, cache="warm")
    assert [line["provider"] for line in chain] == ["vllm", "decode", "cublas", providers.ALONE]
    hashed = of(lines, bench="hash", num_tokens=1, cache="warm")
    gemms = ["vllm GEMM + hash_from_logits", "deep_gemm GEMM + hash_from_logits"]
    assert [line["provider"] for line in hashed] == [*gemms, "hash_from_hidden"]
    assert [line["provider"] for line in of(lines, bench="topk", shape="E16", num_tokens=1, cache="warm")] == [
        *foreign[:3],
        "activation_topk",
    ]
    assert {line["host_us"] for line in of(lines, bench="dense", mode="eager")} == {6.0}
    assert {line["us"] for line in of(lines, bench="host")} == {6.0}
    output = capsys.readouterr()
    assert "dense, v4-pro, isolated, warm: microseconds (ratio to vllm)" in output.out
    assert output.err.count("missing provider: flashinfer") == 1


def test_a_run_that_is_cut_off_keeps_its_lines(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.part"
    path.write_text("of an earlier run")
    options = ("--only", "dense", "--modes", "isolated", "--shapes", "v4-pro", "--tokens", "1,8")
    calls = iter(range(3))

    def graphs_or_stop(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2:  # after one token, warm and cold
            raise KeyboardInterrupt
        return fake_graphs(*arguments, **keywords)

    no_gpu.setattr(timing, "graph_samples", graphs_or_stop)
    with pytest.raises(KeyboardInterrupt):
        exit_code(*options, "--out", path)
    assert {(line["num_tokens"], line["cache"]) for line in report.read_lines(partial)} == {(1, "warm"), (1, "cold")}
    assert path.read_text() == "of an earlier run"
    no_gpu.setattr(timing, "graph_samples", fake_graphs)
    assert {line["num_tokens"] for line in run_to_file(path, *options)} == {1, 8}
    assert not partial.exists()


def test_quick_times_no_more_than_decode(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = run_to_file(tmp_path / "results.jsonl", "--quick", "--tokens", "8", "--shapes", "v4-pro")
    assert {(line["bench"], line["mode"]) for line in lines} == {("dense", "isolated")}
    assert {line["provider"] for line in lines} & providers.OWN == {"decode"}
    assert {line["cache"] for line in lines} == {"warm", "cold"}
    assert not {line["provider"] for line in lines} & {providers.EAGER, providers.COMPILED}


def test_without_peers_an_own_path_is_the_baseline(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpu.setattr(peers, "FINDERS", {})
    lines = run_to_file(tmp_path / "results.jsonl", "--only", "dense", "--tokens", "2")
    assert {line["baseline"] for line in lines} == {"decode"}


def test_a_folder_gets_a_file_named_by_the_gpu(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert exit_code("--quick", "--tokens", "1", "--out", tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["h100.jsonl"]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100.jsonl"),
        ("NVIDIA H100 PCIe", "h100-pcie.jsonl"),
        ("NVIDIA H200", "h200.jsonl"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090.jsonl"),
    ],
)
def test_file_names(gpu: str, name: str) -> None:
    assert report.file_name(gpu) == name


def test_a_wrong_own_path_is_not_timed(
    no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*arguments: Any, **options: Any) -> providers.Outputs:
        weights, ids = arguments[5:7]
        return weights.fill_(0.1), ids.copy_(torch.arange(6).expand_as(ids))

    no_gpu.setattr(dsv4_router, "dense_router_dispatch", wrong)
    path = tmp_path / "results.jsonl"
    assert exit_code("--only", "dense,topk", "--modes", "isolated", "--tokens", "4", "--out", path) == 1
    err = capsys.readouterr().err
    assert "decode differs from float64: WRONG" in err
    assert "bench: failed: dense isolated v4-pro 4 tokens" in err
    assert {line["bench"] for line in report.read_lines(path)} == {"topk"}, "what was right is kept"


@pytest.mark.parametrize(
    ("function", "name"),
    [("dense_router_dispatch", "cublas"), ("dense_route", "dense_route"), ("hash_router_dispatch", "hash plain")],
)
def test_the_time_of_a_host_that_is_wrong_is_not_taken(
    no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], function: str, name: str
) -> None:
    right = getattr(dsv4_router, function)

    def wrong(*arguments: Any, **options: Any) -> providers.Outputs:
        weights, ids = right(*arguments, **options)
        return weights.mul_(1.001), ids

    no_gpu.setattr(dsv4_router, function, wrong)
    path = tmp_path / "results.jsonl"
    assert exit_code("--only", "host,import", "--tokens", "4", "--shapes", "v4-flash", "--out", path) == 1
    assert f"{name} differs from float64: WRONG: 4 tokens, 0 wrong ids" in capsys.readouterr().err
    assert {line["bench"] for line in report.read_lines(path)} == {"import"}


def test_an_own_path_that_writes_nothing_is_wrong(
    no_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu.setattr(dsv4_router, "dense_router_dispatch", lambda *arguments, **options: arguments[5:7])
    assert exit_code("--quick", "--tokens", "4") == 1
    assert "decode differs from float64: WRONG: 4 tokens, 24 wrong ids" in capsys.readouterr().err


def test_an_own_path_that_raises_fails_the_run(no_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: Any, **options: Any) -> providers.Outputs:
        raise dsv4_router.BackendUnavailableError("no kernel")

    no_gpu.setattr(dsv4_router, "dense_router_dispatch", broken)
    assert exit_code("--quick", "--tokens", "4") == 1
    assert "BackendUnavailableError: no kernel" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["raises", "differs"])
def test_a_peer_that_fails_is_left_out(
    no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    def topk(values: torch.Tensor, bias: torch.Tensor, scaling: float) -> providers.Outputs:
        if how == "raises":
            raise AssertionError("unsupported\nshape")
        weights, ids = plain_topk(values, bias, scaling)
        return weights * 1.001, ids

    no_gpu.setattr(peers, "FINDERS", {"peer": lambda: peers.Peer("peer", plain_logits, topk)})
    lines = run_to_file(tmp_path / "results.jsonl", "--quick", "--tokens", "4", "--shapes", "v4-pro")
    assert "peer" not in {line["provider"] for line in lines}
    err = capsys.readouterr().err
    assert "left out: peer (" in err
    assert ("AssertionError: unsupported shape" if how == "raises" else "WRONG") in err


@pytest.mark.parametrize(
    ("neighbour", "wrong_tensor", "what"),
    [
        ("rms_norm", 2, "RMSNorm is wrong"),
        ("count_experts", 2, "the consumer's counts are wrong"),
        ("count_experts", 3, "the consumer's sums are wrong"),
    ],
)
def test_a_wrong_neighbour_fails_the_run(
    no_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], neighbour: str, wrong_tensor: int, what: str
) -> None:
    right = getattr(neighbours, neighbour)

    def wrong(*tensors: torch.Tensor) -> None:
        right(*tensors)
        tensors[wrong_tensor].view(-1)[3] += 1

    no_gpu.setattr(neighbours, neighbour, wrong)
    assert exit_code("--only", "dense", "--modes", "chain", "--tokens", "4") == 1
    assert f"RuntimeError: chain: {what}" in capsys.readouterr().err


def test_options_that_leave_nothing(no_gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--only", "import", "--modes", "chain") == 2
    assert "leave no case" in capsys.readouterr().err


def test_compare_of_a_run(no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--quick", "--shapes", "v4-pro", "--tokens", "2,4"]
    lines = run_to_file(tmp_path / "before.jsonl", *given)
    assert exit_code(*given, "--compare", tmp_path / "before.jsonl") == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
    for line in of(lines, provider="decode", num_tokens=4):
        line["ratio"] *= 0.9
    path = tmp_path / "faster.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert exit_code(*given, "--compare", path) == 1
    out = capsys.readouterr().out
    assert "worse: dense v4-pro 4 tokens warm isolated decode: ratio 4.500 -> 5.000 (+11.1%), 50.00 us" in out
    assert "2 worse, 0 better, 2 the same" in out
    assert exit_code(*given, "--compare", path, "--tolerance", "0.2") == 0


def test_compare_needs_a_file_of_the_benchmark(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exit_code("--compare", tmp_path / "none.jsonl")
    path = tmp_path / "other.jsonl"
    path.write_text('{"bench": "dense"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl:1: expected a line of the benchmark, got none of baseline, "):
        exit_code("--compare", path)
    path.write_text("not JSON\n")
    with pytest.raises(ValueError, match=r"other.jsonl:1: expected a JSON object"):
        exit_code("--compare", path)


# Comparison


def line(provider: str = "decode", ratio: float = 0.8, **fields: object) -> report.Line:
    cell = {"bench": "dense", "shape": "v4-pro", "num_tokens": 4, "cache": "warm", "mode": "isolated"}
    return cell | {"provider": provider, "us": 4.0, "baseline": "vllm", "ratio": ratio} | fields


@pytest.mark.parametrize(
    ("now", "worse", "better", "ok"),
    [(0.8, 0, 0, True), (0.83, 0, 0, True), (0.85, 1, 0, False), (0.77, 0, 0, True), (0.7, 0, 1, True)],
)
def test_ratios_are_compared(now: float, worse: int, better: int, ok: bool) -> None:
    changes = report.compare([line()], [line(ratio=now, us=400.0)], 0.05)
    assert (len(changes.worse), len(changes.better), changes.ok) == (worse, better, ok)
    assert changes.same == 1 - worse - better


def test_cells_of_one_side_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = [line(), line(num_tokens=8), line(num_tokens=16), line(cache="cold")]
    now = [line(), line("cublas"), line(cache="cold", baseline="sglang")]
    changes = report.compare(before, now, 0.05)
    assert [cell[2] for cell in changes.only_before] == [8, 16, 4]
    assert [(cell[3], cell[5]) for cell in changes.only_now] == [("warm", "cublas"), ("cold", "decode")]
    assert changes.ok
    report.show_changes(changes, 0.05, bench.Console())
    out = capsys.readouterr().out
    assert "not in this run: dense v4-pro warm isolated decode: 8, 16 tokens" in out
    assert "only in this run: dense v4-pro warm isolated cublas: 4 tokens" in out


def test_what_is_not_ours_is_not_compared() -> None:
    names = ["vllm", "sglang", providers.EAGER, providers.COMPILED, providers.EMPTY, providers.STREAM, providers.ALONE]
    changes = report.compare([line(name, 1.0) for name in names], [line(name, 2.0) for name in names], 0.05)
    assert not changes.worse
    assert not changes.ok, "nothing was compared"


def test_the_committed_results_can_be_compared_with() -> None:
    before = report.read_lines(RESULTS)
    assert report.compare(before, copy.deepcopy(before), 0.05).ok
    now = copy.deepcopy(before)
    slower = next(line for line in now if line["provider"] == "hash_from_hidden")
    slower["ratio"] *= 1.06
    assert len(report.compare(before, now, 0.05).worse) == 1


# Figures


def test_figures_of_the_committed_results(tmp_path: Path) -> None:
    from dsv4_router.profiling import plots

    lines = [line for line in report.read_lines(RESULTS) if line["bench"] in ("hash", "host")]
    hashed = [line for line in lines if line["bench"] == "hash"]
    floors = [hashed[0] | {"num_tokens": n, "provider": providers.STREAM, "us": 0.9, "ratio": 0.1} for n in (1, 64)]
    written = plots.draw(lines + floors, tmp_path / "plots")
    names = [f"hash-isolated-{kind}.{ending}" for kind in ("latency", "ratio") for ending in ("svg", "png")]
    assert [path.name for path in written] == names, "and none of host, which has one token count"
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        if path.suffix == ".svg":
            text = content.decode()
            assert "v4-pro, cold" in text
            assert "hash_from_hidden" in text
            assert ("microseconds a call" in text) == ("latency" in path.name)
            assert ("stroke-dasharray" in text and providers.STREAM in text) == ("latency" in path.name)
    again = plots.draw(lines + floors, tmp_path / "again")
    assert again[0].read_bytes() == written[0].read_bytes()


def test_the_figure_of_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv4_router.profiling import plots

    results = RESULTS.with_name("h200-decode-phases.jsonl")
    plots.main([str(results), "--out", str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"decode-phases.{kind}") for kind in ("svg", "png")]
    text = (tmp_path / "decode-phases.svg").read_text()
    for line in map(json.loads, results.read_text().splitlines()):
        assert f"{line['shape']}, {line['num_tokens']} tokens" in text
        assert sum(line["phases_us"].values()) == pytest.approx(line["us"], abs=0.01)
    assert all(phase in text for phase in ("launch", "load", "MMA", "hand-off", "select"))


def test_figures_of_a_run(no_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ["--only", "dense", "--modes", "chain", "--shapes", "v4-pro", "--tokens", "1,4"]
    assert exit_code(*given, "--plots", tmp_path) == 0
    assert {path.suffix for path in tmp_path.glob("dense-chain-latency.*")} == {".svg", ".png"}


def test_a_run_without_matplotlib(
    no_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu.delitem(sys.modules, "dsv4_router.profiling.plots", raising=False)
    no_gpu.delattr("dsv4_router.profiling.plots", raising=False)
    no_gpu.setitem(sys.modules, "matplotlib", None)
    assert exit_code("--quick", "--tokens", "1", "--plots", tmp_path / "plots") == 0
    assert "no plots: " in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


# Timing


def test_eager_calls_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "EAGER_CALLS", 2)
    monkeypatch.setattr(timing, "EAGER_BATCHES", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("|"))
    clock = iter([0.0, 4e-6, 10e-6] * 6)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    order: list[str] = []
    samples = timing.eager_samples({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert "".join(order) == "aabb" + "|aa||bb|" * 3
    assert samples["a"].host.us == pytest.approx(2.0)
    assert samples["b"].whole.us == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("num_tokens", "replays", "captures"),
    [(1, timing.REPLAYS, 4), (1024, timing.REPLAYS, 4), (1025, timing.REPLAYS // 2, 1)],
)
def test_graphs_are_sampled(monkeypatch: pytest.MonkeyPatch, num_tokens: int, replays: int, captures: int) -> None:
    asked = []
    monkeypatch.setattr(
        timing, "graph_times", lambda calls, *how: asked.append(how) or {name: [3.0, 1.0, 2.0] for name in calls}
    )
    assert timing.graph_samples({"a": []}, num_tokens) == {"a": timing.Sample(2.0, 1.0, 3.0)}
    assert asked == [(replays, captures)]


# The kernels beside the router


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
def test_neighbours_compile_without_local_memory(architecture: str) -> None:
    cubin, log = neighbours.compile_with_log(architecture)
    assert cubin[:4] == b"\x7fELF"
    assert "warning" not in log
    for entry in neighbours.ENTRIES:
        found = re.search(rf"Function properties for {entry}\b(.*?)Used (\d+) registers", log, re.DOTALL)
        assert found is not None, entry
        assert re.findall(r"(\d+) bytes", found[1])[:3] == ["0", "0", "0"], found[1]
        assert int(found[2]) <= 128


def test_neighbours_agree_with_their_host_code() -> None:
    source = neighbours.SOURCE.read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", source)}
    assert constants["kThreads"] == neighbours._THREADS
    assert constants["kMostWords"] * neighbours._FLOOR_BLOCKS * neighbours._THREADS == neighbours._MOST_WORDS
    assert constants["kMostChunks"] * neighbours._THREADS == neighbours._MOST_CHUNKS
    assert constants["kMostExperts"] == neighbours._MOST_EXPERTS
    assert constants["kTokensPerBlock"] == neighbours.TOKENS_PER_BLOCK
    kernels = source.split('extern "C" __global__')[1:]
    assert tuple(
        re.findall(r"(\w+)\(", kernel.partition("__launch_bounds__(kThreads)")[2])[0] for kernel in kernels
    ) == (neighbours.ENTRIES)
    for kernel in kernels:
        assert kernel.count("wait_for_previous_kernel();") == 1, kernel[:60]
        assert kernel.count("launch_dependents();") == 1, kernel[:60]


def test_every_shape_fits_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(neighbours, "_launch", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(neighbours, "_sink", lambda index: torch.zeros(4, dtype=torch.int32))
    for config in cases.SHAPES.values():
        gate = torch.empty(config.num_experts, config.hidden_size, dtype=torch.bfloat16)
        rows = torch.empty(65, config.hidden_size, dtype=torch.bfloat16)
        counts = torch.empty(2, config.num_experts, dtype=torch.int32)
        ids = torch.empty(65, config.top_k, dtype=torch.int32)
        neighbours.empty_launch(rows)
        neighbours.stream_weight(gate)
        neighbours.rms_norm(rows, rows[0], rows)
        neighbours.count_experts(ids.float(), ids, counts, counts.float())
        assert [launch[0] for launch in launched] == list(neighbours.ENTRIES)
        assert [launch[2] for launch in launched] == [128, 128, 65, 2]
        assert launched[1][4] * 16 == gate.nbytes
        assert launched[2][6] * 8 == config.hidden_size
        assert launched[3][5:8] == (65, config.top_k, config.num_experts)
        launched.clear()


def test_neighbours_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="weight: expected"):
        neighbours.stream_weight(torch.empty(1024, 8192, dtype=torch.bfloat16))
    rows = torch.empty(2, 8200, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="hidden_size: expected"):
        neighbours.rms_norm(rows, rows[0], rows)
    ids = torch.empty(65, 6, dtype=torch.int32)
    for bad_ids, blocks in ((ids.long(), 2), (ids, 1)):
        counts = torch.empty(blocks, 16, dtype=torch.int32)
        with pytest.raises(ValueError, match="expected int32 ids"):
            neighbours.count_experts(ids.float(), bad_ids, counts, counts.float())


# Installed


IMPORT = """
import sys
from dsv4_router.profiling import bench, neighbours, splits
import torch
loaded = {name.partition(".")[0] for name in sys.modules} & {"cutlass", "tvm_ffi", "matplotlib", "triton"}
print(sorted(loaded), torch.cuda.is_initialized(), bench.__file__, neighbours.SOURCE.is_file())
"""


def test_importing_needs_neither_gpu_nor_cutlass_nor_matplotlib() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["[]", "False"]


def test_a_wheel_holds_the_benchmark(tmp_path: Path) -> None:
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs the package build")
    tree, target = tmp_path / "tree", tmp_path / "target"
    for name in ("src", "kernels", "profiling"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, capture_output=True, check=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n{IMPORT}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    *_, file, source = done.stdout.split()
    assert Path(file).is_relative_to(target)
    assert source == "True"
