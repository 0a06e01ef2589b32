# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The router in plain PyTorch, on any device, in float32 or float64: what every other path is checked against.

The six steps of dense routing: logits, ``score = sqrt(softplus(logit))``, ``selection = score + bias``, the k largest
selections (equal ones: the lower id first), their scores, normalised and scaled. Arguments are taken as valid; the
checked entry points are in :mod:`dsv4_router.api`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

from .config import FLOAT32_MAX

# An infinite score counts as the score of the largest finite fp32 logit, so that weights stay finite.
LARGEST_SCORE = FLOAT32_MAX**0.5
WEIGHT_FLOOR = 1e-20
_ROWS_AT_ONCE = 16384  # bounds the memory of a long call


_precision_lock = Lock()
_precision_users: dict[str, tuple[int, str]] = {}  # device type -> how many are inside, and what to restore


def _matmul_settings(device_type: str) -> Any:
    return torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """No TF32 (CUDA) and no bf16 (CPU) inside products of fp32 matrices, whatever the process has chosen, nor autocast.

    The choice belongs to the process, so while any thread is inside, it holds for all; the last to leave restores it.
    Where that changes something, other threads see it: a choice that one makes meanwhile is lost, functions of
    ``torch.compile`` are compiled anew for it, and torch may refuse to tell ``allow_tf32``.
    """
    backend = _matmul_settings(device.type)
    with _precision_lock:
        users, before = _precision_users.get(device.type, (0, ""))
        if users == 0:
            before = backend.fp32_precision
            if before not in ("ieee", "none"):
                backend.fp32_precision = "none"
                if backend.fp32_precision == before:  # inherited from a wider setting, which it must go on following
                    before = "none"
                backend.fp32_precision = "ieee"
        _precision_users[device.type] = users + 1, before
    try:
        with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext():
            yield
    finally:
        with _precision_lock:
            users, before = _precision_users[device.type]
            _precision_users[device.type] = users - 1, before
            if users == 1 and backend.fp32_precision != before:
                backend.fp32_precision = before


def _forget_other_threads() -> None:
    """In the child of a fork, whose only thread is inside of nothing."""
    global _precision_lock
    _precision_lock = Lock()
    for device_type, (users, before) in _precision_users.items():
        if users:
            _matmul_settings(device_type).fp32_precision = before
    _precision_users.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def logits(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """``hidden_states @ gate_weight.T``, accumulated in ``dtype``.

    Args:
        hidden_states: [N, H]. gate_weight: [E, H].
        dtype: float32 or float64.
        batch_invariant: one matrix-vector product a token, each with the same shapes and alignments, so that a
            token's bits depend on nothing but the token.

    Returns:
        [N, E] in ``dtype``.
    """
    gate = gate_weight.to(dtype)
    with full_precision_matmul(hidden_states.device):
        if not batch_invariant:
            return hidden_states.to(dtype) @ gate.T
        rows = torch.empty(hidden_states.shape[0], gate.shape[0], dtype=dtype, device=hidden_states.device)
        for row, token in zip(rows, hidden_states, strict=True):
            row.copy_(torch.mv(gate, token.to(dtype, copy=True)))
        return rows


def scores(logits: torch.Tensor) -> torch.Tensor:
    """``sqrt(softplus(logits))``, evaluated in float64 and rounded once to the dtype of ``logits``.

    softplus is ``max(x, 0) + log1p(exp(-|x|))``: it neither overflows nor loses small values.
    """
    x = logits.double()
    return (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt().to(logits.dtype)


def order(selection: torch.Tensor) -> torch.Tensor:
    """Expert ids of each row by descending selection, equal ones by ascending id, NaN after every number."""
    wide = selection.double() + 0.0  # -0 becomes +0
    bits = wide.view(torch.int64)
    keys = bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)  # the order of floats as that of integers
    keys = keys.masked_fill(wide.isnan(), torch.iinfo(torch.int64).min)
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices


def normalize(chosen_scores: torch.Tensor, routed_scaling_factor: float) -> torch.Tensor:
    """``score / (sum of the row + 1e-20) * routed_scaling_factor``; a NaN score counts as 0."""
    share = chosen_scores.nan_to_num(nan=0.0, posinf=LARGEST_SCORE).clamp(max=LARGEST_SCORE)
    return share / (share.sum(dim=-1, keepdim=True) + WEIGHT_FLOOR) * routed_scaling_factor


def valid_rows(
    num_tokens: int,
    device: torch.device,
    token_mask: torch.Tensor | None,
    num_valid_tokens: int | torch.Tensor | None,
) -> torch.Tensor:
    """bool [N]: which rows are tokens and not padding."""
    valid = torch.ones(num_tokens, dtype=torch.bool, device=device)
    if token_mask is not None:
        valid &= token_mask
    if num_valid_tokens is not None:
        valid &= torch.arange(num_tokens, device=device) < num_valid_tokens  # a tensor of one element broadcasts
    return valid


def dense_route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    *,
    dtype: torch.dtype = torch.float32,
    token_mask: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    padding_id: int = -1,
    batch_invariant: bool = False,
    logits_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense routing.

    Args:
        hidden_states: [N, H]. gate_weight: [E, H]. correction_bias: [E], or None for zero.
        dtype: float32 or float64, of logits, selection and weights.
        token_mask, num_valid_tokens, padding_id, batch_invariant, logits_out: as in
            :func:`dsv4_router.dense_router_dispatch`; ``logits_out`` in ``dtype``.

    Returns:
        Weights [N, k] in ``dtype`` (normalised and scaled, without bias) and ids [N, k], int64.
    """
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    weights = torch.empty(num_tokens, top_k, dtype=dtype, device=device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    for start in range(0, num_tokens, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        row_logits = logits(hidden_states[rows], gate_weight, dtype=dtype, batch_invariant=batch_invariant)
        if logits_out is not None:
            logits_out[rows] = row_logits
        score = scores(row_logits)
        selection = score if correction_bias is None else score + correction_bias.to(dtype)
        ids[rows] = order(selection)[:, :top_k]
        weights[rows] = normalize(score.gather(1, ids[rows]), routed_scaling_factor)
    return _pad(weights, ids, valid_rows(num_tokens, device, token_mask, num_valid_tokens), padding_id)


def hash_route(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    *,
    hidden_states: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    router_logits: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
    token_mask: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    padding_id: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hash routing: ids are ``hash_lut[token_ids]``.

    Args:
        token_ids: [N], int32 or int64. hash_lut: [vocabulary, k], int32 or int64.
        hidden_states, gate_weight, router_logits: as in :func:`dsv4_router.hash_router_dispatch`.
        dtype: float32 or float64, of logits and weights.

    Returns:
        Weights [N, k] in ``dtype`` (scores of the table's experts, or uniform; normalised and scaled) and ids [N, k],
        int64. A token id outside the table, or in the scored forms an expert outside [0, E), gives a padding row.
    """
    num_tokens, device = token_ids.shape[0], token_ids.device
    valid = valid_rows(num_tokens, device, token_mask, num_valid_tokens)
    valid &= (token_ids >= 0) & (token_ids < hash_lut.shape[0])
    if hash_lut.shape[0] == 0:
        ids = torch.zeros(num_tokens, top_k, dtype=torch.int64, device=device)
    else:
        ids = hash_lut[token_ids.long().clamp(0, hash_lut.shape[0] - 1)].long()
    chosen = torch.ones(num_tokens, top_k, dtype=dtype, device=device)
    if router_logits is not None or gate_weight is not None:
        num_experts = router_logits.shape[1] if router_logits is not None else gate_weight.shape[0]  # type: ignore[union-attr]
        valid &= ((ids >= 0) & (ids < num_experts)).all(dim=-1)
        safe = ids.clamp(0, num_experts - 1)
        for start in range(0, num_tokens, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            if router_logits is not None:
                row_logits = router_logits[rows].to(dtype)
            else:
                assert hidden_states is not None
                assert gate_weight is not None
                row_logits = logits(hidden_states[rows], gate_weight, dtype=dtype)
            chosen[rows] = scores(row_logits.gather(1, safe[rows]))
    return _pad(normalize(chosen, routed_scaling_factor), ids, valid, padding_id)


def _pad(
    weights: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, padding_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    padding = ~valid[:, None]
    return weights.masked_fill(padding, 0.0), ids.masked_fill(padding, padding_id)
