# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Checks of the arguments of the routing functions, before anything is written or launched.

Every check raises ``TypeError`` (wrong type or dtype) or ``ValueError`` (wrong shape, strides, device or range) with
the argument, what was expected and what came.

The checks run in every eager call, where microseconds count. So :func:`ordinary_dense_call` and :func:`hash_call`
first ask, in one expression, whether all is as in nearly every call: contiguous tensors on one GPU, no padding options.
Only if not, the checks proper decide; they accept more than that, and nothing is rejected without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .config import FLOAT32_MAX, MAX_NUM_EXPERTS, MAX_TOP_K, check_integer, check_scaling_factor, check_top_k
from .errors import type_error, value_error

INTEGERS = (torch.int32, torch.int64)
OPERANDS = (torch.bfloat16, torch.float32)
_INT32 = torch.iinfo(torch.int32)
_INT64 = torch.iinfo(torch.int64)


class Options(NamedTuple):
    """What a dense or hash call may say of padding rows and of its launch: as in ``dense_router_dispatch``."""

    token_mask: torch.Tensor | None = None
    num_valid_tokens: int | torch.Tensor | None = None
    padding_id: int = -1
    launch_with_pdl: bool = True
    weights_are_constant: bool = True


NO_OPTIONS = Options()


class Shape(NamedTuple):
    """The sizes of a product's operands."""

    num_tokens: int
    num_experts: int
    hidden_size: int


# The operands of a dense call, in the order of ``dense_router_dispatch``: hidden_states, gate_weight, correction_bias,
# top_k, routed_scaling_factor, out_weights, out_ids. And of a call that passed ``ordinary_dense_call`` the GPU's index,
# num_tokens, num_experts and hidden_size. Plain tuples, because every eager call makes them: a NamedTuple takes 0.3 us.
DenseOperands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, float, torch.Tensor, torch.Tensor]
OrdinaryCall = tuple[int, int, int, int]
ROW_ALIGNMENT = 16  # bytes; what tensor copies and the kernels' vector loads need


def row_stride(matrix: torch.Tensor) -> int:
    """Elements from one row to the next; for a lone row, whose stride means nothing and may be anything, its length."""
    rows, columns = matrix.shape
    return matrix.stride(0) if rows > 1 else columns


def has_aligned_rows(matrix: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of :data:`ROW_ALIGNMENT`."""
    return (matrix.data_ptr() | row_stride(matrix) * matrix.element_size()) % ROW_ALIGNMENT == 0


def rows_of(operands: DenseOperands, rows: slice) -> DenseOperands:
    """The operands of a dense call for some of its tokens."""
    hidden_states, gate_weight, correction_bias, top_k, scaling, out_weights, out_ids = operands
    return hidden_states[rows], gate_weight, correction_bias, top_k, scaling, out_weights[rows], out_ids[rows]


def pieces_of(
    operands: DenseOperands, logits_out: torch.Tensor | None, options: Options, rows_at_once: int
) -> Iterator[tuple[DenseOperands, torch.Tensor | None, Options]]:
    """A dense call as calls of at most ``rows_at_once`` rows each, which bounds the memory for their logits."""
    num_tokens = operands[0].shape[0]
    if num_tokens <= rows_at_once:
        yield operands, logits_out, options
        return
    mask, num_valid = options.token_mask, options.num_valid_tokens
    for start in range(0, num_tokens, rows_at_once):
        rows = slice(start, min(start + rows_at_once, num_tokens))
        of_piece = options._replace(
            token_mask=None if mask is None else mask[rows],
            num_valid_tokens=None if num_valid is None else _remaining(num_valid, num_tokens, start),
        )
        yield rows_of(operands, rows), None if logits_out is None else logits_out[rows], of_piece


def _remaining(num_valid_tokens: int | torch.Tensor, num_tokens: int, start: int) -> int | torch.Tensor:
    """The number of valid tokens as seen by the rows from ``start`` on; what a device holds may be any int32."""
    if isinstance(num_valid_tokens, int):
        return max(0, num_valid_tokens - start)
    return num_valid_tokens.clamp(0, num_tokens) - start


def _tensor(argument: str, value: object, dtypes: tuple[torch.dtype, ...], what: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise type_error(argument, what, value)
    if value.dtype not in dtypes or value.layout is not torch.strided or value.is_nested:
        raise type_error(argument, what, value)
    return value


def _shaped(
    argument: str,
    value: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    what: str,
) -> None:
    """A contiguous tensor of a dtype among ``dtypes``, of ``shape``, on ``device``."""
    tensor = _tensor(argument, value, dtypes, what)
    if tensor.shape != shape or not tensor.is_contiguous():
        raise value_error(argument, f"{what} {list(shape)}, contiguous", tensor)
    if tensor.device != device:
        raise value_error(argument, f"{what} on {device}", tensor)


def _matrix(argument: str, value: object, dtypes: tuple[torch.dtype, ...], what: str) -> torch.Tensor:
    """A two-dimensional tensor with contiguous rows; the stride between rows may exceed their length."""
    tensor = _tensor(argument, value, dtypes, what)
    if tensor.dim() != 2:
        raise value_error(argument, f"{what} of 2 dimensions", tensor)
    rows, columns = tensor.shape
    row_stride, column_stride = tensor.stride()
    if (column_stride != 1 and columns > 1) or (row_stride < columns and rows > 1):
        raise value_error(argument, f"{what} with contiguous rows that do not overlap", tensor)
    return tensor


def operands(hidden_states: object, gate_weight: object) -> Shape:
    """``hidden_states`` [N, H] and ``gate_weight`` [E, H]: both bf16 or both fp32, on one device."""
    x = _matrix("hidden_states", hidden_states, OPERANDS, "a bfloat16 or float32 tensor [num_tokens, hidden_size]")
    w = _matrix("gate_weight", gate_weight, (x.dtype,), "a tensor [num_experts, hidden_size] of hidden_states' dtype")
    num_tokens, hidden_size = x.shape
    num_experts, gate_size = w.shape
    if hidden_size < 1:
        raise value_error("hidden_states", "a hidden_size of at least 1", x)
    if not 1 <= num_experts <= MAX_NUM_EXPERTS:
        raise value_error("gate_weight", f"num_experts from 1 to {MAX_NUM_EXPERTS}", w)
    if gate_size != hidden_size:
        raise value_error("gate_weight", f"rows of hidden_states' hidden_size {hidden_size}", w)
    if w.device != x.device:
        raise value_error("gate_weight", f"a tensor on {x.device}, where hidden_states is", w)
    if x.device.type == "meta":
        raise value_error("hidden_states", "a tensor with data", x)
    return Shape(num_tokens, num_experts, hidden_size)


def _outputs(out_weights: object, out_ids: object, num_tokens: int, top_k: int, device: torch.device) -> None:
    """``out_weights`` fp32 and ``out_ids`` int32 or int64, both [N, k], contiguous, on ``device``."""
    shape = (num_tokens, top_k)
    _shaped("out_weights", out_weights, (torch.float32,), shape, device, "a float32 tensor [num_tokens, top_k]")
    _shaped("out_ids", out_ids, INTEGERS, shape, device, "an int32 or int64 tensor [num_tokens, top_k]")


def check_writable(**outputs: torch.Tensor | None) -> None:
    """Raises if torch would refuse to write one of them."""
    for argument, tensor in outputs.items():
        if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise value_error(argument, "a tensor made outside of inference mode, or a call inside of it", tensor)


def check_memory(**tensors: torch.Tensor | None) -> None:
    """Raises if one of them has no memory, whose address kernels take: fake tensors, and wrappers such as DTensor.

    While Dynamo traces, a call takes an operator of ``torch.ops.dsv4_router``, which has an implementation for these.
    """
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise type_error(argument, "a tensor with memory of its own, neither fake nor distributed", tensor)


def check_flag(argument: str, value: object) -> None:
    """A bool."""
    if value is not True and value is not False:
        raise type_error(argument, "a bool", value)


def _padding(options: Options, num_tokens: int, ids: torch.Tensor) -> None:
    """The options that make padding rows; ``padding_id`` must fit into the dtype of ``ids``."""
    token_mask, num_valid_tokens, padding_id = options[:3]
    if token_mask is not None:
        _shaped("token_mask", token_mask, (torch.bool,), (num_tokens,), ids.device, "a bool tensor [num_tokens]")
    if num_valid_tokens is not None:
        what = f"an int from 0 to num_tokens ({num_tokens}), or one int32 on the device"
        if isinstance(num_valid_tokens, torch.Tensor):
            count = _tensor("num_valid_tokens", num_valid_tokens, (torch.int32,), what)
            if count.dim() > 1 or count.numel() != 1 or count.device != ids.device:
                raise value_error("num_valid_tokens", what, count)
        else:
            check_integer("num_valid_tokens", num_valid_tokens, 0, num_tokens, what)
    limits = _INT32 if ids.dtype is torch.int32 else _INT64
    if type(padding_id) is not int or padding_id != -1:
        check_integer("padding_id", padding_id, limits.min, limits.max, f"an int that fits into {limits.dtype}")


def _dense_inputs(
    hidden_states: object,
    gate_weight: object,
    correction_bias: object,
    top_k: object,
    routed_scaling_factor: object,
    logits_out: object,
) -> tuple[Shape, torch.device]:
    shape = operands(hidden_states, gate_weight)
    check_top_k(top_k, shape.num_experts)
    check_scaling_factor(routed_scaling_factor)
    assert isinstance(hidden_states, torch.Tensor)
    device = hidden_states.device
    if correction_bias is not None:
        what = "None or a float32 tensor [num_experts]"
        _shaped("correction_bias", correction_bias, (torch.float32,), (shape.num_experts,), device, what)
    if logits_out is not None:
        what = "None or a float32 tensor [num_tokens, num_experts]"
        _shaped("logits_out", logits_out, (torch.float32,), (shape.num_tokens, shape.num_experts), device, what)
    return shape, device


def _hash_inputs(
    token_ids: object,
    hash_lut: object,
    top_k: object,
    hidden_states: object,
    gate_weight: object,
    router_logits: object,
    routed_scaling_factor: object,
) -> tuple[int, torch.device]:
    num_tokens, device = table(token_ids, hash_lut, top_k)
    check_scaling_factor(routed_scaling_factor)
    if router_logits is not None:
        if hidden_states is not None or gate_weight is not None:
            raise ValueError("router_logits: expected either router_logits or hidden_states with gate_weight, got both")
        what = "a float32 tensor [num_tokens, num_experts]"
        logits = _tensor("router_logits", router_logits, (torch.float32,), what)
        if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_NUM_EXPERTS:
            raise value_error("router_logits", f"{what}, num_experts from 1 to {MAX_NUM_EXPERTS}", logits)
        _shaped("router_logits", logits, (torch.float32,), (num_tokens, logits.shape[1]), device, what)
    elif hidden_states is not None or gate_weight is not None:
        for argument, value in (("hidden_states", hidden_states), ("gate_weight", gate_weight)):
            if value is None:
                raise ValueError(f"{argument}: expected hidden_states and gate_weight together, got None")
        shape = operands(hidden_states, gate_weight)
        assert isinstance(hidden_states, torch.Tensor)
        if shape.num_tokens != num_tokens:
            raise value_error("hidden_states", f"a row for each of the {num_tokens} token_ids", hidden_states)
        if hidden_states.device != device:
            raise value_error("hidden_states", f"a tensor on {device}, where token_ids is", hidden_states)
    return num_tokens, device


def table(token_ids: object, hash_lut: object, top_k: object) -> tuple[int, torch.device]:
    """``token_ids`` [N] and ``hash_lut`` [vocabulary, k]: the number of tokens, and the device."""
    ids = _tensor("token_ids", token_ids, INTEGERS, "an int32 or int64 tensor [num_tokens]; hash routing needs them")
    if ids.dim() != 1 or not ids.is_contiguous():
        raise value_error("token_ids", "an int32 or int64 tensor [num_tokens], contiguous", ids)
    what = "an int32 or int64 tensor [vocab_size, top_k]"
    lut = _tensor("hash_lut", hash_lut, INTEGERS, what)
    check_top_k(top_k, MAX_NUM_EXPERTS)
    if lut.dim() != 2 or not lut.is_contiguous():
        raise value_error("hash_lut", f"{what}, contiguous", lut)
    if lut.shape[1] != top_k:
        raise value_error("hash_lut", f"a table of width top_k = {top_k}", lut)
    if lut.device != ids.device:
        raise value_error("hash_lut", f"a tensor on {ids.device}, where token_ids is", lut)
    if ids.device.type == "meta":
        raise value_error("token_ids", "a tensor with data", ids)
    return ids.shape[0], ids.device


def _ordinary_outputs(
    out_weights: torch.Tensor, out_ids: torch.Tensor, num_tokens: int, top_k: int, device_index: int
) -> bool:
    shape = (num_tokens, top_k)
    return (
        type(top_k) is int
        and 1 <= top_k <= MAX_TOP_K
        and out_weights.dtype is torch.float32
        and out_ids.dtype in INTEGERS
        and out_weights.shape == shape
        and out_ids.shape == shape
        and out_weights.is_contiguous()
        and out_ids.is_contiguous()
        and out_weights.get_device() == device_index
        and out_ids.get_device() == device_index
    )


def _ordinary_operands(x: torch.Tensor, w: torch.Tensor, num_tokens: int, device_index: int) -> bool:
    rows, hidden_size = x.shape
    num_experts, gate_size = w.shape
    return (
        x.dtype in OPERANDS
        and w.dtype is x.dtype
        and rows == num_tokens
        and gate_size == hidden_size > 0
        and 1 <= num_experts <= MAX_NUM_EXPERTS
        and x.is_contiguous()
        and w.is_contiguous()
        and x.get_device() == device_index
        and w.get_device() == device_index
    )


def ordinary_dense_call(
    operands: DenseOperands,
    token_mask: torch.Tensor | None,
    num_valid_tokens: int | torch.Tensor | None,
    padding_id: int,
    logits_out: torch.Tensor | None,
    batch_invariant: bool,
    launch_with_pdl: bool,
    weights_are_constant: bool,
) -> OrdinaryCall | None:
    """The GPU's index and the sizes of a dense call in which all is as in nearly every call, else None.

    Raises nothing: what it does not accept may still be right, and :func:`dense_call` decides.
    """
    x, w, bias, top_k, scaling, out_weights, out_ids = operands
    try:
        num_tokens, hidden_size = x.shape
        num_experts, gate_size = w.shape
        device_index = x.get_device()
        if (
            device_index >= 0
            and token_mask is None
            and num_valid_tokens is None
            and logits_out is None
            and type(padding_id) is int
            and padding_id == -1
            and type(scaling) is float
            and abs(scaling) <= FLOAT32_MAX
            and type(batch_invariant) is type(launch_with_pdl) is type(weights_are_constant) is bool
            and type(top_k) is int
            and 1 <= top_k <= MAX_TOP_K
            and top_k <= num_experts <= MAX_NUM_EXPERTS
            and gate_size == hidden_size > 0
            and x.dtype in OPERANDS
            and w.dtype is x.dtype
            and out_weights.dtype is torch.float32
            and out_ids.dtype in INTEGERS
            and out_weights.shape == out_ids.shape == (num_tokens, top_k)
            and x.is_contiguous()
            and w.is_contiguous()
            and out_weights.is_contiguous()
            and out_ids.is_contiguous()
            and w.get_device() == out_weights.get_device() == out_ids.get_device() == device_index
            and (
                bias is None
                or (
                    bias.dtype is torch.float32
                    and bias.shape == (num_experts,)
                    and bias.is_contiguous()
                    and bias.get_device() == device_index
                )
            )
        ):
            return device_index, num_tokens, num_experts, hidden_size
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # some argument is no tensor of the right rank
    return None


def dense_call(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    logits_out: torch.Tensor | None,
    batch_invariant: bool,
    options: Options,
) -> None:
    """Checks every argument of :func:`dsv4_router.dense_router_dispatch` but ``backend``."""
    check_flag("batch_invariant", batch_invariant)
    check_flag("launch_with_pdl", options.launch_with_pdl)
    check_flag("weights_are_constant", options.weights_are_constant)
    shape, device = _dense_inputs(hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor, logits_out)
    _outputs(out_weights, out_ids, shape.num_tokens, top_k, device)
    _padding(options, shape.num_tokens, out_ids)


def hash_call(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    router_logits: torch.Tensor | None,
    routed_scaling_factor: float,
    options: Options,
) -> None:
    """Checks every argument of :func:`dsv4_router.hash_router_dispatch`."""
    token_mask, num_valid_tokens, padding_id, launch_with_pdl, weights_are_constant = options
    check_flag("launch_with_pdl", launch_with_pdl)
    check_flag("weights_are_constant", weights_are_constant)
    try:
        device_index = token_ids.get_device()
        (num_tokens,) = token_ids.shape
        if (
            device_index >= 0
            and router_logits is None
            and token_mask is None
            and num_valid_tokens is None
            and type(padding_id) is int
            and padding_id == -1
            and type(routed_scaling_factor) is float
            and abs(routed_scaling_factor) <= FLOAT32_MAX
            and token_ids.dtype in INTEGERS
            and hash_lut.dtype in INTEGERS
            and token_ids.is_contiguous()
            and hash_lut.is_contiguous()
            and hash_lut.dim() == 2
            and hash_lut.shape[1] == top_k
            and hash_lut.get_device() == device_index
            and _ordinary_outputs(out_weights, out_ids, num_tokens, top_k, device_index)
            and (
                (hidden_states is None and gate_weight is None)
                or _ordinary_operands(hidden_states, gate_weight, num_tokens, device_index)  # type: ignore[arg-type]
            )
        ):
            return
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        pass  # some argument is no tensor of the right rank: the checks below say which
    num_tokens, device = _hash_inputs(
        token_ids, hash_lut, top_k, hidden_states, gate_weight, router_logits, routed_scaling_factor
    )
    _outputs(out_weights, out_ids, num_tokens, top_k, device)
    _padding(options, num_tokens, out_ids)
