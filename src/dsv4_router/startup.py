# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiling ahead of the first call: on a build machine, or when a server starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import decode_config, dispatch, thresholds
from .backends import cublas, cuda_module, decode
from .config import RouterConfig
from .errors import BackendUnavailableError, type_error, value_error
from .logits_config import LogitsConfig, logits_configs


class Job(NamedTuple):
    """A kernel to be compiled for an architecture."""

    kernel: decode.Config | cuda_module.KernelSpec
    architecture: str

    def object_code(self) -> bytes:
        """The compiled kernel, from the disk cache if it is there."""
        if isinstance(self.kernel, cuda_module.KernelSpec):
            return cuda_module.cubin(self.kernel, self.architecture)
        return decode.object_code(self.kernel, self.architecture)


def topk_kernels(
    hidden_size: int, num_experts: int, top_k: int, more_rows: Sequence[LogitsConfig]
) -> list[tuple[Any, ...]]:
    """Arguments of :func:`cublas.topk_spec` for the kernels that bf16 calls end with.

    Those of the cublas path and, where that has ``more_rows``, of the decode path. Calls that want logits, or whose
    tensors are not aligned to 16 bytes, take others.
    """
    sums: list[tuple[int, int | None]] = [(splits, None) for splits in cublas.possible_splits(hidden_size, num_experts)]
    sums += [(many.num_sums(parts), many.first_half(parts)) for many in more_rows for parts in many.parts]
    return [
        cublas.aligned_topk(num_experts, top_k, ids_dtype, splits, first_half, many_rows)
        for splits, first_half in dict.fromkeys(sums)
        for many_rows in ((False, True) if splits in thresholds.SPLITS_OF_MANY_ROWS else (False,))
        for ids_dtype in cuda_module.C_TYPES
    ]


def jobs(config: RouterConfig, architecture: str) -> list[Job]:
    """All kernels of a model's dense calls, the decode path's first; none if that path does not serve it."""
    sizes = config.hidden_size, config.num_experts, config.top_k
    kernels = decode.kernels_of(*sizes, architecture)
    more_rows = logits_configs(config.hidden_size, config.num_experts, architecture)
    specs = [cublas.topk_spec(*kernel) for kernel in topk_kernels(*sizes, more_rows)] if kernels else []
    return [Job(kernel, architecture) for kernel in (*kernels, *specs)]


def why_not(config: RouterConfig, architecture: str) -> str | None:
    """Why the one-launch kernel does not serve a model on an architecture, or None."""
    sizes = config.hidden_size, config.num_experts, config.top_k
    return decode_config.unsupported_shape(*sizes) or decode_config.too_large(*sizes, architecture)


def check_compilers() -> None:
    """Raises BackendUnavailableError if a compiler is missing."""
    if (why := dispatch.missing_cutlass_dsl() or cuda_module.missing_requirement()) is not None:
        raise BackendUnavailableError(why)


def compile_ahead(config: RouterConfig, architecture: str) -> list[decode.Config]:
    """Fills the disk cache with the kernels of a model's dense calls, also on a machine without a GPU.

    They are those of the decode path and the top-k's, but for calls that want logits or are not aligned to 16 bytes.
    An entry of the decode path serves processors with the same instructions as this one, for it holds host code too.

    Args:
        config: the router's sizes.
        architecture: the target, one of ``sm_90a``, ``sm_100a``, ``sm_103a``, ``sm_120a``.

    Returns:
        The kernels of the decode path that were compiled or found: one for each token tile that fits the architecture
        and, on ``sm_90a``, those for more rows.

    Raises:
        TypeError, ValueError: an argument is wrong, or the one-launch kernel does not serve these sizes.
        BackendUnavailableError: CUTLASS DSL or NVRTC is not installed.
    """
    if not isinstance(config, RouterConfig):
        raise type_error("config", "a RouterConfig", config)
    if not isinstance(architecture, str):
        raise type_error("architecture", f"one of {decode_config.ARCHITECTURES}", architecture)
    if architecture not in decode_config.ARCHITECTURES:
        raise value_error("architecture", f"one of {decode_config.ARCHITECTURES}", architecture)
    if (why := why_not(config, architecture)) is not None:
        raise ValueError(f"config: {why}")
    check_compilers()
    found = jobs(config, architecture)
    for job in found:
        job.object_code()
    return [job.kernel for job in found if not isinstance(job.kernel, cuda_module.KernelSpec)]


def warmup(config: RouterConfig, device: torch.device | str) -> dispatch.Plan:
    """Prepares a device for a model's dense calls of bf16: no later one compiles, or makes a workspace.

    Loads the kernels of both paths (compiling those that the disk cache lacks: a few seconds for each of the decode
    path's, less than one for each of the top-k's) and makes the decode path's workspace of the current stream. Only a
    call that wants logits, or whose tensors are not aligned to 16 bytes, may still compile its top-k. Call it in each
    process, and with each stream that routes eagerly current. What a path cannot serve is not prepared; the plan says
    why. Hash routing is not prepared: its kernel, one of many dtypes, takes less than a second in its first call.

    Args:
        config: the router's sizes.
        device: the device that will route.

    Returns:
        The plan of a one-token call.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    plan = dispatch.explain(config, 1, device)
    refused = dict(dispatch.plan_refusals(plan.request, plan.availability, ("decode", "cublas")))
    sizes = config.hidden_size, config.num_experts, config.top_k
    index = torch.device(plan.availability.device).index
    more_rows: tuple[LogitsConfig, ...] = ()
    if "decode" not in refused:
        decode.warmup(index, *sizes)
        more_rows = logits_configs(config.hidden_size, config.num_experts, plan.availability.architecture or "")
    if "cublas" not in refused:
        for kernel in topk_kernels(*sizes, more_rows):
            cublas.topk_kernel(index, *kernel)
    return plan
