# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What a profiling session starts, as far as it goes without a GPU: SASS by phase, usage, errors, the scripts' flow."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled_kernels import Compiled, disassemble, nvdisasm

from dsv4_router import decode_config, reference
from dsv4_router.backends import decode
from dsv4_router.config import PRESETS
from dsv4_router.profiling import dump_sass, peers, phases, profile_call, timing

FOLDER = Path(__file__).resolve().parent.parent / "profiling"
STUB = """#!/usr/bin/env bash
echo "$*" >>"{folder}/asked"
case "$*" in
  *"--page source"*) cat "{folder}/samples.csv" ;;
  *"--page details"*) echo '  kernel (1, 1, 1)x(1, 1, 1), Context 1, Stream 7'; echo '    Duration  us  4.5'
    echo '    Other  1' ;;
  *--export*) while [[ $1 != --export ]]; do shift; done; echo report >"$2" ;;
esac
"""


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(texts, capture_output=True, text=True, timeout=60, env=environment)


def test_another_checkout_is_not_mistaken_for_the_installed_package(tmp_path: Path) -> None:
    other = tmp_path / "profiling"
    shutil.copytree(FOLDER, other, ignore=shutil.ignore_patterns("results", "plots", "out"))
    done = run(sys.executable, other / "dump_sass.py", "-h")
    assert done.returncode == 1
    assert re.fullmatch(r"dump_sass\.py: expected dsv4_router of this checkout, got .*\n", done.stderr)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{}\n")
    for file, says in (("none.jsonl", "No such file"), ("other.jsonl", "expected a line of the benchmark")):
        done = run(sys.executable, FOLDER / "plots.py", tmp_path / file, "--out", tmp_path)
        assert done.returncode == 1
        assert re.fullmatch(rf"plots\.py: .*{says}.*\n", done.stderr)


def summary_of(name: str, kernel: str, tokens: int = 16) -> tuple[dict[str, int], str]:
    """The numbers of a summary, and all that was printed; the listing goes into the file ``name``."""
    options = "--kernel", kernel, "--tokens", tokens, "--arch", "sm_90a", "--out", name
    done = run(sys.executable, FOLDER / "dump_sass.py", *options)
    assert done.returncode == 0, done.stderr
    head, _, _ = done.stdout.partition("\n\n")
    return {word: int(number) for word, number in re.findall(r"(\w+(?: loads| stores)?) (\d+)\b", head)}, done.stdout


def test_sass_of_the_decode_kernel(tmp_path: Path) -> None:
    numbers, printed = summary_of(str(tmp_path / "listing"), "decode")
    assert numbers["HMMA"] > 0
    assert numbers["UTMALDG"] > 0
    assert numbers["local loads"] == numbers["local stores"] == numbers["stack"] == 0
    assert 32 <= numbers["registers"] <= 255
    shares = {name: int(count) for name, count in re.findall(r"^([\w-]+(?: alone)?)\s+(\d+)", printed, re.MULTILINE)}
    assert shares.keys() >= {"set-up", "load", "MMA", "hand-off", "select", "row alone"}
    assert (
        sum(shares[phase] for phase in ("set-up", "load", "MMA", "hand-off", "select", "row alone"))
        == (numbers["instructions"])
    )
    listing = (tmp_path / "listing").read_text()
    blocks = set(re.findall(r"^== (.+)$", listing, re.MULTILINE))
    assert {"load: load_gate", "load: multiply", "MMA: multiply", "hand-off: collect", "select: choose"} <= blocks
    assert len(re.findall(r"^\s+[0-9a-f]{4,}  .*dense_router_decode\.py:\d+$", listing, re.MULTILINE)) > 300
    parts = re.split(r"^== ", listing, flags=re.MULTILINE)
    assert {part.partition(":")[0] for part in parts if "UTMALDG" in part} == {"load"}
    assert {part.partition(":")[0] for part in parts if "HMMA" in part} == {"MMA", "row alone"}


def test_sass_of_the_topk_kernel(tmp_path: Path) -> None:
    numbers, printed = summary_of(str(tmp_path / "listing"), "activation_topk")
    assert numbers["HMMA"] == numbers["UTMALDG"] == 0
    assert numbers["REDUX"] == 6
    assert numbers["local loads"] == numbers["local stores"] == numbers["stack"] == 0
    assert {"load_slots", "sort_descending", "sqrt_softplus", "activation_topk"} <= set(printed.split())
    assert "router_math.cuh:" in (tmp_path / "listing").read_text()


def test_sass_of_the_logits_kernel(tmp_path: Path) -> None:
    numbers, printed = summary_of(str(tmp_path / "listing"), "dense_logits", 512)
    assert numbers["HGMMA"] == 8 * 7  # chunks of a slice of V4-Pro
    assert numbers["UTMALDG"] == 4
    assert numbers["local loads"] == numbers["local stores"] == numbers["stack"] == 0
    assert {"load", "mma", "add", "exchange_pair"} <= set(printed.split())
    parts = re.split(r"^== ", (tmp_path / "listing").read_text(), flags=re.MULTILINE)
    assert {part.partition("\n")[0].rpartition(" ")[2] for part in parts if "UTMALDG" in part} == {
        "load_gate",
        "load_rows",
    }


def test_sass_of_the_hash_kernel() -> None:
    kernel = dump_sass.compile_kernel("hash_router", PRESETS["v4-flash"], 16, "sm_90a")
    instructions = dump_sass.annotate(dump_sass.disassemble(kernel.cubin), kernel.entry)
    assert {"hash_from_hidden", "load_chunk", "dot"} <= {each.function for each in instructions}


def sampled_csv(path: Path, instructions: list[dump_sass.Instruction]) -> None:
    """What ncu would print if every instruction had its number of samples from 1 up, all waiting for a barrier."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for kernel in ("another_kernel", "kernel_of_dense_router_decode_0"):
            writer.writerow(["Kernel Name", kernel])
            columns = ["Warp Stall Sampling (All Samples)", "# Samples", "stall_barrier", "stall_barrier_not_issued"]
            writer.writerow(["Address", "Source", *columns, "stall_wait"])
            for number, each in enumerate(instructions, 1):
                address = hex(0x7F0000000100 + each.address)
                writer.writerow([address, f"      {each.text} ", f"{number:,}", number, number, 5, 0])


@pytest.fixture(scope="module")
def instructions() -> list[dump_sass.Instruction]:
    kernel = dump_sass.compile_kernel("decode", PRESETS["v4-pro"], 16, "sm_90a")
    return dump_sass.annotate(dump_sass.disassemble(kernel.cubin), kernel.entry)


def test_samples_by_phase(instructions: list[dump_sass.Instruction], tmp_path: Path) -> None:
    sampled_csv(tmp_path / "samples.csv", instructions)
    dump_sass.add_samples(instructions, tmp_path / "samples.csv", "dense_router_decode")
    assert [each.samples[""] for each in instructions] == list(range(1, len(instructions) + 1))
    assert all(each.samples["barrier"] == each.samples[""] for each in instructions)
    lines = dump_sass.table(instructions, True)
    phases = dict(re.findall(r"^(\S+(?: alone)?)\s+\d+\s+(\d+)\s+\S+%  barrier ", "\n".join(lines), re.MULTILINE))
    assert sum(map(int, phases.values())) == len(instructions) * (len(instructions) + 1) // 2
    assert not [line for line in lines if "not_issued" in line or "wait " in line]
    for each in instructions:
        each.samples.clear()
    with pytest.raises(ValueError, match="0 lines of a kernel named like 'hash'"):
        dump_sass.add_samples(instructions, tmp_path / "samples.csv", "hash")
    sampled_csv(tmp_path / "samples.csv", instructions[::-1])
    with pytest.raises(ValueError, match="with the instruction expected"):
        dump_sass.add_samples(instructions, tmp_path / "samples.csv", "dense_router_decode")


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (profile_call, ["--provider", "nope"], "invalid choice: 'nope'"),
        (profile_call, [], "--provider"),
        (profile_call, ["--provider", "hash", "--chain"], "expected a provider of dense calls, got 'hash'"),
        (profile_call, ["--provider", "hash", "--tokens", "0"], "expected a number of at least 1, got '0'"),
        (dump_sass, ["--kernel", "decode", "--tokens", "x"], "expected a number of at least 1, got 'x'"),
        (dump_sass, ["--kernel", "decode", "--arch", "sm_80"], "architecture: expected one of"),
        (dump_sass, ["--kernel", "decode", "--tokens", "129", "--arch", "sm_90a"], "one launch takes 128 tokens"),
    ],
)
def test_errors_are_one_line(
    module: ModuleType, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments, "name.py")
    assert stopped.value.code == (1 if "--arch" in arguments else 2)
    printed = capsys.readouterr().err
    assert says in printed
    assert re.fullmatch(r"name\.py: .*\n", printed)


@pytest.mark.parametrize("script", ["ncu.sh", "nsys.sh"])
def test_usage_errors_of_the_shell_scripts_are_one_line(script: str) -> None:
    done = run(FOLDER / script, "--provider", "decode", "--shape", "v9")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"profile_call\.py: .*invalid choice: 'v9'.*\n", done.stderr)


def test_profile_call_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="1"):
        profile_call.main(["--provider", "decode"], "profile_call.py")
    assert capsys.readouterr().err == "profile_call.py: needs a CUDA GPU; torch sees none\n"


def test_phases_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="1"):
        phases.main(["--out", str(tmp_path / "lines")], "phases.py")
    assert capsys.readouterr().err == "phases.py: needs a CUDA GPU; torch sees none\n"
    with pytest.raises(SystemExit, match="2"):
        phases.main(["--out", str(tmp_path / "lines"), "--tokens", "8,none"], "phases.py")
    assert re.fullmatch(r"phases\.py: argument --tokens: .*none.*\n", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        phases.main(["--out", str(tmp_path / "lines"), "--tokens", "8,129"], "phases.py")
    assert re.fullmatch(r"phases\.py: argument --tokens: expected numbers up to 128, .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "name", "sass"),
    [
        ("decode", "decode-v4-pro-16-warm", "--kernel decode --shape v4-pro --tokens 16"),
        (
            "batch_invariant --tokens 129 --chain --graph",
            "batch_invariant-chain-v4-pro-129-warm-graph",
            "--kernel dense_logits --shape v4-pro --tokens 129",
        ),
        ("cublas --tokens 8", "cublas-v4-pro-8-warm", "--kernel activation_topk --shape v4-pro --tokens 8"),
        ("vllm --shape v4.1-flash --tokens 64 --cold", "vllm-v4.1-flash-64-cold", ""),
        ("hash --graph", "hash-v4-pro-16-warm-graph", "--kernel hash_router --shape v4-pro --tokens 16"),
    ],
)
def test_names_of_runs(arguments: str, name: str, sass: str, capsys: pytest.CaptureFixture[str]) -> None:
    profile_call.main(["--provider", *arguments.split(), "--name"])
    assert capsys.readouterr().out == f"{name}\n{sass}\n"


def test_the_kernel_of_a_call_on_a_gpu_of_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launch takes fewer rows than its variant, as the call itself finds."""
    monkeypatch.setattr(profile_call, "num_multiprocessors", lambda: 78)
    found = [profile_call.own_kernel("decode", PRESETS["v4-pro"], num_tokens) for num_tokens in (78, 79)]
    assert found == ["decode", "dense_logits"]
    with pytest.raises(ValueError, match="one launch takes 78 tokens, got 79"):
        dump_sass.compile_kernel("decode", PRESETS["v4-pro"], 79, "sm_90a")


@pytest.mark.parametrize("provider", ["reference", "hash", "batch_invariant", "pytorch", "peer"])
def test_calls_are_right(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the same entry points take plain PyTorch."""

    def topk(logits: torch.Tensor, bias: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        scores = reference.scores(logits)
        ids = (scores + bias).topk(peers.TOP_K).indices
        return reference.normalize(scores.gather(1, ids), scaling), ids

    monkeypatch.setattr(timing, "cold_weights", lambda weight: [weight, weight])
    peer = peers.Peer("peer", lambda hidden, gate: hidden.float() @ gate.float().T, topk)
    monkeypatch.setattr(profile_call, "FINDERS", {"peer": lambda: peer})
    call, num_weights, compare = profile_call.make_subject(provider, PRESETS["v4-flash"], 3, False, "cpu")
    assert num_weights == 2
    assert compare(*call(1)).ok


def test_phases_of_stamps() -> None:
    """Of two launches of a block of 9 warps, whose clock comes round in the first, at 1.5 GHz."""
    stamps = torch.zeros(2, 9, 8, dtype=torch.long)
    start = torch.tensor([(1 << 32) - 100, 5000])[:, None]
    for which, cycles in enumerate([0, 300, 700, 1900, 2400]):
        stamps[:, :, which] = start + cycles
    stamps[:, 1:, 0] += 20  # other warps return from the wait later,
    stamps[:, 8, 0] -= 90  # the last one has not even waited,
    stamps[:, 3, 2] += 50  # one has its sums later,
    stamps[:, 5, 3] += 100  # one its packets;
    stamps[:, 4:, 1] = 0  # only some wait for the hidden states,
    stamps[:, 1:, 4] = 0  # and only warp 0 stores outputs
    stamps[:, 0, 5:7] = torch.tensor([[(1 << 32) - 600, 1000], [7000, 8600]])
    stamps &= 0xFFFFFFFF
    cycles, ghz = phases.phases(stamps)
    assert cycles == {"load": 300, "MMA": 450, "hand-off": 1250, "select": 400}
    assert ghz == pytest.approx(1.5)


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_the_kernel_with_stamps(rows: int, tmp_path: Path) -> None:
    """The shipped kernel, but that it reads the clock and stores it."""
    from dsv4_router.profiling.stamped_kernel import StampedDecodeKernel

    config = decode_config.variant(7168, 384, 6, rows, "sm_90a")
    compiled = []
    for number, kernel in enumerate((None, StampedDecodeKernel)):
        code, _ = decode.compile_object(config, "sm_90a", decode_kernel=kernel)
        compiled.append(Compiled(code, 0.0, "", disassemble(nvdisasm(), tmp_path, (number, code))))
    shipped, stamped = compiled
    for same in ("HMMA", "HGMMA", "UTMALDG", "UBLKCP", "ATOMG", "LDG", "MUFU", "BAR"):
        assert stamped.count(same) == shipped.count(same), same
    chosen_alone, another_product = 2, rows == 8  # rows that are computed alone, and that come one by one
    assert stamped.count("STG") == shipped.count("STG") + 7 + chosen_alone + another_product


@pytest.mark.parametrize("script", ["ncu.sh", "nsys.sh"])
def test_shell_scripts(script: str) -> None:
    assert run("bash", "-n", FOLDER / script).returncode == 0
    assert os.access(FOLDER / script, os.X_OK)
    usage = run(FOLDER / script, "-h", PYTHON="no-such-python")
    assert usage.returncode == 0
    assert f"profiling/{script} --provider decode|cublas|..." in usage.stdout
    assert usage.stdout.rstrip().endswith(("of own kernels", "for ui.perfetto.dev."))
    assert "set -euo" not in usage.stdout


def test_ncu_that_is_missing(tmp_path: Path) -> None:
    missing = run(FOLDER / "ncu.sh", "--provider", "decode", NCU=str(tmp_path / "ncu"), OUT=str(tmp_path))
    assert missing.returncode == 1
    assert re.fullmatch(r"ncu\.sh: Nsight Compute is missing: .*\n", missing.stderr)


def test_ncu_session(instructions: list[dump_sass.Instruction], tmp_path: Path) -> None:
    """With a stand-in for ncu: what it is asked for, and what is made of its answers."""
    sampled_csv(tmp_path / "samples.csv", instructions)
    stub = tmp_path / "ncu"
    stub.write_text(STUB.format(folder=tmp_path))
    stub.chmod(0o755)
    out = tmp_path / "out"
    done = run(FOLDER / "ncu.sh", "--provider", "decode", "--cold", NCU=str(stub), OUT=str(out))
    if torch.cuda.is_available() and "with the instruction expected" in done.stderr:  # of a GPU of another architecture
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    wanted = "--clock-control none --cache-control all --profile-from-start off --nvtx --set full"
    assert wanted in asked[0]
    assert asked[0].endswith("profile_call.py --calls 1 --provider decode --cold")
    assert "Duration" in done.stdout
    assert "Other" not in done.stdout
    assert re.search(r"^hand-off +\d+ +\d+ +[\d.]+%  barrier", done.stdout, re.MULTILINE)
    files = {path.name for path in out.iterdir()}
    assert files == {f"decode-v4-pro-16-cold.{end}" for end in ("ncu-rep", "txt", "sass.csv", "sass")}


def test_nsys_session(tmp_path: Path) -> None:
    stub = tmp_path / "nsys"
    stub.write_text(STUB.format(folder=tmp_path))
    stub.chmod(0o755)
    done = run(FOLDER / "nsys.sh", "--provider", "cublas", "--graph", NSYS=str(stub), OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    profile, stats = (tmp_path / "asked").read_text().splitlines()
    assert "--trace cuda,nvtx" in profile
    assert "--capture-range cudaProfilerApi" in profile
    assert profile.endswith("profile_call.py --provider cublas --graph")
    assert stats.endswith("cublas-v4-pro-16-warm-graph.nsys-rep")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would record a timeline")
def test_nsys_that_is_missing(tmp_path: Path) -> None:
    missing = run(FOLDER / "nsys.sh", "--provider", "decode", NSYS=str(tmp_path / "nsys"), OUT=str(tmp_path / "out"))
    said = missing.stderr.splitlines()
    assert "torch.profiler takes its place" in said[0]
    assert said[1:] == ["profile_call.py: needs a CUDA GPU; torch sees none"]
