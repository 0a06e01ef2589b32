# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The entry points: dense and hash routing, into the caller's tensors or into new ones.

Routing is not differentiable: no call records anything for autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from . import arguments, dispatch, reference
from .backends import cublas, cuda_hash, decode
from .config import MAX_TOP_K, check_top_k
from .errors import type_error


def _on_device(device_index: int, call: Callable[..., None], *args: Any) -> None:
    """``call(*args)`` while a device is current, which costs nothing if it is."""
    if torch._C._cuda_getDevice() == device_index:
        call(*args)
    else:
        with torch.cuda.device(device_index):
            call(*args)


def _request(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, top_k: int, batch_invariant: bool
) -> dispatch.Request:
    """What the path of a dense call depends on, as :func:`dispatch.path_of_call` wants it."""
    num_tokens, hidden_size = hidden_states.shape
    return dispatch.Request(
        hidden_size,
        gate_weight.shape[0],
        top_k,
        min(num_tokens, dispatch.MANY_TOKENS),
        batch_invariant,
        hidden_states.dtype,
        arguments.has_aligned_rows(hidden_states) and arguments.has_aligned_rows(gate_weight),
    )


def dense_router_dispatch(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    *,
    backend: str = "auto",
    batch_invariant: bool = False,
    token_mask: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    padding_id: int = -1,
    logits_out: torch.Tensor | None = None,
    launch_with_pdl: bool = True,
    weights_are_constant: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense routing: the k experts of each token and their weights, written into the caller's tensors.

    ``logit = hidden_states @ gate_weight.T`` in fp32, ``score = sqrt(softplus(logit))``, the k largest
    ``score + correction_bias`` in descending order (equal ones: the lower id first; NaN: last), and
    ``weight = score / (sum of the k scores + 1e-20) * routed_scaling_factor``. So the weights are normalised and
    scaled, and the bias has decided which experts were chosen but is in no weight: apply neither again.
    (DeepSeek-V4's published inference code; a NaN score weighs 0, an infinite one as much as sqrt(FLT_MAX).)

    Args:
        hidden_states: bf16 or fp32 [N, H], rows contiguous (their stride may exceed H). N may be 0.
        gate_weight: [E, H] of the same dtype, rows contiguous, E from 1 to 1024.
        correction_bias: fp32 [E], or None for zero.
        top_k: k, from 1 to min(16, E).
        routed_scaling_factor: a finite factor.
        out_weights: fp32 [N, k], contiguous; written.
        out_ids: int32 or int64 [N, k], contiguous; written.
        backend: ``"auto"``, ``"decode"`` (bf16; one launch up to 128 tokens), ``"cublas"`` or ``"reference"``;
            ``"auto"`` takes the fastest that can serve the call (:func:`dsv4_router.explain` says which, and why).
        batch_invariant: the same bits for a token at any number of tokens. On a GPU the ``decode`` path, which has
            that property anyway, for any number of tokens; else plain PyTorch, one matrix-vector product a token.
        token_mask: bool [N], True for tokens and False for padding rows, which get ``padding_id`` and weight 0 and
            whose hidden states may be NaN.
        num_valid_tokens: rows of this call, from the first, that are tokens; an int, or one int32 on the device.
            The rows behind them are padding rows. With a mask, a token must satisfy both.
        padding_id: what padding rows get as id.
        logits_out: fp32 [N, E], contiguous, to receive the logits (without bias); those of padding rows too.
        launch_with_pdl: programmatic dependent launch (compute capability 9.0): the kernel may start while the
            previous kernel of the stream ends, and waits for it before it uses anything that may not be constant.
        weights_are_constant: the caller's promise that no earlier kernel on the stream is still writing the gate
            weight or the bias, so that they may be read before that wait. False: nothing is.

    Returns:
        ``(out_weights, out_ids)``.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched or written.
        BackendUnavailableError: the backend that was asked for cannot serve the call, which is so for ``"cublas"``
            with ``batch_invariant``; nothing was launched or written.
    """
    operands = hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor, out_weights, out_ids
    if is_dynamo_compiling():
        from . import ops

        options = arguments.Options(token_mask, num_valid_tokens, padding_id, launch_with_pdl, weights_are_constant)
        return ops.dense_router_dispatch(*operands, backend, batch_invariant, logits_out, options)
    ordinary = arguments.ordinary_dense_call(
        operands,
        token_mask,
        num_valid_tokens,
        padding_id,
        logits_out,
        batch_invariant,
        launch_with_pdl,
        weights_are_constant,
    )
    if ordinary is not None:
        if (backend == "auto" or backend == "decode") and decode.route_again(
            ordinary, operands, launch_with_pdl, weights_are_constant
        ):
            return out_weights, out_ids
        if isinstance(backend, str) and cublas.route_again(
            backend, batch_invariant, ordinary, operands, launch_with_pdl, weights_are_constant
        ):
            return out_weights, out_ids
    options = arguments.Options(token_mask, num_valid_tokens, padding_id, launch_with_pdl, weights_are_constant)
    if ordinary is None:
        arguments.dense_call(*operands, logits_out, batch_invariant, options)
    dispatch.check_backend(backend)
    request = _request(hidden_states, gate_weight, top_k, batch_invariant)
    path = dispatch.path_of_call(hidden_states.device, backend, request)
    if request.num_tokens == 0:
        return out_weights, out_ids
    device_index = hidden_states.get_device()
    if path != "reference":
        outputs = {"out_weights": out_weights, "out_ids": out_ids, "logits_out": logits_out}
        inputs = {"hidden_states": hidden_states, "gate_weight": gate_weight, "correction_bias": correction_bias}
        arguments.check_memory(**inputs, **outputs, token_mask=token_mask)
        module = decode if path == "decode" else cublas
        _on_device(device_index, module.route, operands, logits_out, options)
        if ordinary is not None and request.dtype is torch.bfloat16 and request.aligned:
            choice = cublas.Choice(backend, batch_invariant, top_k, out_ids.dtype)
            _on_device(device_index, module.remember, choice, ordinary)
    else:
        arguments.check_writable(out_weights=out_weights, out_ids=out_ids, logits_out=logits_out)
        dispatch.warn_of_reference(hidden_states.device, backend, request)
        with torch.no_grad():
            weights, ids = reference.dense_route(
                *operands[:5],
                token_mask=token_mask,
                num_valid_tokens=num_valid_tokens,
                padding_id=padding_id,
                batch_invariant=batch_invariant,
                logits_out=logits_out,
            )
            out_weights.copy_(weights)
            out_ids.copy_(ids)
    return out_weights, out_ids


def hash_router_dispatch(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    *,
    hidden_states: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    router_logits: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    token_mask: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    padding_id: int = -1,
    launch_with_pdl: bool = True,
    weights_are_constant: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hash routing: a token's experts are its row of a frozen table, written into the caller's tensors in one launch.

    Without scores every weight is ``routed_scaling_factor / k``. With hidden states and gate weight, or with ready
    logits, it is ``score / (sum of the k scores + 1e-20) * routed_scaling_factor`` with
    ``score = sqrt(softplus(logit))`` of the table's experts: normalised and scaled. There is no bias.
    A row of the table may name an expert twice. On a GPU only the k dot products of each token's experts are computed
    from the hidden states, in one order: a token's bits do not depend on the number of tokens.

    Args:
        token_ids: int32 or int64 [N], contiguous. One outside [0, vocabulary) makes its row a padding row.
        hash_lut: ``tid2eid``, int32 or int64 [vocabulary, k], contiguous. In the scored forms a row that names an
            expert outside [0, E) makes its tokens padding rows; the plain form knows no E and copies the ids.
        top_k: k, from 1 to 16, the width of the table.
        out_weights: fp32 [N, k], contiguous; written.
        out_ids: int32 or int64 [N, k], contiguous; written.
        hidden_states: bf16 or fp32 [N, H], rows contiguous; with ``gate_weight``.
        gate_weight: [E, H] of the same dtype, rows contiguous.
        router_logits: fp32 [N, E], contiguous, without bias; not together with ``hidden_states``.
        routed_scaling_factor: a finite factor.
        token_mask, num_valid_tokens, padding_id, launch_with_pdl, weights_are_constant: as in
            :func:`dense_router_dispatch`. The constant weights are here the gate weight and the table. With that
            promise the kernel also fetches gate rows early, by the token ids that memory holds before the wait on the
            previous kernel; the ids that count are read after it, and rows fetched for other ids are not used.

    Returns:
        ``(out_weights, out_ids)``.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched or written.
    """
    options = arguments.Options(token_mask, num_valid_tokens, padding_id, launch_with_pdl, weights_are_constant)
    if is_dynamo_compiling():
        from . import ops

        call = token_ids, hash_lut, top_k, out_weights, out_ids
        source = hidden_states, gate_weight, router_logits
        return ops.hash_router_dispatch(*call, *source, routed_scaling_factor, options)
    arguments.hash_call(
        token_ids,
        hash_lut,
        top_k,
        out_weights,
        out_ids,
        hidden_states,
        gate_weight,
        router_logits,
        routed_scaling_factor,
        options,
    )
    if token_ids.shape[0] == 0:
        return out_weights, out_ids
    if dispatch.hash_path_of_call(token_ids.device) == "cuda":
        call = token_ids, hash_lut, top_k, out_weights, out_ids
        device_index = token_ids.get_device()
        if hidden_states is not None:
            scores = hidden_states, gate_weight, routed_scaling_factor, options
            _on_device(device_index, cuda_hash.from_hidden, *call, *scores)
        else:
            _on_device(device_index, cuda_hash.gather, *call, router_logits, routed_scaling_factor, options)
        return out_weights, out_ids
    arguments.check_writable(out_weights=out_weights, out_ids=out_ids)
    dispatch.warn_of_reference(token_ids.device, "auto")
    with torch.no_grad():
        weights, ids = reference.hash_route(
            token_ids,
            hash_lut,
            top_k,
            hidden_states=hidden_states,
            gate_weight=gate_weight,
            router_logits=router_logits,
            routed_scaling_factor=routed_scaling_factor,
            token_mask=token_mask,
            num_valid_tokens=num_valid_tokens,
            padding_id=padding_id,
        )
        out_weights.copy_(weights)
        out_ids.copy_(ids)
    return out_weights, out_ids


def _foretells_outputs(tensor: object, dimensions: int, top_k: object) -> bool:
    """Whether outputs can be made for a call before its arguments are checked, namely once, by the call itself.

    That is so if their size follows from a tensor that has its rows in memory, and is no wrong argument's whim.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dim() == dimensions
        and tensor.is_contiguous()
        and tensor.size(-1) > 0
        and type(top_k) is int
        and 1 <= top_k <= MAX_TOP_K
    )


def _new_outputs(tensor: torch.Tensor, top_k: int, ids_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if ids_dtype is not torch.int32 and ids_dtype is not torch.int64:
        raise type_error("ids_dtype", "torch.int32 or torch.int64", ids_dtype)
    rows, device = tensor.size(0), tensor.device
    # Sizes one by one: torch.empty tries its overloads in turn, and a tuple costs it a second try (1.4 us).
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
    return weights, torch.empty(rows, top_k, dtype=ids_dtype, device=device)


def dense_route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    *,
    ids_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dense_router_dispatch` into new tensors.

    Args:
        hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor: as there.
        ids_dtype: int32 or int64, of the ids.
        options: the keyword arguments of :func:`dense_router_dispatch`.

    Returns:
        Weights fp32 [N, k] and ids [N, k].
    """
    if is_dynamo_compiling():
        from .ops import dense_route as traced  # not the module: Dynamo would guard that in every call

        call = hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor
        return traced(*call, ids_dtype=ids_dtype, **options)
    if not _foretells_outputs(hidden_states, 2, top_k):
        check_top_k(top_k, arguments.operands(hidden_states, gate_weight).num_experts)
    weights, ids = _new_outputs(hidden_states, top_k, ids_dtype)
    return dense_router_dispatch(
        hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor, weights, ids, **options
    )


def hash_route(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    *,
    ids_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hash_router_dispatch` into new tensors.

    Args:
        token_ids, hash_lut, top_k: as there.
        ids_dtype: int32 or int64, of the ids.
        options: the keyword arguments of :func:`hash_router_dispatch`.

    Returns:
        Weights fp32 [N, k] and ids [N, k].
    """
    if is_dynamo_compiling():
        from .ops import hash_route as traced

        return traced(token_ids, hash_lut, top_k, ids_dtype=ids_dtype, **options)
    if not _foretells_outputs(token_ids, 1, top_k):
        arguments.table(token_ids, hash_lut, top_k)
    weights, ids = _new_outputs(token_ids, top_k, ids_dtype)
    return hash_router_dispatch(token_ids, hash_lut, top_k, weights, ids, **options)
