# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Routers as ``torch.nn.Module``, with the parameter names of the published checkpoints.

Routing is not differentiable, so the gate weight is a parameter that requires no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from . import api
from .arguments import INTEGERS, OPERANDS
from .config import RouterConfig
from .errors import type_error, value_error


class Router(nn.Module):
    """What dense and hash routers have in common.

    Attributes:
        config: the shapes and the scaling factor.
        weight: [E, H], bf16 or fp32; zeros until loaded.
    """

    # Buffers that keep their dtype, and so their bits, when the module is converted.
    _FIXED_DTYPE: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: RouterConfig, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, RouterConfig):
            raise type_error("config", "a RouterConfig", config)
        if dtype not in OPERANDS:
            raise type_error("dtype", "torch.bfloat16 or torch.float32", dtype)
        self.config = config
        gate = torch.zeros(config.num_experts, config.hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(gate, requires_grad=False)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        layer: int | str,
        *,
        config: RouterConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The router of one layer of a checkpoint: :func:`dsv4_router.checkpoint.load_router`.

        Raises:
            TypeError: the layer's router is of another class than the one this was called on; and as there.
            ValueError, FileNotFoundError: as there.
        """
        from .checkpoint import load_router

        return cls._checked(load_router(path, layer, config=config, device=device), layer)

    @classmethod
    def for_layer(
        cls,
        config: RouterConfig,
        layer: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> Self:
        """A new router of the kind that layer ``layer`` (from 0) of the model has.

        Raises:
            TypeError: that is another class than the one this was called on, or an argument has the wrong type.
            ValueError: the model has no such layer.
        """
        if not isinstance(config, RouterConfig):
            raise type_error("config", "a RouterConfig", config)
        kind = HashRouter if config.is_hash_layer(layer) else DenseRouter
        return cls._checked(kind(config, dtype=dtype, device=device), layer)

    @classmethod
    def _checked(cls, router: Router, layer: int | str) -> Self:
        if not isinstance(router, cls):
            raise TypeError(f"layer: expected one with a {cls.__name__}, got {layer!r} with a {type(router).__name__}")
        return router

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = prefix + "weight"
        given = state_dict.get(name)
        if isinstance(given, torch.Tensor) and given.dtype not in OPERANDS:  # a quantised one would lose its scale
            raise type_error(name, "a bfloat16 or float32 tensor [num_experts, hidden_size]", given)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _rows(self, hidden_states: object) -> torch.Tensor:
        """[..., H] as [N, H]; a last dimension that is not H must not be folded into rows that fit."""
        size = self.config.hidden_size
        if not isinstance(hidden_states, torch.Tensor):
            raise type_error("hidden_states", f"a tensor [..., {size}]", hidden_states)
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != size:
            raise value_error("hidden_states", f"a tensor [..., {size}]", hidden_states)
        return hidden_states.reshape(-1, size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        originals = {name: getattr(self, name) for name in self._FIXED_DTYPE}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in originals.items():
            applied = getattr(self, name)
            if applied.dtype != original.dtype:
                setattr(self, name, original.to(applied.device))
        return self

    def extra_repr(self) -> str:
        return str(self.config)


class DenseRouter(Router):
    """The router of a layer that chooses experts by score.

    Attributes:
        e_score_correction_bias: fp32 [E], zeros until loaded; fp32 also in a module converted to another dtype.
            State dicts may name it ``bias``, as the published checkpoints do.
    """

    _FIXED_DTYPE = ("e_score_correction_bias",)
    e_score_correction_bias: torch.Tensor

    def __init__(
        self, config: RouterConfig, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
    ) -> None:
        super().__init__(config, dtype=dtype, device=device)
        bias = torch.zeros(config.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias)

    @property
    def bias(self) -> torch.Tensor:
        """``e_score_correction_bias``."""
        return self.e_score_correction_bias

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes tokens.

        Args:
            hidden_states: [..., H] of the weight's dtype; N tokens.
            options: the keyword arguments of :func:`dsv4_router.dense_route`.

        Returns:
            Weights fp32 [N, k], normalised and scaled, and ids [N, k].

        Raises:
            TypeError, ValueError, BackendUnavailableError: as :func:`dsv4_router.dense_route`.
        """
        config, bias = self.config, self.e_score_correction_bias
        rows = self._rows(hidden_states)
        return api.dense_route(rows, self.weight, bias, config.top_k, config.routed_scaling_factor, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name, published = prefix + "e_score_correction_bias", prefix + "bias"
        if published in state_dict and name not in state_dict:
            state_dict[name] = state_dict.pop(published)
        given = state_dict.get(name)
        if isinstance(given, torch.Tensor):
            if not given.is_floating_point():
                raise type_error(name, "a floating-point tensor [num_experts]", given)
            state_dict[name] = given.float()  # load_state_dict(assign=True) would take over another dtype
        super()._load_from_state_dict(state_dict, prefix, *rest)


class HashRouter(Router):
    """The router of a layer that looks experts up by token id.

    Attributes:
        tid2eid: int32 or int64 [vocab_size, k], zeros until loaded; an integer table also in a converted module.
    """

    _FIXED_DTYPE = ("tid2eid",)
    tid2eid: torch.Tensor

    def __init__(
        self,
        config: RouterConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        table_dtype: torch.dtype = torch.int64,
    ) -> None:
        super().__init__(config, dtype=dtype, device=device)
        if table_dtype not in INTEGERS:
            raise type_error("table_dtype", "torch.int32 or torch.int64", table_dtype)
        table = torch.zeros(config.vocab_size, config.top_k, dtype=table_dtype, device=device)
        self.register_buffer("tid2eid", table)

    def forward(
        self, hidden_states: torch.Tensor | None, token_ids: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes tokens.

        Args:
            hidden_states: [..., H] of the weight's dtype, N tokens; or None for the weight
                ``routed_scaling_factor / k`` everywhere, or where ``router_logits`` are among the options.
            token_ids: int32 or int64, N in any shape.
            options: the other keyword arguments of :func:`dsv4_router.hash_route`.

        Returns:
            Weights fp32 [N, k], normalised and scaled, and ids [N, k].

        Raises:
            TypeError, ValueError: as :func:`dsv4_router.hash_route`.
        """
        flat = token_ids.reshape(-1) if isinstance(token_ids, torch.Tensor) else token_ids
        config = self.config
        return api.hash_route(
            flat,
            self.tid2eid,
            config.top_k,
            hidden_states=None if hidden_states is None else self._rows(hidden_states),
            gate_weight=None if hidden_states is None else self.weight,
            routed_scaling_factor=config.routed_scaling_factor,
            **options,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = prefix + "tid2eid"
        given = state_dict.get(name)
        if isinstance(given, torch.Tensor):
            # Copying would round or cut other dtypes without a word; bfloat16 turns 383 into 384.
            if given.dtype not in INTEGERS:
                raise type_error(name, "an int32 or int64 tensor [vocab_size, top_k]", given)
            if self.tid2eid.dtype is torch.int32 and given.dtype is torch.int64 and given.device.type != "meta":
                limits = torch.iinfo(torch.int32)
                if bool(((given < limits.min) | (given > limits.max)).any()):
                    raise value_error(name, "entries that fit into int32", given)
        super()._load_from_state_dict(state_dict, prefix, *rest)
