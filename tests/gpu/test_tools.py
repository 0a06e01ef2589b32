# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""compute-sanitizer over every kernel, and the command line, in processes of their own on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from dsv4_router import decode_config, dispatch
from dsv4_router.config import PRESETS
from dsv4_router.profiling import profile_call

pytestmark = pytest.mark.gpu


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=400)


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(sanitizer).exists(), "needs compute-sanitizer, which comes with the CUDA toolkit"
    script = Path(__file__).parent / "sanitized_calls.py"
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # cuda-bindings probes for driver entry points that an older driver lacks
        options += ["--report-api-errors", "no"]
    # Without torch's caching allocator every tensor ends where its allocation does, and a read past it is seen.
    return run(sanitizer, *options, sys.executable, str(script), *arguments, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_is_clean(tool: str) -> None:
    result = sanitize(tool)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"ERROR SUMMARY: 0 errors|\b0 hazards", result.stdout), result.stdout[-3000:]
    assert "kernels launched" in result.stdout


def test_compute_sanitizer_would_see_a_read_past_the_table() -> None:
    result = sanitize("memcheck", "read-past-the-table")
    assert "Invalid __global__ read" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
    assert "hash_gather" in result.stdout


LOOKED_AT = [*profile_call.OWN, "batch_invariant", "pytorch"]


@pytest.mark.parametrize(("provider", "chain"), [*product(LOOKED_AT, (False, True)), ("hash", False)])
@pytest.mark.usefixtures("served_by_decode")
def test_what_a_profiler_looks_at_is_right(provider: str, chain: bool) -> None:
    call, num_weights, compare = profile_call.make_subject(provider, PRESETS["v4-flash"], 16, chain, "cuda")
    assert num_weights >= 40
    assert compare(*call(0)).ok


@pytest.mark.usefixtures("served_by_decode")
def test_phases_of_the_decode_kernel(tmp_path: Path) -> None:
    """In a process of its own, for the kernel with time stamps takes the shipped one's place there."""
    file = tmp_path / "lines"
    command = ["--shape", "v4-flash", "--tokens", "1,64", "--out", str(file)]
    result = run(sys.executable, "-m", "dsv4_router.profiling.phases", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["num_tokens"], line["cache"]) for line in lines] == [
        (tokens, cache) for tokens in (1, 64) for cache in ("warm", "cold")
    ]
    for line in lines:
        assert list(line["phases_us"]) == ["launch", "load", "MMA", "hand-off", "select"]
        assert sum(line["phases_us"].values()) == pytest.approx(line["us"], abs=0.005)
        assert all(0.03 < us < 10 for us in line["phases_us"].values()), line
        assert 0.5 < line["sm_ghz"] < 4


@pytest.mark.parametrize("command", ["demo", "info", "verify"])
def test_command_line(command: str) -> None:
    result = run(sys.executable, "-m", "dsv4_router.cli", command)
    assert result.returncode == 0, result.stdout + result.stderr
    if command == "demo":
        assert re.search(r"^Path: (decode|cublas): ", result.stdout, re.MULTILINE), result.stdout
    served = dispatch.architecture(torch.cuda.get_device_capability()) in decode_config.ARCHITECTURES
    if command == "verify" and served:
        assert "not available" not in result.stdout, result.stdout
