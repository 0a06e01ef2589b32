# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""compute-sanitizer over every kernel, and the command line, in processes of their own on a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_is_clean(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(sanitizer).exists(), "needs compute-sanitizer, which comes with the CUDA toolkit"
    script = Path(__file__).parent / "sanitized_calls.py"
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # cuda-bindings probes for driver entry points that an older driver lacks
        options += ["--report-api-errors", "no"]
    result = run(sanitizer, *options, sys.executable, str(script))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards" in result.stdout, result.stdout[-3000:]
    assert "kernels launched" in result.stdout


@pytest.mark.parametrize("command", ["demo", "info", "verify"])
def test_command_line(command: str) -> None:
    result = run(sys.executable, "-m", "dsv4_router.cli", command)
    assert result.returncode == 0, result.stdout + result.stderr
    if command != "info":
        assert "cublas" in result.stdout
