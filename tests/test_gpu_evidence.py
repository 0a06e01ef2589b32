# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The committed record of the GPU run belongs to these sources and these tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import gpu_evidence
import pytest


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    assert gpu_evidence.RECORD.exists(), "no GPU run is recorded: run `pytest -m gpu` on a machine with a GPU"
    loaded: dict[str, Any] = json.loads(gpu_evidence.RECORD.read_text())
    return loaded


def test_record_is_of_these_sources(record: dict[str, Any]) -> None:
    assert record["source_hash"] == gpu_evidence.source_hash(), (
        "kernels, launching code or GPU tests changed since the recorded run: run `pytest -m gpu` on a GPU"
    )


def test_record_was_not_edited(record: dict[str, Any]) -> None:
    assert record["seal"] == gpu_evidence.seal(record)


def test_record_holds_every_gpu_test(record: dict[str, Any]) -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=gpu_evidence.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    node_ids = [line for line in listing.splitlines() if "::" in line]
    assert record["tests"] == {
        "passed": len(node_ids),
        "failed": 0,
        "skipped": 0,
        "hash": gpu_evidence.tests_hash(node_ids),
    }
    assert len(node_ids) > 500


@pytest.mark.parametrize("key", ["gpu", "date", "tests", "source_hash"])
def test_an_edit_breaks_the_seal(record: dict[str, Any], key: str) -> None:
    assert gpu_evidence.seal(record | {key: "edited"}) != record["seal"]


def test_the_hash_covers_kernels_and_launching_code() -> None:
    names = {path.relative_to(gpu_evidence.ROOT).as_posix() for path in gpu_evidence.source_files()}
    kernels = {f"kernels/{path.name}" for path in (gpu_evidence.ROOT / "kernels").iterdir() if path.is_file()}
    assert kernels | {"src/dsv4_router/api.py", "src/dsv4_router/backends/cuda_module.py"} <= names
