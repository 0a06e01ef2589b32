# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The kernels of ``neighbours.cu``: the floors, and what stands before and after the router in a chain.

All are launched on torch's current stream, with the dependent attribute where the device has it.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsv4_router.backends import cuda_module
from dsv4_router.dispatch import architecture

SOURCE = Path(__file__).with_name("neighbours.cu")
ENTRIES = ("empty_launch", "stream_weight", "rms_norm", "count_experts")
EPSILON = 1e-6  # of RMSNorm
TOKENS_PER_BLOCK = 64  # of the consumer
_FLOOR_BLOCKS = 128  # as the decode kernel has
_THREADS = 256
_MOST_WORDS = 16 * _FLOOR_BLOCKS * _THREADS  # of 16 bytes, in a weight
_MOST_CHUNKS = 4 * _THREADS  # of 16 bytes, in a row
_MOST_EXPERTS = 1024


def compile_with_log(target: str) -> tuple[bytes, str]:
    """The cubin for a target such as ``"sm_90a"``, and what the assembler says of registers and spills."""
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    options = ProgramOptions(name=SOURCE.name, arch=target, **cuda_module.COMPILE_OPTIONS)
    code = Program(SOURCE.read_text(), "c++", options).compile("cubin", logs=log).code
    return bytes(code), log.getvalue()


@cache
def _kernels(device_index: int) -> dict[str, Any]:
    from cuda.core import Device, ObjectCode

    code, _ = compile_with_log(architecture(torch.cuda.get_device_capability(device_index)))
    with torch.cuda.device(device_index):
        Device(device_index).set_current()
        module = ObjectCode.from_cubin(code, name=SOURCE.name)
        kernels = {entry: module.get_kernel(entry) for entry in ENTRIES}
        for kernel in kernels.values():
            _ = kernel.attributes.num_regs  # asking loads it now, not at a launch that may be captured
    return kernels


@cache
def _sink(device_index: int) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int32, device=torch.device("cuda", device_index))


def _launch(entry: str, device_index: int, grid: int, *args: Any) -> None:
    cuda_module.launch(_kernels(device_index)[entry], device_index, grid, _THREADS, True, *args)


def empty_launch(like: torch.Tensor) -> None:
    """A launch that does nothing, on the device of ``like``."""
    _launch("empty_launch", like.get_device(), _FLOOR_BLOCKS)


def stream_weight(weight: torch.Tensor) -> None:
    """Reads a contiguous weight, of up to 8 MiB in multiples of 16 bytes, and does nothing with it."""
    if weight.nbytes % 16 or weight.nbytes // 16 > _MOST_WORDS:
        raise ValueError(f"weight: expected a multiple of 16 bytes up to {16 * _MOST_WORDS}, got {weight.nbytes}")
    device_index = weight.get_device()
    sink = _sink(device_index).data_ptr()
    _launch("stream_weight", device_index, _FLOOR_BLOCKS, weight.data_ptr(), weight.nbytes // 16, sink)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """RMSNorm of bf16 rows [N, H] into ``out`` [N, H], all contiguous."""
    num_tokens, hidden_size = hidden_states.shape
    if hidden_size % 8 or hidden_size // 8 > _MOST_CHUNKS:
        raise ValueError(f"hidden_size: expected a multiple of 8 up to {8 * _MOST_CHUNKS}, got {hidden_size}")
    addresses = hidden_states.data_ptr(), weight.data_ptr(), out.data_ptr()
    _launch("rms_norm", hidden_states.get_device(), num_tokens, *addresses, hidden_size // 8, EPSILON)


def num_token_blocks(num_tokens: int) -> int:
    """Rows of what :func:`count_experts` writes."""
    return -(-num_tokens // TOKENS_PER_BLOCK)


def count_experts(weights: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor) -> None:
    """How often each block of tokens chose each expert, and with what weight in all.

    Args:
        weights: fp32 [N, k]. ids: int32 [N, k].
        counts: int32 [blocks, E], written. sums: fp32 [blocks, E], written.
    """
    num_tokens, top_k = ids.shape
    blocks, num_experts = counts.shape
    if ids.dtype is not torch.int32 or blocks != num_token_blocks(num_tokens) or num_experts > _MOST_EXPERTS:
        raise ValueError(f"expected int32 ids and counts of up to {_MOST_EXPERTS} experts for each token block")
    _launch(
        "count_experts",
        ids.get_device(),
        blocks,
        ids.data_ptr(),
        weights.data_ptr(),
        num_tokens,
        top_k,
        num_experts,
        counts.data_ptr(),
        sums.data_ptr(),
    )
