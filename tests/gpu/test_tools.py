# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""compute-sanitizer over every kernel, and the command line, in processes of their own on a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4_router import decode_config, dispatch

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
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards" in result.stdout, result.stdout[-3000:]
    assert "kernels launched" in result.stdout


def test_compute_sanitizer_would_see_a_read_past_the_table() -> None:
    result = sanitize("memcheck", "read-past-the-table")
    assert "Invalid __global__ read" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
    assert "hash_gather" in result.stdout


@pytest.mark.parametrize("command", ["demo", "info", "verify"])
def test_command_line(command: str) -> None:
    result = run(sys.executable, "-m", "dsv4_router.cli", command)
    assert result.returncode == 0, result.stdout + result.stderr
    if command == "demo":
        assert re.search(r"^Path: (decode|cublas): ", result.stdout, re.MULTILINE), result.stdout
    served = dispatch.architecture(torch.cuda.get_device_capability()) in decode_config.ARCHITECTURES
    if command == "verify" and served:
        assert "not available" not in result.stdout, result.stdout
