# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``cublas`` path: fp32 logits by cuBLAS, then ``activation_topk.cu``. Arguments have been checked.

For bf16 operands and few tokens the hidden size is cut into pieces, one matrix of a batched product each, and the top-k
kernel adds their partial logits: cuBLAS would split the sum as well, but add it up in a launch of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .. import reference, thresholds
from . import cuda_module

_WARPS_PER_BLOCK = 4  # one row a warp; of 1, 2, 4 and 8 the fastest or within 2 % of it (ARCHITECTURE.md)
_ROWS_AT_ONCE = 1 << 17  # bounds the logits of a long call to 512 MiB


def topk_spec(
    num_experts: int,
    top_k: int,
    ids_dtype: torch.dtype,
    vector_loads: bool,
    splits: int = 1,
    store_logits: bool = False,
) -> cuda_module.KernelSpec:
    """The specialisation of ``activation_topk``; ``vector_loads`` promises 16-byte aligned rows and bias."""
    macros = {
        "NUM_EXPERTS": str(num_experts),
        "TOP_K": str(top_k),
        "IDS_T": cuda_module.C_TYPES[ids_dtype],
        "VECTOR_LOADS": str(int(vector_loads)),
        "NUM_SPLITS": str(splits),
        "STORE_LOGITS": str(int(store_logits)),
    }
    return cuda_module.KernelSpec("activation_topk.cu", "activation_topk", tuple(macros.items()))


@cache
def _topk_kernel(device_index: int, *of_spec: Any) -> Any:
    return cuda_module.load(topk_spec(*of_spec), device_index)


def activation_topk(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    padding_id: int = -1,
    logits_out: torch.Tensor | None = None,
    launch_with_pdl: bool = True,
    weights_are_constant: bool = True,
) -> None:
    """Steps 2 to 6 on ready logits, in one launch on the current stream; the current device must be theirs.

    Args:
        logits: fp32 [N, E], or partial logits [splits, N, E] to be added, contiguous, N at least 1, without bias.
        correction_bias: fp32 [E], or None.
        out_weights, out_ids: [N, k], written.
        logits_out: fp32 [N, E], to receive the sums.
        token_mask, ..., weights_are_constant: as in :func:`dsv4_router.dense_router_dispatch`.
    """
    num_tokens, num_experts = logits.shape[-2:]
    splits = logits.shape[0] if logits.dim() == 3 else 1
    device_index = logits.get_device()
    logits_address = logits.data_ptr()
    bias_address = 0 if correction_bias is None else correction_bias.data_ptr()
    out_address = 0 if logits_out is None else logits_out.data_ptr()
    vector_loads = num_experts % 4 == 0 and (logits_address | bias_address | out_address) % 16 == 0
    store_logits = logits_out is not None
    kernel = _topk_kernel(device_index, num_experts, top_k, out_ids.dtype, vector_loads, splits, store_logits)
    cuda_module.launch(
        kernel,
        device_index,
        (num_tokens + _WARPS_PER_BLOCK - 1) // _WARPS_PER_BLOCK,
        _WARPS_PER_BLOCK * 32,
        launch_with_pdl,
        logits_address,
        out_address,
        bias_address,
        *cuda_module.padding_arguments(token_mask, num_valid_tokens, num_tokens),
        num_tokens,
        float(routed_scaling_factor),
        padding_id,
        int(weights_are_constant),
        out_weights.data_ptr(),
        out_ids.data_ptr(),
    )


def num_splits(num_tokens: int, hidden_size: int) -> int:
    """Pieces of the hidden size for bf16 operands: 1 unless pieces of whole 16-byte words are possible."""
    for crossover in thresholds.GEMM_SPLITS:
        if num_tokens <= crossover.max_tokens:
            return crossover.value if hidden_size % (8 * crossover.value) == 0 else 1
    return 1


def gate_logits(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, logits_out: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 logits [N, E], or partial logits [splits, N, E], of bf16 or fp32 operands (fp32 arithmetic, never TF32).

    Logits that need no adding go straight into ``logits_out`` if that is given and aligned as torch aligns; elsewhere
    cuBLAS could choose another algorithm, and the bits would depend on where the caller wants them.
    """
    direct = logits_out if logits_out is not None and logits_out.data_ptr() % 16 == 0 else None
    if hidden_states.dtype is torch.float32:
        with reference.full_precision_matmul(hidden_states.device):
            return torch.mm(hidden_states, gate_weight.t(), out=direct)
    splits = num_splits(*hidden_states.shape)
    if splits > 1:
        return torch.bmm(*split_operands(hidden_states, gate_weight, splits), out_dtype=torch.float32)
    if direct is None:
        return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32, out=direct)


def split_operands(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, splits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands as batches of pieces of the hidden size, [splits, N, H / splits] and [splits, H / splits, E]."""
    num_tokens, hidden_size = hidden_states.shape
    num_experts, piece = gate_weight.shape[0], hidden_size // splits
    return (
        hidden_states.as_strided((splits, num_tokens, piece), (piece, hidden_states.stride(0), 1)),
        gate_weight.as_strided((splits, piece, num_experts), (piece, 1, gate_weight.stride(0))),
    )


def route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    num_valid_tokens: int | torch.Tensor | None,
    padding_id: int,
    logits_out: torch.Tensor | None,
    launch_with_pdl: bool,
    weights_are_constant: bool,
) -> None:
    """Routes N tokens, N at least 1, on the current stream; the current device must be the tensors'."""
    num_tokens = hidden_states.shape[0]
    if num_tokens <= _ROWS_AT_ONCE:
        logits = gate_logits(hidden_states, gate_weight, logits_out)
        activation_topk(
            logits,
            correction_bias,
            top_k,
            routed_scaling_factor,
            out_weights,
            out_ids,
            token_mask,
            num_valid_tokens,
            padding_id,
            None if logits is logits_out else logits_out,
            launch_with_pdl,
            weights_are_constant,
        )
        return
    for start in range(0, num_tokens, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, num_tokens))
        route(
            hidden_states[rows],
            gate_weight,
            correction_bias,
            top_k,
            routed_scaling_factor,
            out_weights[rows],
            out_ids[rows],
            None if token_mask is None else token_mask[rows],
            None if num_valid_tokens is None else _remaining(num_valid_tokens, num_tokens, start),
            padding_id,
            None if logits_out is None else logits_out[rows],
            launch_with_pdl,
            weights_are_constant,
        )


def _remaining(num_valid_tokens: int | torch.Tensor, num_tokens: int, start: int) -> int | torch.Tensor:
    """The number of valid tokens as seen by the rows from ``start`` on; what a device holds may be any int32."""
    if isinstance(num_valid_tokens, int):
        return max(0, num_valid_tokens - start)
    return num_valid_tokens.clamp(0, num_tokens) - start
