# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiling ahead of the first call: on a build machine, or when a server starts."""

from __future__ import annotations

import torch

from . import decode_config, dispatch
from .backends import decode
from .config import RouterConfig
from .errors import BackendUnavailableError, type_error, value_error


def compile_ahead(config: RouterConfig, architecture: str) -> list[decode.Config]:
    """Fills the disk cache with a model's kernels of the decode path, also on a machine without a GPU.

    An entry serves processors with the same instructions as this one, for it holds host code too.

    Args:
        config: the router's sizes.
        architecture: the target, one of ``sm_90a``, ``sm_100a``, ``sm_103a``, ``sm_120a``.

    Returns:
        The kernels that were compiled or found: one for each token tile that fits the architecture and, on
        ``sm_90a``, the one for more rows.

    Raises:
        TypeError, ValueError: an argument is wrong, or the one-launch kernel does not serve these sizes.
        BackendUnavailableError: CUTLASS DSL is not installed.
    """
    if not isinstance(config, RouterConfig):
        raise type_error("config", "a RouterConfig", config)
    if not isinstance(architecture, str):
        raise type_error("architecture", f"one of {decode_config.ARCHITECTURES}", architecture)
    if architecture not in decode_config.ARCHITECTURES:
        raise value_error("architecture", f"one of {decode_config.ARCHITECTURES}", architecture)
    sizes = config.hidden_size, config.num_experts, config.top_k
    if (why := decode_config.unsupported_shape(*sizes) or decode_config.too_large(*sizes, architecture)) is not None:
        raise ValueError(f"config: {why}")
    if (why := dispatch.missing_cutlass_dsl()) is not None:
        raise BackendUnavailableError(why)
    configs = decode.kernels_of(*sizes, architecture)
    for kernel in configs:
        decode.object_code(kernel, architecture)
    return configs


def warmup(config: RouterConfig, device: torch.device | str) -> dispatch.Plan:
    """Prepares a device for a model's dense calls: no later one on the decode path compiles or makes a workspace.

    Loads the path's kernels (compiling those that the disk cache lacks, a few seconds each) and makes the workspace of
    the current stream. Only a call of more rows than one launch takes may still compile its top-k (under a second), if
    it wants logits or its bias is not aligned to 16 bytes. Call it in each process, and with each stream that routes
    eagerly current. Where the decode path cannot serve the model, nothing is done; the plan says why.

    Args:
        config: the router's sizes.
        device: the device that will route.

    Returns:
        The plan of a one-token call.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    plan = dispatch.explain(config, 1, device)
    if plan.path == "decode":
        index = torch.device(plan.availability.device).index
        decode.warmup(index, config.hidden_size, config.num_experts, config.top_k)
    return plan
