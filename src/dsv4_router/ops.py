# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The routers as operators of ``torch.library``, so that ``torch.compile`` keeps them in its graph.

``torch.ops.dsv4_router``: ``dense_router``, ``dense_router_with_logits`` and ``hash_router``. They return new tensors
and do what :func:`dsv4_router.dense_route` and :func:`dsv4_router.hash_route` do. The path is chosen when they run, so
a graph with a dynamic number of tokens takes the best one for each number. While Dynamo traces a public function
(``torch.compile``, ``torch.export`` with ``strict=True``), that imports this module and calls the function of its own
name here. Where an exported program is loaded, ``import dsv4_router.ops`` comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import api, arguments
from .errors import type_error

Pair = tuple[torch.Tensor, torch.Tensor]
_library = torch.library.Library("dsv4_router", "DEF")
# Rows must be contiguous: inductor shall hand over tensors as an eager call would get them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Written out, because the implementations take what comes: the dispatcher hands over only those options that differ
# from the schema's defaults, which are those of the functions in ``api``.
_PADDING_AND_LAUNCH = (
    "Tensor? token_mask=None, Tensor? num_valid_tokens=None, SymInt? num_valid_tokens_on_host=None, "
    "SymInt padding_id=-1, bool launch_with_pdl=True, bool weights_are_constant=True"
)
_DENSE_ARGUMENTS = (
    "(Tensor hidden_states, Tensor gate_weight, Tensor? correction_bias, SymInt top_k, float routed_scaling_factor, *, "
    f'ScalarType ids_dtype=int32, str backend="auto", bool batch_invariant=False, {_PADDING_AND_LAUNCH})'
)
_HASH_ARGUMENTS = (
    "(Tensor token_ids, Tensor hash_lut, SymInt top_k, *, ScalarType ids_dtype=int32, Tensor? hidden_states=None, "
    "Tensor? gate_weight=None, Tensor? router_logits=None, float routed_scaling_factor=1.0, "
    f"{_PADDING_AND_LAUNCH})"
)


def _as_functions_take(options: dict[str, Any]) -> dict[str, Any]:
    """An operator's options as those of the function that it stands for."""
    count = options.pop("num_valid_tokens_on_host", None)
    if count is not None:
        options["num_valid_tokens"] = count
    return options


def _dense_router(*call: Any, **options: Any) -> Pair:
    return api.dense_route(*call, **_as_functions_take(options))


def _dense_router_with_logits(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, *rest: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = _new(hidden_states, gate_weight.shape[0], torch.float32)
    options = _as_functions_take(options)
    return (*api.dense_route(hidden_states, gate_weight, *rest, logits_out=logits, **options), logits)


def _hash_router(*call: Any, **options: Any) -> Pair:
    return api.hash_route(*call, **_as_functions_take(options))


def _new(rows_of: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, columns] of a dtype, where ``rows_of`` [N, ...] is."""
    return rows_of.new_empty((rows_of.shape[0], columns), dtype=dtype)


def _fake_dense_router(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    *,
    ids_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> Pair:
    return _new(hidden_states, top_k, torch.float32), _new(hidden_states, top_k, ids_dtype)


def _fake_dense_router_with_logits(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, *rest: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = _new(hidden_states, gate_weight.shape[0], torch.float32)
    return (*_fake_dense_router(hidden_states, gate_weight, *rest, **options), logits)


def _fake_hash_router(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    *,
    ids_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> Pair:
    return _new(token_ids, top_k, torch.float32), _new(token_ids, top_k, ids_dtype)


def _register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + schema, tags=_TAGS)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    # Routing is not differentiable: no output requires a gradient.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dsv4_router::{name}", fake, lib=_library)


_register("dense_router", _DENSE_ARGUMENTS + " -> (Tensor, Tensor)", _dense_router, _fake_dense_router)
_register(
    "dense_router_with_logits",
    _DENSE_ARGUMENTS + " -> (Tensor, Tensor, Tensor)",
    _dense_router_with_logits,
    _fake_dense_router_with_logits,
)
_register("hash_router", _HASH_ARGUMENTS + " -> (Tensor, Tensor)", _hash_router, _fake_hash_router)


def _check_types(num_valid_tokens: object, options: dict[str, Any]) -> None:
    """Refuses what an operator's schema would turn into another type without a word."""
    for name in ("batch_invariant", "launch_with_pdl", "weights_are_constant"):
        arguments.check_flag(name, options.get(name, True))
    for name, number in (("num_valid_tokens", num_valid_tokens), ("padding_id", options.get("padding_id", -1))):
        if isinstance(number, bool):
            raise type_error(name, "an int", number)


def _count(num_valid_tokens: int | torch.Tensor | None) -> dict[str, int | torch.Tensor | None]:
    """``num_valid_tokens`` as the operators take it."""
    if isinstance(num_valid_tokens, torch.Tensor):
        return {"num_valid_tokens": num_valid_tokens}
    return {"num_valid_tokens_on_host": num_valid_tokens}


def dense_route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    *,
    num_valid_tokens: int | torch.Tensor | None = None,
    logits_out: torch.Tensor | None = None,
    **options: Any,
) -> Pair:
    """:func:`dsv4_router.dense_route` through its operator; arguments as there, most checked when the operator runs."""
    call = hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor
    _check_types(num_valid_tokens, options)
    options |= _count(num_valid_tokens)
    if logits_out is None:
        weights, ids = torch.ops.dsv4_router.dense_router(*call, **options)
        return weights, ids
    weights, ids, logits = torch.ops.dsv4_router.dense_router_with_logits(*call, **options)
    arguments.dense_call(*call, weights, ids, logits_out, False, arguments.NO_OPTIONS)  # for logits_out
    logits_out.copy_(logits)
    return weights, ids


def dense_router_dispatch(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    backend: str,
    batch_invariant: bool,
    logits_out: torch.Tensor | None,
    options: arguments.Options,
) -> Pair:
    """:func:`dsv4_router.dense_router_dispatch` through the operator of :func:`dense_route`, and copies.

    Arguments as there; those about padding rows and the launch in ``options``.
    """
    call = hidden_states, gate_weight, correction_bias, top_k, routed_scaling_factor
    arguments.dense_call(*call, out_weights, out_ids, logits_out, batch_invariant, options)
    weights, ids = dense_route(
        *call,
        ids_dtype=out_ids.dtype,
        backend=backend,
        batch_invariant=batch_invariant,
        logits_out=logits_out,
        **options._asdict(),
    )
    out_weights.copy_(weights)
    out_ids.copy_(ids)
    return out_weights, out_ids


def hash_route(*call: Any, num_valid_tokens: int | torch.Tensor | None = None, **options: Any) -> Pair:
    """:func:`dsv4_router.hash_route` through its operator; arguments as there, most checked when the operator runs."""
    _check_types(num_valid_tokens, options)
    weights, ids = torch.ops.dsv4_router.hash_router(*call, **_count(num_valid_tokens), **options)
    return weights, ids


def hash_router_dispatch(
    token_ids: torch.Tensor,
    hash_lut: torch.Tensor,
    top_k: int,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    router_logits: torch.Tensor | None,
    routed_scaling_factor: float,
    options: arguments.Options,
) -> Pair:
    """:func:`dsv4_router.hash_router_dispatch` through the operator of :func:`hash_route`, and copies.

    Arguments as there; those about padding rows and the launch in ``options``.
    """
    call = token_ids, hash_lut, top_k
    outputs = out_weights, out_ids
    arguments.hash_call(*call, *outputs, hidden_states, gate_weight, router_logits, routed_scaling_factor, options)
    weights, ids = hash_route(
        *call,
        ids_dtype=out_ids.dtype,
        hidden_states=hidden_states,
        gate_weight=gate_weight,
        router_logits=router_logits,
        routed_scaling_factor=routed_scaling_factor,
        **options._asdict(),
    )
    out_weights.copy_(weights)
    out_ids.copy_(ids)
    return out_weights, out_ids
