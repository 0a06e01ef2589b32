# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What all GPU tests share: their kernels are compiled beside them, by processes of their own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from dsv4_router import decode_config, dispatch, logits_config
from dsv4_router.config import PRESETS, RouterConfig

_COMPILE = """
import pickle, sys
from dsv4_router import startup
models, architecture = pickle.load(sys.stdin.buffer)
for model in models:
    for job in startup.jobs(model, architecture):
        job.object_code()
"""
_MOST_PROCESSES = 8


def _named_models(items: list[pytest.Item]) -> list[RouterConfig]:
    """The models that tests are parametrized with, in the order of the tests."""
    given = [value for item in items for value in getattr(getattr(item, "callspec", None), "params", {}).values()]
    models = [*PRESETS.values(), *(value for value in given if isinstance(value, RouterConfig))]
    sizes: dict[tuple[int, int, int], RouterConfig] = {}
    for model in models:
        sizes.setdefault((model.hidden_size, model.num_experts, model.top_k), model)
    return list(sizes.values())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, those under compute-sanitizer: processes that share the tests end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_tools.py")


@pytest.fixture(scope="session")
def served_by_decode() -> None:
    """Skips tests of the decode path on other GPUs."""
    target = dispatch.architecture(torch.cuda.get_device_capability())
    if target not in decode_config.ARCHITECTURES:
        pytest.skip(f"needs a GPU of {', '.join(decode_config.ARCHITECTURES)}; this one is {target}")


@pytest.fixture(scope="session")
def served_by_dense_logits() -> None:
    """Skips tests of the kernel for more rows on other GPUs."""
    target = dispatch.architecture(torch.cuda.get_device_capability())
    if target not in logits_config.ARCHITECTURES:
        pytest.skip(f"needs a GPU of {', '.join(logits_config.ARCHITECTURES)}; this one is {target}")


@pytest.fixture(autouse=True, scope="session")
def _kernels_are_compiled_beside_the_tests(request: pytest.FixtureRequest, _own_kernel_cache: None) -> Any:
    """Into the tests' own cache folder; a test that needs a kernel first compiles it, or waits for its lock.

    A process that fails changes no outcome: then the test compiles what it needs, and shows the error.
    """
    architecture = dispatch.architecture(torch.cuda.get_device_capability())
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if not is_first or architecture not in decode_config.ARCHITECTURES or dispatch.missing_cutlass_dsl() is not None:
        yield
        return
    models = _named_models(request.session.items)
    count = min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2, len(models))
    processes = []
    for first in range(count):
        process = subprocess.Popen([sys.executable, "-c", _COMPILE], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        with process.stdin as pipe:
            pickle.dump((models[first::count], architecture), pipe)
        processes.append(process)
    yield
    for process in processes:
        process.kill()
        process.wait()
