# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The record of a GPU run: what ran, on which GPU, on which sources.

A run of the whole GPU suite in which every test passed writes ``tests/gpu_evidence.json``; a partial run, a failure or
a skip writes nothing. On machines without a GPU, ``tests/test_gpu_evidence.py`` compares the record with the tree: it
fails when a kernel, the host code that launches it or a GPU test changed since, when the set of GPU tests differs, and
when the file was edited (``seal`` is a hash of everything else in it).
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_evidence.json"
# What a GPU run vouches for: the kernels, the package, and the tests themselves.
SOURCES = ("kernels/*", "src/dsv4_router/**/*.py", "tests/gpu/*", "tests/conftest.py", "tests/routing_helpers.py")
PACKAGES = (
    "torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cutlass-dsl", "apache-tvm-ffi", "pytest",
)  # fmt: skip


def source_files() -> list[Path]:
    """The files of :data:`SOURCES`, sorted."""
    return sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file())


def source_hash() -> str:
    """The SHA-256 of the names and contents of :func:`source_files`."""
    digest = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def tests_hash(node_ids: list[str]) -> str:
    """The SHA-256 of a set of test ids."""
    return hashlib.sha256("\n".join(sorted(node_ids)).encode()).hexdigest()


def seal(record: dict[str, Any]) -> str:
    """The SHA-256 of a record without its seal."""
    body = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def make_record(node_ids: list[str], seconds: float, processes: int = 1) -> dict[str, Any]:
    """The record of a run in which exactly these tests passed, on the current device, by that many processes."""
    import torch

    from dsv4_router import jit_cache

    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": list(torch.cuda.get_device_capability()),
        "versions": jit_cache.versions_of(PACKAGES) | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        "processes": processes,
        "tests": {"passed": len(node_ids), "failed": 0, "skipped": 0, "hash": tests_hash(node_ids)},
        "source_hash": source_hash(),
    }
    return record | {"seal": seal(record)}


class Recorder:
    """The pytest plugin that writes the record."""

    def __init__(self, config: pytest.Config) -> None:
        options = config.option
        narrowing = ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly")
        self.complete = not any(getattr(options, name, None) for name in narrowing)
        self.complete &= options.markexpr in ("", "gpu") and config.args_source.name == "TESTPATHS"
        self.path = Path(options.evidence) if options.evidence else RECORD
        self.collected: list[str] = []
        self.passed: list[str] = []
        self.processes = 0  # of pytest-xdist
        self.start = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = [item.nodeid for item in session.items if item.get_closest_marker("gpu") is not None]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collected = ids
        self.processes += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "gpu" in report.keywords:
            self.passed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.complete and exitstatus == 0 and self.collected and sorted(self.passed) == sorted(self.collected):
            record = make_record(self.passed, time.monotonic() - self.start, max(1, self.processes))
            self.path.write_text(json.dumps(record, indent=1) + "\n")
