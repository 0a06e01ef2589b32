# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The Mixture-of-Experts router of DeepSeek-V4: hidden states in, expert ids and weights out.

Importing this package imports neither CUTLASS nor cuda-python and initialises no CUDA; names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .api import dense_route, dense_router_dispatch, hash_route, hash_router_dispatch
    from .config import V4_1_FLASH, V4_1_FLASH_DRAFT, V4_FLASH, V4_PRO, RouterConfig
    from .dispatch import Plan, explain
    from .errors import BackendUnavailableError
    from .kernels.dense_router_decode import DenseRouterDecodeKernel
    from .modules import DenseRouter, HashRouter, Router
    from .startup import compile_ahead, warmup

__version__ = "0.2.0"

_EXPORTS = {
    "BackendUnavailableError": "errors",
    "DenseRouter": "modules",
    "DenseRouterDecodeKernel": "kernels.dense_router_decode",
    "HashRouter": "modules",
    "Plan": "dispatch",
    "Router": "modules",
    "RouterConfig": "config",
    "V4_1_FLASH": "config",
    "V4_1_FLASH_DRAFT": "config",
    "V4_FLASH": "config",
    "V4_PRO": "config",
    "compile_ahead": "startup",
    "dense_route": "api",
    "dense_router_dispatch": "api",
    "explain": "dispatch",
    "hash_route": "api",
    "hash_router_dispatch": "api",
    "warmup": "startup",
}

__all__ = [  # noqa: RUF022 - grouped as in README.md
    "dense_route",
    "dense_router_dispatch",
    "hash_route",
    "hash_router_dispatch",
    "explain",
    "Plan",
    "BackendUnavailableError",
    "RouterConfig",
    "V4_FLASH",
    "V4_PRO",
    "V4_1_FLASH",
    "V4_1_FLASH_DRAFT",
    "Router",
    "DenseRouter",
    "HashRouter",
    "DenseRouterDecodeKernel",
    "warmup",
    "compile_ahead",
    "reference",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(f"{__name__}.reference")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
