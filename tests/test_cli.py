# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The command line: every command, and every error as one line."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cli_helpers import Run, assert_one_line_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv4_router import __version__, api, cli, cli_reports, decode_config, dispatch, reference, settings, testing
from dsv4_router.backends import cuda_module, decode
from dsv4_router.config import PRESETS, V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.modules import DenseRouter

TINY = RouterConfig(64, 16, 4, 1.5, num_layers=2, num_hash_layers=1, vocab_size=50, name="tiny")
TOKENS = 23
HF_CONFIG = {
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 2,
    "num_hash_layers": 1,
    "vocab_size": 50,
    "scoring_func": "sqrtsoftplus",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint of a hash layer 0 and a dense layer 1, and inputs for both in files."""

    folder: Path
    dense: testing.DenseInputs
    hashed: testing.HashInputs

    def route(self, layer: object, /, **options: object) -> list[object]:
        """The arguments of ``route``; an option that is None is left out."""
        chosen: dict[str, object] = {
            "checkpoint": self.folder,
            "layer": layer,
            "hidden_states": self.folder / f"x{layer}.safetensors",
            "token_ids": self.folder / "tokens.npy" if layer == 0 else None,
            "output": self.folder / "out.safetensors",
            "device": "cpu",
        } | options
        arguments: list[object] = ["route"]
        for name, value in chosen.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", value]
        return arguments

    def output(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out.safetensors")

    def expected_dense(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return api.dense_route(*self.dense, TINY.top_k, TINY.routed_scaling_factor, **options)

    def expected_hash(self) -> tuple[torch.Tensor, torch.Tensor]:
        return api.hash_route(
            self.hashed.token_ids,
            self.hashed.hash_lut,
            TINY.top_k,
            hidden_states=self.hashed.hidden_states,
            gate_weight=self.hashed.gate_weight,
            routed_scaling_factor=TINY.routed_scaling_factor,
        )


def write_checkpoint(case: Case) -> None:
    gate = "layers.{}.ffn.gate.{}"
    tensors = {
        gate.format(0, "weight"): case.hashed.gate_weight,
        gate.format(0, "tid2eid"): case.hashed.hash_lut,
        gate.format(1, "weight"): case.dense.gate_weight,
        gate.format(1, "bias"): case.dense.correction_bias,
    }
    save_file(tensors, case.folder / "model.safetensors")
    (case.folder / "config.json").write_text(json.dumps(HF_CONFIG))


@pytest.fixture
def case(tmp_path: Path, seed: int) -> Case:
    made = Case(
        tmp_path, testing.make_dense_inputs(TINY, TOKENS, seed=seed), testing.make_hash_inputs(TINY, TOKENS, seed=seed)
    )
    write_checkpoint(made)
    save_file({"hidden_states": made.hashed.hidden_states}, tmp_path / "x0.safetensors")
    save_file({"hidden_states": made.dense.hidden_states}, tmp_path / "x1.safetensors")
    numpy.save(tmp_path / "tokens.npy", made.hashed.token_ids.numpy())
    return made


def assert_routed(output: dict[str, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Same ids; weights up to the order of fp32 summation, which may depend on the number of rows."""
    assert output.keys() == {"weights", "ids"}
    assert torch.equal(output["ids"], expected[1])
    torch.testing.assert_close(output["weights"], expected[0], rtol=2e-6, atol=0)


# The program


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_module_runs_as_a_program() -> None:
    done = python("-m", "dsv4_router.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dsv4-router {__version__}\n", "")


def test_program_error_is_one_line(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.npy")
    arguments = ["--checkpoint", "x", "--layer", "0", "--hidden-states", absent, "--output", "y", "--device", "cpu"]
    done = python("-m", "dsv4_router.cli", "route", *arguments)
    assert_one_line_error((done.returncode, done.stdout, done.stderr), "--hidden-states", absent)


@pytest.mark.parametrize(("command", "option"), [("route", "--hidden-states"), ("compile", "--preset")])
def test_help_imports_no_torch(command: str, option: str) -> None:
    code = (
        "import sys; from dsv4_router import cli\n"
        f"try: cli.main(['{command}', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'safetensors', 'cutlass'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert option in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_choices_are_those_of_the_package() -> None:
    assert tuple(backend.value for backend in cli.Backend) == dispatch.BACKENDS
    assert [preset.value for preset in cli.Preset] == list(PRESETS)
    assert tuple(target.value for target in cli.Architecture) == decode_config.ARCHITECTURES


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["route"],
        ["demo", "--tokens", "0"],
        ["verify", "--tokens", "many"],
        ["route", "--backend", "fast"],
        ["route", "--ids-dtype", "int16"],
        ["route", "--batch-tokens", "0"],
        ["compile", "--preset", "v4"],
        ["compile", "--preset", "v4-pro", "--arch", "sm_80"],
        ["compile", "v4-pro"],
    ],
)
def test_usage_errors(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["demo", "verify"])
@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_unusable_device(run: Run, command: str, device: str) -> None:
    assert_one_line_error(run(command, "--device", device), "device: expected", device)


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli_reports, "info", broken)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_long_errors_become_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(cli_reports, "info", broken)
    assert_one_line_error(run("info"), "error: first second\n")


# demo


def test_demo(run: Run) -> None:
    code, out, err = run("demo", "--tokens", 40, "--seed", 3, "--device", "cpu")
    assert (code, err) == (0, "")
    inputs = testing.make_dense_inputs(V4_FLASH, 40, seed=3)
    weights, ids = api.dense_route(*inputs, V4_FLASH.top_k, V4_FLASH.routed_scaling_factor)
    for token in range(4):
        cells = [f"{expert}: {weight:.4f}" for expert, weight in zip(ids[token], weights[token], strict=True)]
        assert re.search(rf"{token} .*" + ".*".join(cells), out)
    load = torch.bincount(ids.flatten(), minlength=256)
    assert f"{int(load.min())} / {40 * 6 / 256:.2f} / {int(load.max())} (least, mean, most) of 240" in out
    bins = {int(first): (int(count), bar) for first, count, bar in re.findall(r"(\d+)-\d+ +\S +(\d+) \S (█*)", out)}
    assert {first: count for first, (count, _) in bins.items()} == {
        first: int(load[first : first + 16].sum()) for first in range(0, 256, 16)
    }
    longest = max(count for count, _ in bins.values())
    assert all(len(bar) == round(count / longest * 40) for count, bar in bins.values())
    assert str(dispatch.explain(V4_FLASH, 40, "cpu")) in out
    assert re.search(r"Time: [\d.]+ us a call, median of 20,.* on CPU", out)
    assert "float64 reference: ok: 40 tokens, 0 wrong ids" in out


def swap_first_two_ids(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes a reference name its first two experts in the wrong order, with the weights of the right one."""
    right = getattr(reference, name)

    def wrong(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = right(*arguments, **options)
        return weights, ids[:, [1, 0, *range(2, ids.shape[1])]]

    monkeypatch.setattr(reference, name, wrong)


def test_demo_fails_on_wrong_ids(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    swap_first_two_ids(monkeypatch, "dense_route")
    code, out, _ = run("demo", "--tokens", 8, "--device", "cpu")
    assert code == 1
    assert "float64 reference: WRONG: 8 tokens, 16 wrong ids" in out


# info


def test_info(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "apache-tvm-ffi":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("info")
    assert (code, err) == (0, "")
    rows = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in out.splitlines() if "│" in line}
    assert ("none", "", "", "") in rows
    assert ("apache-tvm-ffi", "missing") in rows
    for package in ("torch", "cuda-core", "cuda-bindings", "safetensors", "nvidia-cutlass-dsl"):
        assert (package, known(package)) in rows
    assert ("dsv4-router", __version__) in rows
    assert f"Kernel cache: {settings.cache_dir()}\n" in out
    for name, config in PRESETS.items():
        for tokens in (1, 64, 4096):
            plan = dispatch.explain(config, tokens, "cpu")
            assert (name, "dense", str(tokens), plan.path, ": ".join(plan.rejected[0])) in rows
        hashed = (name, "hash", "any", "reference", "cuda: needs a CUDA device, the tensors are on cpu")
        assert (hashed in rows) == (config.num_hash_layers > 0)


@pytest.mark.parametrize(("capability", "remark"), [((9, 0), ""), ((10, 0), "compiled for sm_100a, never run there")])
def test_info_of_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], remark: str) -> None:
    found = dispatch.Availability("cuda:0", compute_capability=capability)
    monkeypatch.setattr(dispatch, "availability", lambda device: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = run("info")
    assert code == 0
    rows = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in out.splitlines() if "│" in line}
    for name, config in PRESETS.items():
        for tokens in (1, 64):
            assert (name, "dense", str(tokens), "decode", remark) in rows
        (many,) = (row[-1] for row in rows if row[:4] == (name, "dense", "4096", "cublas"))
        limit = dispatch.decode_limit(config.hidden_size, config.num_experts, found).max_tokens
        assert many.startswith(f"decode: faster up to {limit} tokens only (")
        assert ((name, "hash", "any", "cuda", "") in rows) == (config.num_hash_layers > 0)


# compile


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(settings.CACHE_DIR_VARIABLE, str(folder))
    return folder


@pytest.fixture
def compilations(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Token tiles (0: more rows) and architectures that CuTe DSL compiles from here on, by nothing, as is the top-k."""
    asked: list[tuple[int, str]] = []

    def compile_object(config: decode.Config, target: str) -> tuple[bytes, Any]:
        asked.append((getattr(config, "token_tile", 0), target))
        return bytes(1536), None

    monkeypatch.setattr(decode, "compile_object", compile_object)
    monkeypatch.setattr(cuda_module, "_compile", lambda spec, target, log: bytes(2048))
    return asked


def compiled_rows(out: str) -> list[list[str]]:
    """Cells of the table's rows of CuTe DSL's kernels, without the time."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    assert all(re.fullmatch(r"\d+\.\d\d s", row[-1]) for row in rows if row[1] != "none fits")
    return [row[:-1] for row in rows if row[1] != "top-k"]


def test_compile_a_preset(run: Run, compilations: list[tuple[int, str]], kernel_cache: Path) -> None:
    arguments = ["compile", "--preset", "v4-pro", "--arch", "sm_120a", "--arch", "sm_90a", "--arch", "sm_90a"]
    expected = [(tile, "sm_120a") for tile in (8, 16)] + [(tile, "sm_90a") for tile in (8, 16, 32, 64, 96, 128, 0, 0)]
    for _ in range(2):
        code, out, err = run(*arguments)
        assert code == 0
        assert "34/34" in err
        assert compilations == expected, "the second time all come from the cache"
        assert compiled_rows(out) == [
            ["sm_120a", "8", "128", "384", "72.1 KiB", "1.5 KiB"],
            ["sm_120a", "16", "128", "384", "91.0 KiB", "1.5 KiB"],
            ["sm_90a", "8", "128", "384", "72.1 KiB", "1.5 KiB"],
            ["sm_90a", "16", "128", "384", "91.0 KiB", "1.5 KiB"],
            ["sm_90a", "32", "128", "384", "114.2 KiB", "1.5 KiB"],
            ["sm_90a", "64", "128", "384", "114.2 KiB", "1.5 KiB"],
            ["sm_90a", "96", "128", "384", "135.0 KiB", "1.5 KiB"],
            ["sm_90a", "128", "128", "384", "163.0 KiB", "1.5 KiB"],
            ["sm_90a", "more rows", "", "384", "217.1 KiB", "1.5 KiB"],
            ["sm_90a", "more rows", "", "384", "209.1 KiB", "1.5 KiB"],
        ]
        assert out.startswith(f"{V4_PRO}\n")
        assert f"Kernel cache: {kernel_cache}\n" in out
        assert len(re.findall(r"│ sm_(?:90|120)a +│ top-k +│ +│ +│ +│ 2.0 KiB +│", out)) == 24
    assert len(list(kernel_cache.glob("*.o"))) == 10
    assert len(list(kernel_cache.glob("*.cubin"))) == 24


def test_compile_for_all_architectures_from_a_checkpoint(
    run: Run, compilations: list[tuple[int, str]], tmp_path: Path
) -> None:
    """A model whose smallest variant is too large for one of them."""
    large = {"hidden_size": 8192, "n_routed_experts": 512, "num_experts_per_tok": 16}
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | large))
    for checkpoint in (tmp_path, tmp_path / "config.json"):
        code, out, _ = run("compile", "--checkpoint", checkpoint)
        assert code == 0
        assert [row[:2] for row in compiled_rows(out)][-2:] == [["sm_103a", "64"], ["sm_120a", "none fits"]]
    tiles = {"sm_90a": (8, 16, 32, 64, 0, 0), "sm_100a": (8, 16, 32, 64), "sm_103a": (8, 16, 32, 64)}
    assert compilations == [(tile, arch) for arch, of_arch in tiles.items() for tile in of_arch]
    assert_one_line_error(run("compile", "--checkpoint", tmp_path, "--arch", "sm_120a"), "shared memory", "of sm_120a")


def test_compile_errors(
    run: Run, compilations: list[tuple[int, str]], kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "text").write_text("no JSON")
    both = ["--preset", "v4-pro", "--checkpoint", tmp_path]
    assert_one_line_error(run("compile"), "--preset: expected either --preset or --checkpoint, got neither")
    assert_one_line_error(run("compile", *both), "--preset: expected either --preset or --checkpoint, got both")
    assert_one_line_error(run("compile", "--checkpoint", tmp_path), "hidden_size from 1024 to 8192", "got 64")
    assert_one_line_error(run("compile", "--checkpoint", tmp_path / "text"), "expected a JSON file", "text")
    assert_one_line_error(run("compile", "--checkpoint", tmp_path / "absent"), "No such file", "absent")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "missing_cutlass_dsl", lambda: "nvidia-cutlass-dsl is not installed")
        assert_one_line_error(run("compile", "--preset", "v4-pro"), "nvidia-cutlass-dsl is not installed")
    assert not kernel_cache.exists()
    kernel_cache.write_text("in the way")
    assert_one_line_error(run("compile", "--preset", "v4-pro"), "File exists", str(kernel_cache))
    assert compilations == []


def test_compiled_kernels_are_those_that_calls_take(
    run: Run, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real compilations of this file; all variants together are in test_decode_kernel.py."""
    code, out, _ = run("compile", "--preset", "v4-pro", "--arch", "sm_120a")
    assert code == 0
    rows = compiled_rows(out)
    assert [row[1] for row in rows] == ["8", "16"]
    monkeypatch.setattr(decode, "compile_object", lambda config, target: pytest.fail("compiled again"))
    for tile, row in zip((8, 16), rows, strict=True):
        kernel = decode.object_code(decode_config.DecodeConfig(7168, 384, 6, tile), "sm_120a")
        assert kernel[:4] == b"\x7fELF"
        assert row[-1] == f"{len(kernel) / 1024:.1f} KiB"
        assert callable(decode.link(kernel))


# verify


def test_verify_every_preset(run: Run) -> None:
    code, out, err = run("verify", "--tokens", 5, "--device", "cpu")
    assert (code, err) == (0, "")
    for name, config in PRESETS.items():
        rows = [line for line in out.splitlines() if line.startswith(f"│ {name} ")]
        compared = [line for line in rows if re.search(r" 5 +│ 0 .* ok ", line)]
        assert len(compared) == (5 if config.num_hash_layers else 2)
        for path in ("decode", "cublas"):
            assert any(f"dense, {path}" in line and "not available: needs a CUDA device" in line for line in rows)
        assert any("dense, batch-invariant (reference)" in line and " ok " in line for line in rows)
        assert any("this model has no hash layers" in line for line in rows) == (config.num_hash_layers == 0)
    assert "14 paths compared with float64 on CPU" in out
    assert "0 wrong" in out


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_reports, "PRESETS", {"tiny": TINY})


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(("name", "wrong_rows"), [("dense_route", 2), ("hash_route", 3)])
def test_verify_fails_on_wrong_ids(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, wrong_rows: int) -> None:
    assert run("verify", "--tokens", 40, "--device", "cpu")[0] == 0
    swap_first_two_ids(monkeypatch, name)
    code, out, _ = run("verify", "--tokens", 40, "--device", "cpu")
    assert code == 1
    assert f"{wrong_rows} wrong" in out
    rows = [line for line in out.splitlines() if " WRONG " in line]
    assert len(rows) == wrong_rows
    assert all(
        re.search(r"│ 40 +│ [5-8]\d +│", row) for row in rows
    )  # two a token, less where an expert is named twice


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(("name", "factor"), [("dense_route", 1 + 1e-4), ("hash_route", 1 + 1e-4)])
def test_verify_fails_on_wrong_weights(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    right = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *a, **o: (lambda w, i: (w * factor, i))(*right(*a, **o)))
    code, out, _ = run("verify", "--tokens", 8, "--device", "cpu")
    assert code == 1
    assert re.search(r"│ 8 +│ 0 +│ 1.0e-04 .* WRONG", out)


@pytest.mark.usefixtures("tiny_preset")
def test_verify_fails_on_bits_that_depend_on_the_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.dense_route

    def moved(hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = right(hidden_states, *arguments, **options)
        return (weights * (1 + 3e-7) if hidden_states.shape[0] > 1 else weights), ids

    monkeypatch.setattr(reference, "dense_route", moved)
    code, out, _ = run("verify", "--tokens", 12, "--device", "cpu")
    assert code == 1
    assert [line for line in out.splitlines() if "WRONG" in line] == re.findall(
        r"│ tiny +│ dense, batch-invariant .* WRONG 8 tokens differ when routed alone +│", out
    )


@pytest.mark.usefixtures("tiny_preset")
def test_verify_reports_a_path_that_raises(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(reference, "hash_route", broken)
    code, out, _ = run("verify", "--tokens", 8, "--device", "cpu")
    assert code == 1
    assert out.count("WRONG no such kernel") == 3
    assert "2 paths compared" in out


# route


@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
def test_route_dense(run: Run, case: Case, ids_dtype: str) -> None:
    code, out, err = run(*case.route(1, ids_dtype=ids_dtype))
    assert (code, err) == (0, "")
    assert re.fullmatch(r"routed 23 tokens through dense layer 1 in [\d.]+ s, path reference on cpu: .*\n", out)
    weights, ids = case.expected_dense(ids_dtype=getattr(torch, ids_dtype))
    output = case.output()
    assert torch.equal(output["weights"], weights)
    assert torch.equal(output["ids"], ids)
    assert output["ids"].dtype is ids.dtype
    with safe_open(case.folder / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"layer": "1", "path": "reference", "top_k": "4", "routed_scaling_factor": "1.5"}


def test_route_hash(run: Run, case: Case) -> None:
    code, out, _ = run(*case.route(0))
    assert code == 0
    assert "through hash layer 0" in out
    assert_routed(case.output(), case.expected_hash())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_route_token_ids_from_safetensors(run: Run, case: Case, dtype: torch.dtype) -> None:
    file = case.folder / "tokens.safetensors"
    save_file({"other": torch.zeros(3), "token_ids": case.hashed.token_ids.to(dtype)}, file)
    assert run(*case.route(0, token_ids=file))[0] == 0
    assert_routed(case.output(), case.expected_hash())


def test_route_counts_tokens_outside_the_table(run: Run, case: Case) -> None:
    case.hashed.token_ids[[2, 5]] = torch.tensor([-1, 50])
    numpy.save(case.folder / "tokens.npy", case.hashed.token_ids.numpy())
    code, out, _ = run(*case.route(0))
    assert code == 0
    assert "routed 23 tokens (2 of them without experts" in out
    assert case.output()["ids"][[2, 5]].eq(-1).all()
    assert_routed(case.output(), case.expected_hash())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("batch_tokens", [1, 7, 22, 23, 24])
def test_route_in_batches(run: Run, case: Case, monkeypatch: pytest.MonkeyPatch, layer: int, batch_tokens: int) -> None:
    reads: dict[str, list[int]] = {"--hidden-states": [], "--token-ids": []}
    read = cli.FileRows.read

    def recorded(self: cli.FileRows, start: int, stop: int) -> torch.Tensor:
        rows = read(self, start, stop)
        reads[self.option].append(rows.shape[0])
        return rows

    monkeypatch.setattr(cli.FileRows, "read", recorded)
    code, _, err = run(*case.route(layer, batch_tokens=batch_tokens))
    assert code == 0
    assert ("23/23" in err) == (batch_tokens < TOKENS)
    for option, sizes in reads.items():
        if layer == 0 or option == "--hidden-states":
            assert max(sizes) == min(batch_tokens, TOKENS)
            assert sum(sizes) == TOKENS
    assert_routed(case.output(), case.expected_dense() if layer else case.expected_hash())


def test_reading_rows_reads_no_others(tmp_path: Path) -> None:
    """A million rows: what a read allocates is its own rows, whatever the file's size."""
    import tracemalloc

    file = tmp_path / "long.npy"
    array = numpy.lib.format.open_memmap(file, mode="w+", dtype=numpy.float32, shape=(1_000_000, 64))  # sparse
    array[999_990:] = 7
    del array
    tracemalloc.start()
    rows = cli.FileRows("--hidden-states", str(file), "hidden_states")
    assert rows.shape == (1_000_000, 64)
    assert torch.equal(rows.read(999_985, 1_000_000)[:, 0], torch.tensor([0.0] * 5 + [7.0] * 10))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_route_batch_invariant_gives_the_same_bits(run: Run, case: Case) -> None:
    expected = case.expected_dense(batch_invariant=True)
    for batch_tokens in (1, 5, 100):
        assert run(*case.route(1, batch_tokens=batch_tokens), "--batch-invariant")[0] == 0
        assert torch.equal(case.output()["weights"], expected[0])
        assert torch.equal(case.output()["ids"], expected[1])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_route_float32_hidden_states(run: Run, case: Case, order: Any, byte_order: str) -> None:
    hidden = case.dense.hidden_states.float()
    file = case.folder / "x.npy"
    numpy.save(file, numpy.asarray(hidden.numpy(), dtype=f"{byte_order}f4", order=order))
    code, _, err = run(*case.route(1, hidden_states=file))
    assert code == 0
    assert err == (
        "dsv4-router: float32 hidden states: the gate weight is converted from bfloat16 to float32, which is exact\n"
    )
    gate, bias = case.dense.gate_weight.float(), case.dense.correction_bias
    assert_routed(case.output(), api.dense_route(hidden, gate, bias, TINY.top_k, TINY.routed_scaling_factor))


@pytest.mark.parametrize(
    ("names", "suffix"),
    [(["only"], ""), (["only"], ":only"), (["hidden_states", "b"], ""), (["a", "b"], ":b"), (["a", "x:b"], ":x:b")],
)
def test_route_chooses_a_tensor(run: Run, case: Case, names: list[str], suffix: str) -> None:
    wanted = suffix.removeprefix(":") or names[0]
    file = case.folder / "x.safetensors"
    save_file({name: case.dense.hidden_states if name == wanted else torch.zeros(2) for name in names}, file)
    assert run(*case.route(1, hidden_states=f"{file}{suffix}"))[0] == 0
    assert_routed(case.output(), case.expected_dense())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_route_no_tokens(run: Run, case: Case, layer: int, suffix: str) -> None:
    file = case.folder / f"none.{suffix}"
    if suffix == "npy":
        numpy.save(file, numpy.zeros((0, 64), dtype=numpy.float32))
    else:
        save_file({"hidden_states": torch.zeros(0, 64, dtype=torch.bfloat16)}, file)
    numpy.save(case.folder / "tokens.npy", numpy.zeros(0, dtype=numpy.int32))
    code, out, _ = run(*case.route(layer, hidden_states=file))
    assert code == 0
    assert out.startswith("routed 0 tokens through")
    assert {name: tuple(t.shape) for name, t in case.output().items()} == {"weights": (0, 4), "ids": (0, 4)}


def test_route_by_prefix_and_config(run: Run, case: Case) -> None:
    config = case.folder / "elsewhere.json"
    config.write_text(json.dumps(HF_CONFIG | {"routed_scaling_factor": 3.0}))
    (case.folder / "config.json").unlink()
    assert run(*case.route(1, config=config))[0] == 0
    weights, ids = case.expected_dense()
    assert_routed(case.output(), (weights * 2, ids))
    hidden = case.folder / "x1.safetensors"
    code, out, _ = run(*case.route("layers.1.ffn.gate", config=config, hidden_states=hidden))
    assert code == 0
    assert "dense layer layers.1.ffn.gate" in out
    assert_routed(case.output(), (weights * 2, ids))


def test_route_does_not_overwrite_what_it_reads(run: Run, case: Case) -> None:
    config, file = case.folder / "elsewhere.json", case.folder / "alone.safetensors"
    config.write_text(json.dumps(HF_CONFIG))
    file.write_bytes((case.folder / "model.safetensors").read_bytes())
    for output in (config, file):
        before = output.read_bytes()
        result = run(*case.route(1, config=config, checkpoint=file, output=output))
        assert_one_line_error(result, "--output: expected a file of its own", str(output))
        assert output.read_bytes() == before
    save_file({"ids": torch.zeros(1)}, case.folder / "out.safetensors")  # of an earlier call, beside the checkpoint
    assert run(*case.route(1))[0] == 0
    assert_routed(case.output(), case.expected_dense())


def test_route_writes_to_what_a_link_names(run: Run, case: Case) -> None:
    (case.folder / "elsewhere").mkdir()
    for name in ("old.safetensors", "new.safetensors"):
        target, link = case.folder / "elsewhere" / name, case.folder / f"link-{name}"
        link.symlink_to(target)
        if name == "old.safetensors":
            target.write_text("what was there")
        assert run(*case.route(1, output=link))[0] == 0
        assert link.is_symlink()
        assert target.stat().st_size > 100


def test_route_says_that_token_ids_are_not_used(run: Run, case: Case) -> None:
    code, _, err = run(*case.route(1, token_ids=case.folder / "tokens.npy"))
    assert code == 0
    assert err == "dsv4-router: --token-ids is not used: the layer is dense\n"
    assert_routed(case.output(), case.expected_dense())


def test_route_output_is_whole_or_not_there(run: Run, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    output = case.folder / "out.safetensors"
    output.write_text("what was there")
    before = sorted(case.folder.iterdir())

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    assert_one_line_error(run(*case.route(1)), "No space left on device")
    assert output.read_text() == "what was there"
    assert sorted(case.folder.iterdir()) == before


def write_bad_inputs(case: Case) -> None:
    folder, hidden = case.folder, case.dense.hidden_states
    (folder / "empty.safetensors").touch()
    (folder / "empty.npy").touch()
    numpy.savez(folder / "zip.npz", hidden.float().numpy())
    (folder / "zip.npz").rename(folder / "zip.npy")
    (folder / "cut.safetensors").write_bytes((folder / "x1.safetensors").read_bytes()[:-1])
    numpy.save(folder / "cut.npy", hidden.float().numpy())
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-1])
    numpy.save(folder / "objects.npy", numpy.array([{}]), allow_pickle=True)
    (folder / "text.npy").write_text("no array at all, but text")
    (folder / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', ")
    (folder / "text.safetensors").write_text("no tensors at all, but text")
    numpy.save(folder / "double.npy", hidden.double().numpy())
    numpy.save(folder / "narrow.npy", hidden.float().numpy()[:, :63])
    numpy.save(folder / "flat.npy", hidden.float().numpy()[0])
    numpy.save(folder / "few.npy", case.hashed.token_ids.numpy()[:5])
    numpy.save(folder / "real.npy", numpy.zeros(TOKENS))
    save_file({"a": hidden, "b": hidden.clone()}, folder / "two.safetensors")
    save_file({"hidden_states": hidden.half()}, folder / "half.safetensors")


@pytest.mark.parametrize(
    ("layer", "option", "value", "expected"),
    [
        (0, "token_ids", None, "--token-ids: expected a file"),
        (0, "token_ids", "few.npy", "--token-ids: expected one for each of the 23 hidden states, got 5"),
        (0, "token_ids", "real.npy", "--token-ids: expected int32 or int64 token ids, got float64 [23]"),
        (0, "token_ids", "narrow.npy", "--token-ids: expected int32 or int64"),
        (0, "token_ids", "absent.npy", "--token-ids: no such file"),
        (0, "backend", "cublas", "--backend: expected 'auto'"),
        (1, "backend", "cublas", "backend='cublas' cannot serve this call"),
        (1, "hidden_states", "empty.safetensors", "--hidden-states: expected a safetensors file"),
        (1, "hidden_states", "empty.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "zip.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "cut.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "objects.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "cut.safetensors", "--hidden-states: expected a safetensors file"),
        (1, "hidden_states", "text.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "header.npy", "--hidden-states: expected a .npy file"),
        (1, "hidden_states", "text.safetensors", "--hidden-states: expected a safetensors file"),
        (1, "hidden_states", "config.json", "--hidden-states: expected a .safetensors"),
        (1, "hidden_states", "absent.safetensors", "--hidden-states: no such file"),
        (1, "hidden_states", "two.safetensors", "expected a tensor 'hidden_states' in"),
        (1, "hidden_states", "two.safetensors:c", "chooses one of its tensors: a, b"),
        (1, "hidden_states", "half.safetensors", "--hidden-states: expected bfloat16 or float32"),
        (1, "hidden_states", "double.npy", "got float64 [23, 64]"),
        (1, "hidden_states", "narrow.npy", "expected hidden states [N, 64], got float32 [23, 63]"),
        (1, "hidden_states", "flat.npy", "expected hidden states [N, 64], got float32 [64]"),
        (1, "layer", "2", ""),
        (1, "layer", "layers.7.ffn.gate", "layers.7.ffn.gate"),
        (1, "checkpoint", "absent", "absent"),
        (1, "checkpoint", "text.safetensors", "text.safetensors"),
        (1, "config", "absent.json", "absent.json"),
        (1, "config", "text.npy", "expected a JSON file"),
        (1, "device", "cuda:99", "--device: expected a usable device"),
        (1, "output", "absent/out.safetensors", "--output: no such folder"),
        (1, "output", ".", "--output: expected a regular file"),
        (1, "output", "/dev/null", "--output: expected a regular file"),
        (1, "output", "x1.safetensors", "--output: expected a file of its own"),
        (1, "output", "model.safetensors", "--output: expected a file of its own"),
        (1, "output", "config.json", "--output: expected a file of its own"),
        (1, "output", "/proc/out.safetensors", "/proc"),
    ],
)
def test_route_errors(
    run: Run, case: Case, monkeypatch: pytest.MonkeyPatch, layer: int, option: str, value: str | None, expected: str
) -> None:
    write_bad_inputs(case)
    monkeypatch.chdir(case.folder)
    before = sorted(case.folder.iterdir())
    assert_one_line_error(run(*case.route(layer, **{option: value})), expected)
    assert sorted(case.folder.iterdir()) == before


def test_route_bfloat16_hidden_states_with_float32_gate(run: Run, case: Case) -> None:
    dense = case.dense._replace(gate_weight=case.dense.gate_weight.float())
    write_checkpoint(dataclasses.replace(case, dense=dense))
    assert_one_line_error(run(*case.route(1)), "--hidden-states: expected float32", "got bfloat16")


def test_route_names_the_paths_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the last batch may be small, and float32 hidden states take another path."""
    found = dispatch.Availability("cuda:0", compute_capability=(9, 0))
    monkeypatch.setattr(dispatch, "availability", lambda device: found)
    router = DenseRouter(RouterConfig(1024, 32, 4, 1.5))
    for dtype, paths in ((torch.bfloat16, ["cublas+decode", "decode"]), (torch.float32, ["cublas", "cublas"])):
        save_file({"x": torch.zeros(3, 1024, dtype=dtype)}, tmp_path / "x.safetensors")
        hidden = cli.FileRows("--hidden-states", str(tmp_path / "x.safetensors"), "x")
        job = cli.RouteJob(router, hidden, None, torch.int32, "auto", False)
        assert [job.path({8192, 17}), job.path({17})] == paths


def test_route_hash_layer_is_not_batch_invariant_on_a_cpu(run: Run, case: Case) -> None:
    assert_one_line_error(run(*case.route(0), "--batch-invariant"), "not batch-invariant")


MEASURED = """
import re, sys
from dsv4_router import cli
sys.argv = ["dsv4-router", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
status = open("/proc/self/status").read()  # getrusage would count what the parent had at the fork
print("most memory, MiB:", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024)
"""


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_route_of_a_long_input_takes_little_memory(tmp_path: Path, ending: str) -> None:
    """40 MiB of hidden states, 2 or 4 MiB at a time, against the first of these alone."""
    hidden_size, rows = 1024, {".safetensors": 20 << 10, ".npy": 10 << 10}[ending]
    config = {"hidden_size": hidden_size, "n_routed_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 1}
    config |= {"routed_scaling_factor": 1.5, "vocab_size": 50, "num_hash_layers": 0, "scoring_func": "sqrtsoftplus"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gate = torch.randn(16, hidden_size).bfloat16()
    state = {"layers.0.ffn.gate.weight": gate, "layers.0.ffn.gate.bias": torch.zeros(16)}
    save_file(state, tmp_path / "model.safetensors")
    memory = []
    for num_tokens in (1024, rows):
        path = tmp_path / f"x{num_tokens}{ending}"
        if ending == ".npy":
            numpy.save(path, numpy.ones((num_tokens, hidden_size), dtype=numpy.float32))
        else:
            save_file({"hidden_states": torch.ones(num_tokens, hidden_size, dtype=torch.bfloat16)}, path)
        options = ["--checkpoint", str(tmp_path), "--layer", "0", "--hidden-states", str(path)]
        options += ["--batch-tokens", "1024", "--output", str(tmp_path / "out.safetensors")]
        command = [sys.executable, "-c", MEASURED, "route", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        memory.append(int(done.stdout.split()[-1]))
    assert memory[1] - memory[0] < 24, memory
