# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Hash routing by ``hash_router.cu``, one launch a call. Arguments have been checked."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..arguments import ROW_ALIGNMENT, Options, check_memory, row_stride
from . import cuda_module

_BLOCK = 256  # threads of a block of the two gathering kernels


def table_spec(
    entry: str, top_k: int, token_dtype: torch.dtype, table_dtype: torch.dtype, ids_dtype: torch.dtype
) -> cuda_module.KernelSpec:
    """The specialisation of ``hash_gather`` or ``hash_from_logits``."""
    macros = {
        "TOP_K": str(top_k),
        "TOKEN_T": cuda_module.C_TYPES[token_dtype],
        "TABLE_T": cuda_module.C_TYPES[table_dtype],
        "IDS_T": cuda_module.C_TYPES[ids_dtype],
    }
    return cuda_module.KernelSpec("hash_router.cu", entry, tuple(macros.items()))


def num_warps(hidden_size: int, top_k: int, operand_bytes: int) -> int:
    """Warps of a token's block: as few rounds over the hidden state as registers allow, all of one length.

    It does not depend on alignment, and so neither does the order of additions.
    """
    whole, rest = divmod(hidden_size * operand_bytes, 16)
    chunks = hidden_size if rest else whole
    # A thread holds a chunk of each of its k gate rows, 4 k registers, and much the same again for the sums.
    if top_k > 8:
        limit = 8
    elif top_k > 6 or operand_bytes == 4:
        limit = 16
    else:
        limit = 28  # one round for H = 7168 in bf16
    rounds = -(-chunks // (32 * limit))
    return -(-chunks // (rounds * 32))


def hidden_spec(
    hidden_size: int,
    top_k: int,
    operand_bytes: int,
    vector_loads: bool,
    token_dtype: torch.dtype,
    table_dtype: torch.dtype,
    ids_dtype: torch.dtype,
) -> cuda_module.KernelSpec:
    """The specialisation of ``hash_from_hidden``; ``vector_loads`` promises 16-byte aligned rows."""
    spec = table_spec("hash_from_hidden", top_k, token_dtype, table_dtype, ids_dtype)
    macros = {
        "HIDDEN_SIZE": str(hidden_size),
        "OPERAND_BYTES": str(operand_bytes),
        "VECTOR_LOADS": str(int(vector_loads)),
        "NUM_WARPS": str(num_warps(hidden_size, top_k, operand_bytes)),
    }
    return cuda_module.KernelSpec(spec.file, spec.entry, spec.macros + tuple(macros.items()))


@cache
def _table_kernel(device_index: int, *of_spec: Any) -> Any:
    return cuda_module.load(table_spec(*of_spec), device_index)


@cache
def _hidden_kernel(device_index: int, *of_spec: Any) -> tuple[Any, int]:
    hidden_size, top_k, operand_bytes = of_spec[:3]
    kernel = cuda_module.load(hidden_spec(*of_spec), device_index)
    return kernel, num_warps(hidden_size, top_k, operand_bytes) * 32


def gather(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    router_logits: torch.Tensor | None,
    routed_scaling_factor: float,
    options: Options,
) -> None:
    """The uniform form, or with ``router_logits`` the form scored by them; N at least 1."""
    device_index, num_tokens = token_ids.get_device(), token_ids.shape[0]
    entry = "hash_gather" if router_logits is None else "hash_from_logits"
    kernel = _table_kernel(device_index, entry, top_k, token_ids.dtype, hash_lut.dtype, out_ids.dtype)
    lanes = top_k if router_logits is None else 1 << (top_k - 1).bit_length()
    logits = () if router_logits is None else (router_logits.data_ptr(), router_logits.shape[1])
    token_address = token_ids.data_ptr()
    if not (token_address and all(logits)):
        check_memory(token_ids=token_ids, router_logits=router_logits)
    cuda_module.launch(
        kernel,
        device_index,
        (num_tokens * lanes + _BLOCK - 1) // _BLOCK,
        _BLOCK,
        options.launch_with_pdl,
        token_address,
        hash_lut.data_ptr(),
        hash_lut.shape[0],
        *logits,
        *cuda_module.padding_arguments(options.token_mask, options.num_valid_tokens, num_tokens),
        num_tokens,
        float(routed_scaling_factor),
        options.padding_id,
        out_weights.data_ptr(),
        out_ids.data_ptr(),
    )


def from_hidden(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    routed_scaling_factor: float,
    options: Options,
) -> None:
    """The form scored from hidden states; N at least 1."""
    device_index = token_ids.get_device()
    num_tokens, hidden_size = hidden_states.shape
    operand_bytes = hidden_states.element_size()
    hidden_stride, gate_stride = operand_bytes * row_stride(hidden_states), operand_bytes * row_stride(gate_weight)
    hidden_address, gate_address = hidden_states.data_ptr(), gate_weight.data_ptr()
    token_address = token_ids.data_ptr()
    if not (token_address and hidden_address and gate_address):
        check_memory(token_ids=token_ids, hidden_states=hidden_states, gate_weight=gate_weight)
    extents = hidden_address | gate_address | hidden_stride | gate_stride | (hidden_size * operand_bytes)
    kernel, block = _hidden_kernel(
        device_index,
        hidden_size,
        top_k,
        operand_bytes,
        extents % ROW_ALIGNMENT == 0,
        token_ids.dtype,
        hash_lut.dtype,
        out_ids.dtype,
    )
    cuda_module.launch(
        kernel,
        device_index,
        num_tokens,
        block,
        options.launch_with_pdl,
        token_address,
        hash_lut.data_ptr(),
        hash_lut.shape[0],
        hidden_address,
        hidden_stride,
        gate_address,
        gate_stride,
        gate_weight.shape[0],
        *cuda_module.padding_arguments(options.token_mask, options.num_valid_tokens, num_tokens),
        float(routed_scaling_factor),
        options.padding_id,
        int(options.weights_are_constant),
        out_weights.data_ptr(),
        out_ids.data_ptr(),
    )
