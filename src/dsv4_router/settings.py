# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The environment variables that this package reads; no other module reads any."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

CACHE_DIR_VARIABLE = "DSV4_ROUTER_CACHE_DIR"


def cache_dir() -> Path:
    """Where compiled kernels and this machine's own thresholds are kept.

    That is ``DSV4_ROUTER_CACHE_DIR``, else ``~/.cache/dsv4-router`` (XDG). A user without a home, as in some
    containers, gets a new temporary folder for each process: one of a known name could be filled by somebody else.
    """
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "dsv4-router"
    except RuntimeError:
        return _own_temporary_folder()


@cache
def _own_temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="dsv4-router-"))
