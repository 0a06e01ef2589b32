# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Lets ``python profiling/NAME.py`` be the installed module of that name, whose imports are relative."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

PACKAGE = "dsv4_router.profiling"


def run_as_module(file: str) -> None:
    """Runs a file of this folder as a module of the package, and ends the process.

    Raises:
        SystemExit: at the end; or with a message, if a file that was named cannot be read or written, or the package is
            not installed, or from another checkout, whose kernels would be timed in the place of this one's.
    """
    path = Path(file).resolve()
    name = f"{PACKAGE}.{path.stem}"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{path.name}: {error.name} is missing: pip install -e {path.parent.parent}") from None
    installed = Path(found.origin or "").resolve() if found is not None else None
    if installed != path:
        raise SystemExit(
            f"{path.name}: expected dsv4_router of this checkout, got {installed}: "
            f"pip install -e {path.parent.parent}, or python -m {name} for that one"
        )
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path.name}: {' '.join(str(error).split())}") from None
    raise SystemExit
