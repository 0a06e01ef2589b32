# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The entry points: dense and hash routing, into the caller's tensors or into new ones.

Routing is not differentiable: no call records anything for autograd.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from . import arguments, dispatch, reference
from .backends import cublas, cuda_hash
from .config import check_top_k
from .errors import type_error

_NOTHING = nullcontext()


def _without_grad(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> Any:
    """Turns recording off, at no cost if nothing would be recorded."""
    if (hidden_states.requires_grad or gate_weight.requires_grad) and torch.is_grad_enabled():
        return torch.no_grad()
    return _NOTHING


def _on_device(device_index: int) -> Any:
    """Makes a device current, at no cost if it is."""
    return _NOTHING if torch.cuda.current_device() == device_index else torch.cuda.device(device_index)


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
        backend: ``"auto"``, ``"decode"``, ``"cublas"`` or ``"reference"``; ``"auto"`` takes the first that can serve
            the call (:func:`dsv4_router.explain` says which, and why).
        batch_invariant: the same bits for a token at any number of tokens. On the CPU one matrix-vector product a
            token; on a GPU it needs the one-launch kernel.
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
        BackendUnavailableError: the backend that was asked for, or with ``batch_invariant`` every one, cannot serve
            the call; nothing was launched or written.
    """
    arguments.dense_call(
        hidden_states,
        gate_weight,
        correction_bias,
        top_k,
        routed_scaling_factor,
        out_weights,
        out_ids,
        token_mask,
        num_valid_tokens,
        padding_id,
        logits_out,
        batch_invariant,
        launch_with_pdl,
        weights_are_constant,
    )
    dispatch.check_backend(backend)
    num_tokens, hidden_size = hidden_states.shape
    if num_tokens == 0 and backend == "auto":
        return out_weights, out_ids
    path = dispatch.path_of_call(
        hidden_states.device, backend, hidden_size, gate_weight.shape[0], top_k, num_tokens, batch_invariant
    )
    if num_tokens == 0:
        return out_weights, out_ids
    with _without_grad(hidden_states, gate_weight):
        if path == "cublas":
            with _on_device(hidden_states.get_device()):
                cublas.route(
                    hidden_states,
                    gate_weight,
                    correction_bias,
                    top_k,
                    routed_scaling_factor,
                    out_weights,
                    out_ids,
                    token_mask,
                    num_valid_tokens,
                    padding_id,
                    logits_out,
                    launch_with_pdl,
                    weights_are_constant,
                )
        else:
            dispatch.warn_of_reference(hidden_states.device, backend)
            weights, ids = reference.dense_route(
                hidden_states,
                gate_weight,
                correction_bias,
                top_k,
                routed_scaling_factor,
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
        token_mask,
        num_valid_tokens,
        padding_id,
        launch_with_pdl,
        weights_are_constant,
    )
    if token_ids.shape[0] == 0:
        return out_weights, out_ids
    if dispatch.hash_path_of_call(token_ids.device) == "cuda":
        with _on_device(token_ids.get_device()):
            if hidden_states is not None and gate_weight is not None:
                cuda_hash.from_hidden(
                    token_ids,
                    hash_lut,
                    top_k,
                    out_weights,
                    out_ids,
                    token_mask,
                    num_valid_tokens,
                    padding_id,
                    hidden_states,
                    gate_weight,
                    routed_scaling_factor,
                    launch_with_pdl,
                    weights_are_constant,
                )
            else:
                cuda_hash.gather(
                    token_ids,
                    hash_lut,
                    top_k,
                    out_weights,
                    out_ids,
                    token_mask,
                    num_valid_tokens,
                    padding_id,
                    router_logits,
                    routed_scaling_factor,
                    launch_with_pdl,
                )
        return out_weights, out_ids
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


def _new_outputs(
    tensor: torch.Tensor, num_tokens: int, top_k: int, ids_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if ids_dtype is not torch.int32 and ids_dtype is not torch.int64:
        raise type_error("ids_dtype", "torch.int32 or torch.int64", ids_dtype)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=tensor.device)
    return weights, torch.empty(num_tokens, top_k, dtype=ids_dtype, device=tensor.device)


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
    shape = arguments.operands(hidden_states, gate_weight)
    check_top_k(top_k, shape.num_experts)
    weights, ids = _new_outputs(hidden_states, shape.num_tokens, top_k, ids_dtype)
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
    num_tokens, _ = arguments.table(token_ids, hash_lut, top_k)
    weights, ids = _new_outputs(token_ids, num_tokens, top_k, ids_dtype)
    return hash_router_dispatch(token_ids, hash_lut, top_k, weights, ids, **options)
