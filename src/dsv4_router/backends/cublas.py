# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``cublas`` path: fp32 logits by cuBLAS, then ``activation_topk.cu``. Arguments have been checked.

For bf16 operands and few tokens the hidden size is cut into pieces, one matrix of a batched product each, and the top-k
kernel adds their partial logits: cuBLAS would split the sum as well, but add it up in a launch of its own. As the host
takes longer over such a call than the GPU, the batched product goes to cuBLASLt without torch (:mod:`.cublaslt`), and
what calls of one shape on one stream have in common is remembered (:func:`route_again`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import torch

from .. import reference, thresholds
from ..arguments import (
    NO_OPTIONS,
    ROW_ALIGNMENT,
    DenseOperands,
    Options,
    OrdinaryCall,
    has_aligned_rows,
    pieces_of,
    row_stride,
)
from . import cublaslt, cuda_module

_WARPS_PER_BLOCK = 4  # one row a warp; of 1, 2, 4 and 8 the fastest or within 2 % of it (ARCHITECTURE.md)
_ROWS_AT_ONCE = 1 << 17  # bounds the logits of a long call to 512 MiB
# With more tokens the GPU takes longer than torch.bmm on the host; and into how many pieces H is cut up to there.
_FEW_TOKENS, _MAX_SPLITS = thresholds.FEW_TOKENS.max_tokens, thresholds.FEW_TOKENS.value
_MAX_REMEMBERED = 4096


def topk_spec(
    num_experts: int,
    top_k: int,
    ids_dtype: torch.dtype,
    vector_loads: bool,
    splits: int = 1,
    store_logits: bool = False,
    first_half: int | None = None,
    many_rows: bool = False,
) -> cuda_module.KernelSpec:
    """The specialisation of ``activation_topk``.

    Args:
        vector_loads: a promise that rows and bias are aligned to 16 bytes.
        splits, first_half, store_logits: as in :func:`activation_topk`.
        many_rows: the way that takes fewer instructions, and longer for a row; :func:`thresholds.topk_has_many_rows`.
    """
    macros = {
        "NUM_EXPERTS": str(num_experts),
        "TOP_K": str(top_k),
        "NUM_WARPS": str(_WARPS_PER_BLOCK),
        "MANY_ROWS": str(int(many_rows)),
        "IDS_T": cuda_module.C_TYPES[ids_dtype],
        "VECTOR_LOADS": str(int(vector_loads)),
        "NUM_SPLITS": str(splits),
        "FIRST_HALF": str(splits if first_half is None else first_half),
        "STORE_LOGITS": str(int(store_logits)),
    }
    return cuda_module.KernelSpec("activation_topk.cu", "activation_topk", tuple(macros.items()))


@cache
def topk_kernel(device_index: int, *spec: Any) -> Any:
    """The kernel of :func:`topk_spec`, whose arguments these are, all of them, loaded on a device."""
    return cuda_module.load(topk_spec(*spec), device_index)


def aligned_topk(
    num_experts: int, top_k: int, ids_dtype: torch.dtype, splits: int, first_half: int | None, many_rows: bool
) -> tuple[Any, ...]:
    """All arguments of :func:`topk_spec`, for calls whose tensors are aligned to 16 bytes and that want no logits."""
    return num_experts, top_k, ids_dtype, num_experts % 4 == 0, splits, False, first_half, many_rows


def _grid(num_tokens: int) -> tuple[int, int]:
    """Blocks, and threads of a block."""
    return (num_tokens + _WARPS_PER_BLOCK - 1) // _WARPS_PER_BLOCK, _WARPS_PER_BLOCK * 32


def _launch_topk(
    launch: Callable[..., None],
    logits: int,
    correction_bias: int,
    num_tokens: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    weights_are_constant: bool,
    logits_out: int = 0,
    padding: tuple[int, ...] = (),
    padding_id: int = -1,
) -> None:
    """Puts the arguments of ``activation_topk`` in their places.

    Args:
        launch: takes them. logits, correction_bias, logits_out: addresses, or 0.
        padding: as ``cuda_module.padding_arguments`` has it, or nothing.
    """
    token_mask, num_valid_tokens, num_valid_tokens_on_host = padding or (0, 0, num_tokens)
    launch(
        logits,
        logits_out,
        correction_bias,
        token_mask,
        num_valid_tokens,
        num_valid_tokens_on_host,
        num_tokens,
        routed_scaling_factor,
        padding_id,
        1 if weights_are_constant else 0,
        out_weights.data_ptr(),
        out_ids.data_ptr(),
    )


def activation_topk(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    logits_out: torch.Tensor | None = None,
    options: Options = NO_OPTIONS,
    first_half: int | None = None,
) -> None:
    """Steps 2 to 6 on ready logits, in one launch on the current stream; the current device must be theirs.

    Args:
        logits: fp32 [N, E], or partial logits [splits, N, E] to be added, contiguous, N at least 1, without bias.
        correction_bias: fp32 [E], or None.
        out_weights, out_ids: [N, k], written. They, and what follows, may have more rows, which stay as they are.
        logits_out: fp32 [N, E], to receive the sums.
        options: of the call.
        first_half: how many of the partial logits are added apart from the rest; none, for all in turn.
    """
    num_tokens, num_experts = logits.shape[-2:]
    splits = logits.shape[0] if logits.dim() == 3 else 1
    device_index = logits.get_device()
    logits_address = logits.data_ptr()
    bias_address = 0 if correction_bias is None else correction_bias.data_ptr()
    out_address = 0 if logits_out is None else logits_out.data_ptr()
    vector_loads = num_experts % 4 == 0 and (logits_address | bias_address | out_address) % ROW_ALIGNMENT == 0
    store_logits = logits_out is not None
    many_rows = thresholds.topk_has_many_rows(num_tokens, splits)
    spec = num_experts, top_k, out_ids.dtype, vector_loads, splits, store_logits, first_half, many_rows
    kernel = topk_kernel(device_index, *spec)
    _launch_topk(
        partial(cuda_module.launch, kernel, device_index, *_grid(num_tokens), options.launch_with_pdl),
        logits_address,
        bias_address,
        num_tokens,
        float(routed_scaling_factor),
        out_weights,
        out_ids,
        options.weights_are_constant,
        out_address,
        cuda_module.padding_arguments(options.token_mask, options.num_valid_tokens, num_tokens),
        options.padding_id,
    )


def num_splits(num_tokens: int, hidden_size: int, num_experts: int) -> int:
    """Pieces of the hidden size for bf16 operands: 1 unless pieces of whole 16-byte words are possible."""
    splits = thresholds.gemm_splits(num_tokens, hidden_size, num_experts)
    return splits if hidden_size % (8 * splits) == 0 else 1


def possible_splits(hidden_size: int, num_experts: int) -> list[int]:
    """What :func:`num_splits` says of a shape, over all numbers of tokens."""
    counts = thresholds.gemm_crossovers(hidden_size, num_experts)
    return list(dict.fromkeys(num_splits(count, hidden_size, num_experts) for count in counts))


def gate_logits(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, logits_out: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 logits [N, E], or partial logits [splits, N, E], of bf16 or fp32 operands (fp32 arithmetic, never TF32).

    Logits that need no adding go straight into ``logits_out`` if that is given, aligned as torch aligns, and torch
    writes it; elsewhere cuBLAS could choose another algorithm, and the bits would depend on where they are wanted.
    """
    if hidden_states.requires_grad or gate_weight.requires_grad:
        hidden_states, gate_weight = hidden_states.detach(), gate_weight.detach()
    direct = None
    if logits_out is not None and logits_out.data_ptr() % ROW_ALIGNMENT == 0 and _torch_may_write(logits_out):
        direct = logits_out
    if hidden_states.dtype is torch.float32:
        with reference.full_precision_matmul(hidden_states.device):
            return torch.mm(hidden_states, gate_weight.t(), out=direct)
    num_tokens, hidden_size = hidden_states.shape
    splits = num_splits(num_tokens, hidden_size, gate_weight.shape[0])
    if splits > 1:
        return partial_logits(hidden_states, gate_weight, splits)
    if direct is None:
        return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32, out=direct)


def _torch_may_write(tensor: torch.Tensor) -> bool:
    return not tensor.requires_grad and (not tensor.is_inference() or torch.is_inference_mode_enabled())


def partial_logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor, splits: int) -> torch.Tensor:
    """fp32 [splits, N, E] of bf16 operands: of each piece of the hidden size."""
    num_tokens, hidden_size = hidden_states.shape
    num_experts, device_index = gate_weight.shape[0], hidden_states.get_device()
    if num_tokens <= _FEW_TOKENS and has_aligned_rows(hidden_states) and has_aligned_rows(gate_weight):
        strides = row_stride(hidden_states), row_stride(gate_weight)
        product = cublaslt.product(device_index, cublaslt.Sizes(num_tokens, num_experts, hidden_size, *strides, splits))
        if product is not None:
            logits = torch.empty((splits, num_tokens, num_experts), dtype=torch.float32, device=hidden_states.device)
            stream = torch._C._cuda_getCurrentRawStream(device_index)
            addresses = hidden_states.data_ptr(), gate_weight.data_ptr()
            product(*addresses, cublaslt.c_pointer(logits.data_ptr()), cublaslt.c_pointer(stream))
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


def route(operands: DenseOperands, logits_out: torch.Tensor | None, options: Options) -> None:
    """Routes N tokens, N at least 1, on the current stream; the current device must be the tensors'."""
    for piece, piece_logits, piece_options in pieces_of(operands, logits_out, options, _ROWS_AT_ONCE):
        logits = gate_logits(*piece[:2], piece_logits)
        activation_topk(logits, *piece[2:], None if logits is piece_logits else piece_logits, piece_options)


class _Memory(NamedTuple):
    """Device memory for partial logits: its address as a number, and as cuBLASLt takes it."""

    address: int
    out: Any


# For the partial logits of eager calls on the short way: by device, stream and number of experts one piece, as large as
# _FEW_TOKENS need (8 x 1024 x E x 4 bytes, 12 MiB for E = 384), kept for good; none where there was no memory.
#
# A call takes the piece off the list while it launches. So threads that use one stream at the same time do not share
# it: the second one finds the list empty and goes the long way. Calls that follow each other on a stream share it, like
# a block that torch's allocator hands out again, and as safely: cuBLASLt launches without the dependent attribute, so
# its kernel starts when all before it on the stream have completed, and overwrites nothing that the activation_topk of
# an earlier call still reads. (With the attribute it would have to wait before it writes, as dense_logits.py does:
# whoever uses memory again relies on that.) Captured calls go the long way, so no graph refers to these pieces.
_free: dict[tuple[int, int, int], list[_Memory]] = {}
_allocating = Lock()


def _memory_of_stream(device_index: int, stream: int, num_experts: int) -> list[_Memory]:
    """The list of :data:`_free` for a stream of the current device, which is not being captured."""
    key = device_index, stream, num_experts
    with _allocating:
        if key not in _free:
            address = cuda_module.allocate(_MAX_SPLITS * _FEW_TOKENS * num_experts * 4)
            _free[key] = [_Memory(address, cublaslt.c_pointer(address))] if address else []
        return _free[key]


Products = Sequence[cublaslt.Product]  # by 2 * weights_are_constant + launch_with_pdl
RouteLeft = Callable[[DenseOperands, bool, bool], None]  # a call's operands, launch_with_pdl and weights_are_constant


class _Again(NamedTuple):
    """What ordinary calls of one shape on one stream share."""

    products: Products
    stream: Any  # as they take it
    form: int  # of the memory that they take, its place in _Memory
    free: list[_Memory]
    launches: tuple[Callable[..., None], Callable[..., None]]  # of the top-k, the second one dependent
    num_rows: int  # that both take
    route_left: RouteLeft | None  # takes the others


class Choice(NamedTuple):
    """What the path of an ordinary call of bf16 operands with aligned rows depends on, beside its sizes."""

    backend: str
    batch_invariant: bool
    top_k: int
    ids_dtype: torch.dtype


# By choice, stream, and the call's device and sizes.
remembered: dict[tuple[tuple[Any, ...], int, OrdinaryCall], _Again] = {}


def remember(choice: Choice, ordinary: OrdinaryCall) -> None:
    """Prepares :func:`route_again` for calls like one on the current stream for which :func:`route` has been chosen."""
    device_index, num_tokens, num_experts, hidden_size = ordinary
    splits = num_splits(num_tokens, hidden_size, num_experts)
    if num_tokens > _FEW_TOKENS or splits == 1:
        return

    def products() -> Products | None:
        sizes = cublaslt.Sizes(num_tokens, num_experts, hidden_size, hidden_size, hidden_size, splits)
        found = cublaslt.product(device_index, sizes)
        return None if found is None else [found] * 4

    remember_products(choice, ordinary, splits, None, products, by_address=False)


def remember_products(
    choice: Choice,
    ordinary: OrdinaryCall,
    splits: int,
    first_half: int | None,
    make_products: Callable[[], Products | None],
    *,
    by_address: bool,
    num_rows: int | None = None,
    route_left: RouteLeft | None = None,
) -> None:
    """Prepares :func:`route_again` for a product of any path and the top-k.

    Args:
        choice, ordinary: of the calls.
        splits, first_half: of the partial logits, as in :func:`activation_topk`.
        make_products: for both values of both options, or None if there are none. They wait for the end of the
            previous kernel before they write.
        by_address: whether they take memory and stream as numbers; else as C's pointers.
        num_rows: that they and the top-k take; none, for all of the call.
        route_left: routes the others, after those, if there are any.
    """
    device_index, num_tokens, num_experts, _ = ordinary
    num_rows = num_tokens if num_rows is None else num_rows
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    key = choice, stream, ordinary
    if key in remembered or splits * num_rows > _MAX_SPLITS * _FEW_TOKENS:
        return
    if torch._C._cuda_isCurrentStreamCapturing() or (products := make_products()) is None:
        return
    if len(remembered) >= _MAX_REMEMBERED:
        remembered.clear()
    many_rows = thresholds.topk_has_many_rows(num_rows, splits)
    spec = aligned_topk(num_experts, choice.top_k, choice.ids_dtype, splits, first_half, many_rows)
    kernel = topk_kernel(device_index, *spec)
    without, dependent = (
        cuda_module.bound_launch(kernel, device_index, stream, *_grid(num_rows), pdl) for pdl in (False, True)
    )
    free = _memory_of_stream(device_index, stream, num_experts)
    on_stream, form = (stream, 0) if by_address else (cublaslt.c_pointer(stream), 1)
    remembered[key] = _Again(products, on_stream, form, free, (without, dependent), num_rows, route_left)


def route_again(
    backend: str,
    batch_invariant: bool,
    ordinary: OrdinaryCall,
    operands: DenseOperands,
    launch_with_pdl: bool,
    weights_are_constant: bool,
) -> bool:
    """The short way of an eager call by product and top-k, or False, with nothing done, for what goes the long way.

    It takes calls that ``arguments.ordinary_dense_call`` accepted, of a choice and a shape that were remembered. The
    results are those of the long way, to the bit.
    """
    hidden_states, gate_weight, correction_bias, top_k, scaling, out_weights, out_ids = operands
    device_index = ordinary[0]
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    again = remembered.get(((backend, batch_invariant, top_k, out_ids.dtype), stream, ordinary))
    if again is None or hidden_states.dtype is not torch.bfloat16:
        return False
    hidden, gate = hidden_states.data_ptr(), gate_weight.data_ptr()
    bias = 0 if correction_bias is None else correction_bias.data_ptr()
    if (
        not (hidden and gate)
        or (hidden | gate | bias) % ROW_ALIGNMENT
        or torch._C._cuda_getDevice() != device_index
        or torch._C._cuda_isCurrentStreamCapturing()
    ):
        return False
    products, on_stream, form, free, launches, num_rows, route_left = again
    try:
        memory = free.pop()
    except IndexError:
        return False
    try:
        products[2 * weights_are_constant + launch_with_pdl](hidden, gate, memory[form], on_stream)
        launch = launches[launch_with_pdl]
        _launch_topk(launch, memory.address, bias, num_rows, scaling, out_weights, out_ids, weights_are_constant)
    finally:
        free.append(memory)
    if route_left is not None:
        route_left(operands, launch_with_pdl, weights_are_constant)
    return True
