# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What every error about an argument says: which one, what was expected, what came."""

from __future__ import annotations

import torch


class BackendUnavailableError(RuntimeError):
    """A path that was asked for by name cannot serve the call; the message says why."""


def describe(value: object) -> str:
    """A short account of a value: dtype, shape, strides and device of a tensor, the type and value of others."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:  # which has neither shape nor strides
            return f"nested {dtype} on {value.device}"
        strides = f"strides {list(value.stride())}" if value.layout is torch.strided else f"layout {value.layout}"
        return f"{dtype} {list(value.shape)} with {strides} on {value.device}"
    try:
        text = repr(value)
    except ValueError:  # of an int with thousands of digits
        text = "too long to print"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def type_error(argument: str, expected: str, got: object) -> TypeError:
    """``TypeError: argument: expected ..., got ...``."""
    return TypeError(f"{argument}: expected {expected}, got {describe(got)}")


def value_error(argument: str, expected: str, got: object) -> ValueError:
    """``ValueError: argument: expected ..., got ...``."""
    return ValueError(f"{argument}: expected {expected}, got {describe(got)}")
