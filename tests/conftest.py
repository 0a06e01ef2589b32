# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Seeds from test ids, the ``gpu`` marker, and the record of a complete GPU run. Asks no device at import."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

# `python -m pytest` puts the checkout on the path, where the folder kernels/ would pass for PyPI's package `kernels`,
# which transformers looks for.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def _load(name: str) -> Any:
    """A module of this folder that is no test; the import mode puts the folder on no path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_evidence = _load("gpu_evidence")
_load("routing_helpers")
cli_helpers = _load("cli_helpers")
_load("compiled_kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="added to the seed that each test takes from its id")
    parser.addoption("--random-sizes", type=int, default=8, help="how many sizes test_random_sizes.py draws (8)")
    parser.addoption("--evidence", default=None, help="where a complete GPU run is recorded (tests/gpu_evidence.json)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(cli_helpers, "cli_helpers")
    if not hasattr(config, "workerinput"):  # of pytest-xdist: then another process records
        config.pluginmanager.register(gpu_evidence.Recorder(config), "gpu_evidence")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own: from its id and ``--seed``."""
    given: int = request.config.getoption("--seed")
    return zlib.crc32(request.node.nodeid.encode()) + given


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")
    if item.get_closest_marker("multi_gpu") is not None and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA GPUs; torch sees {torch.cuda.device_count()}")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """Random numbers of the test's own; ``seed`` is made from the test's id."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def medium_precision() -> Any:
    """The process has asked for bf16 inside products of fp32 matrices."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, own = torch.get_float32_matmul_precision(), matmul.fp32_precision
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)
    matmul.fp32_precision = own


@pytest.fixture(autouse=True, scope="session")
def _own_kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tests compile into a folder of their own, so that a stale entry of the user's cache proves nothing.

    Processes that share the tests share it.
    """
    from dsv4_router.settings import CACHE_DIR_VARIABLE

    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "kernel-cache"
        folder.mkdir(exist_ok=True)
    else:
        folder = tmp_path_factory.mktemp("kernel-cache")
    patch = pytest.MonkeyPatch()
    patch.setenv(CACHE_DIR_VARIABLE, str(folder))
    yield
    patch.undo()
