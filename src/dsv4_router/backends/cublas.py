# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``cublas`` path: fp32 logits by cuBLAS, then ``activation_topk.cu``. Arguments have been checked.

For bf16 operands and few tokens the hidden size is cut into pieces, one matrix of a batched product each, and the top-k
kernel adds their partial logits: cuBLAS would split the sum as well, but add it up in a launch of its own. As the host
takes longer over such a call than the GPU, the batched product goes to cuBLASLt without torch (:mod:`.cublaslt`), and
what calls of one shape have in common is remembered (:func:`route_again`).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch

from .. import reference, thresholds
from ..arguments import NO_OPTIONS, Options, Shape
from . import cublaslt, cuda_module

_WARPS_PER_BLOCK = 4  # one row a warp; of 1, 2, 4 and 8 the fastest or within 2 % of it (ARCHITECTURE.md)
_ROWS_AT_ONCE = 1 << 17  # bounds the logits of a long call to 512 MiB
_FEW_TOKENS = thresholds.GEMM_SPLITS[0].max_tokens  # with more, the GPU takes longer than torch.bmm on the host
_MAX_REMEMBERED = 4096


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


def _grid(num_tokens: int) -> int:
    return (num_tokens + _WARPS_PER_BLOCK - 1) // _WARPS_PER_BLOCK


def activation_topk(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    logits_out: torch.Tensor | None = None,
    options: Options = NO_OPTIONS,
) -> None:
    """Steps 2 to 6 on ready logits, in one launch on the current stream; the current device must be theirs.

    Args:
        logits: fp32 [N, E], or partial logits [splits, N, E] to be added, contiguous, N at least 1, without bias.
        correction_bias: fp32 [E], or None.
        out_weights, out_ids: [N, k], written.
        logits_out: fp32 [N, E], to receive the sums.
        options: of the call.
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
        _grid(num_tokens),
        _WARPS_PER_BLOCK * 32,
        options.launch_with_pdl,
        logits_address,
        out_address,
        bias_address,
        *cuda_module.padding_arguments(options.token_mask, options.num_valid_tokens, num_tokens),
        num_tokens,
        float(routed_scaling_factor),
        options.padding_id,
        int(options.weights_are_constant),
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
    if hidden_states.requires_grad or gate_weight.requires_grad:
        hidden_states, gate_weight = hidden_states.detach(), gate_weight.detach()
    direct = logits_out if logits_out is not None and logits_out.data_ptr() % 16 == 0 else None
    if hidden_states.dtype is torch.float32:
        with reference.full_precision_matmul(hidden_states.device):
            return torch.mm(hidden_states, gate_weight.t(), out=direct)
    splits = num_splits(*hidden_states.shape)
    if splits > 1:
        return partial_logits(hidden_states, gate_weight, splits)
    if direct is None:
        return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32, out=direct)


def partial_logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor, splits: int) -> torch.Tensor:
    """fp32 [splits, N, E] of bf16 operands: of each piece of the hidden size."""
    num_tokens, hidden_size = hidden_states.shape
    num_experts, device_index = gate_weight.shape[0], hidden_states.get_device()
    # The stride of a lone row means nothing and may be anything.
    hidden_stride = hidden_states.stride(0) if num_tokens > 1 else hidden_size
    gate_stride = gate_weight.stride(0) if num_experts > 1 else hidden_size
    hidden, gate = hidden_states.data_ptr(), gate_weight.data_ptr()
    if num_tokens <= _FEW_TOKENS and (hidden | gate | 2 * hidden_stride | 2 * gate_stride) % cublaslt.ALIGNMENT == 0:
        sizes = cublaslt.Sizes(num_tokens, num_experts, hidden_size, hidden_stride, gate_stride, splits)
        product = cublaslt.product(device_index, sizes)
        if product is not None:
            logits = torch.empty((splits, num_tokens, num_experts), dtype=torch.float32, device=hidden_states.device)
            product(hidden, gate, logits.data_ptr(), torch._C._cuda_getCurrentRawStream(device_index))
            return logits
    return torch.bmm(*split_operands(hidden_states, gate_weight, splits), out_dtype=torch.float32)


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
    logits_out: torch.Tensor | None,
    options: Options,
) -> None:
    """Routes N tokens, N at least 1, on the current stream; the current device must be the tensors'."""
    num_tokens = hidden_states.shape[0]
    if num_tokens <= _ROWS_AT_ONCE:
        logits = gate_logits(hidden_states, gate_weight, logits_out)
        rest = None if logits is logits_out else logits_out
        activation_topk(logits, correction_bias, top_k, routed_scaling_factor, out_weights, out_ids, rest, options)
        return
    mask, num_valid = options.token_mask, options.num_valid_tokens
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
            None if logits_out is None else logits_out[rows],
            options._replace(
                token_mask=None if mask is None else mask[rows],
                num_valid_tokens=None if num_valid is None else _remaining(num_valid, num_tokens, start),
            ),
        )


def _remaining(num_valid_tokens: int | torch.Tensor, num_tokens: int, start: int) -> int | torch.Tensor:
    """The number of valid tokens as seen by the rows from ``start`` on; what a device holds may be any int32."""
    if isinstance(num_valid_tokens, int):
        return max(0, num_valid_tokens - start)
    return num_valid_tokens.clamp(0, num_tokens) - start


class _Again(NamedTuple):
    """What ordinary calls of one shape have in common."""

    product: cublaslt.Product
    new_logits: partial[torch.Tensor]
    kernel: Any
    configs: tuple[Any, Any]  # without and with dependent launch


# By backend asked for, device, sizes, top_k and dtype of the ids.
remembered: dict[tuple[str, int, Shape, int, torch.dtype], _Again] = {}


def remember(backend: str, device_index: int, shape: Shape, top_k: int, ids_dtype: torch.dtype) -> None:
    """Prepares :func:`route_again` for calls like one for which :func:`route` has been chosen.

    That was an ordinary call of bf16 operands with aligned rows. So the choice depended on what is the key here, and
    otherwise on what ``route_again`` asks.
    """
    key = backend, device_index, shape, top_k, ids_dtype
    num_tokens, num_experts, hidden_size = shape
    splits = num_splits(num_tokens, hidden_size)
    if key in remembered or num_tokens > _FEW_TOKENS or splits == 1:
        return
    sizes = cublaslt.Sizes(num_tokens, num_experts, hidden_size, hidden_size, hidden_size, splits)
    product = cublaslt.product(device_index, sizes)
    if product is None:
        return
    if len(remembered) >= _MAX_REMEMBERED:
        remembered.clear()
    nothing = torch.empty(0, dtype=torch.float32, device=torch.device("cuda", device_index))
    without, dependent = (
        cuda_module.launch_config(device_index, _grid(num_tokens), _WARPS_PER_BLOCK * 32, pdl) for pdl in (False, True)
    )
    remembered[key] = _Again(
        product,
        partial(nothing.new_empty, (splits, num_tokens, num_experts)),  # sooner done than torch.empty
        _topk_kernel(device_index, num_experts, top_k, ids_dtype, num_experts % 4 == 0, splits, False),
        (without, dependent),
    )


def route_again(
    backend: str,
    device_index: int,
    shape: Shape,
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    launch_with_pdl: bool,
    weights_are_constant: bool,
) -> bool:
    """The short way of an eager call, or False, with nothing done, for calls that must go the long way.

    It takes calls that ``arguments.ordinary_dense_call`` accepted and that are not ``batch_invariant``, of a shape
    that was remembered. The results are those of :func:`route`, to the bit.
    """
    again = remembered.get((backend, device_index, shape, top_k, out_ids.dtype))
    if again is None or hidden_states.dtype is not torch.bfloat16:
        return False
    hidden, gate = hidden_states.data_ptr(), gate_weight.data_ptr()
    bias = 0 if correction_bias is None else correction_bias.data_ptr()
    if (hidden | gate | bias) % cublaslt.ALIGNMENT or torch._C._cuda_getDevice() != device_index:
        return False
    product, new_logits, kernel, configs = again
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    logits = new_logits()
    address, num_tokens = logits.data_ptr(), shape[0]
    product(hidden, gate, address, stream)
    cuda_module.cuda_core().launch(  # as in activation_topk
        cuda_module.stream(stream),
        configs[launch_with_pdl],
        kernel,
        address,
        0,  # logits_out
        bias,
        0,  # token_mask
        0,  # num_valid_tokens
        num_tokens,
        num_tokens,
        routed_scaling_factor,
        -1,  # padding_id
        1 if weights_are_constant else 0,
        out_weights.data_ptr(),
        out_ids.data_ptr(),
    )
    return True
