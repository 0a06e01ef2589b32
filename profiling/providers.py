# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What is timed: this project's paths, peers, PyTorch and floors, each as calls numbered by the weight they use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import dsv4_router
from dsv4_router import reference
from dsv4_router.config import RouterConfig
from dsv4_router.testing import (
    NEAR_TIE,
    Comparison,
    DenseInputs,
    compare_dense,
    compare_hash,
    float64_logits,
    make_dense_inputs,
    make_hash_inputs,
    smallest_gap,
)

from . import neighbours, timing
from .peers import Peer

Outputs = tuple[torch.Tensor, torch.Tensor]  # weights and ids
Route = Callable[[int], Outputs]  # call number i of a graph, with weight number i
Routes = dict[str, Route]  # by provider

EAGER, COMPILED = "pytorch eager", "torch.compile"
EMPTY, STREAM = "floor: empty launch", "floor: weight stream"
ALONE = "chain without router"
# This project's: a wrong result ends the run, and --compare watches their ratios.
OWN = frozenset({"decode", "cublas", "batch_invariant", "activation_topk", "hash_from_hidden"})


def outputs(num_tokens: int, top_k: int, device: str = "cuda") -> Outputs:
    """New outputs that hold nothing valid."""
    weights = torch.full((num_tokens, top_k), 9e9, device=device)
    return weights, torch.full((num_tokens, top_k), -7, dtype=torch.int32, device=device)


def plain_router(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, bias: torch.Tensor, top_k: int, scaling: float
) -> Outputs:
    """The published formula, as one writes it in PyTorch."""
    logits = hidden_states.float() @ gate_weight.float().T
    scores = torch.nn.functional.softplus(logits).sqrt()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True) * scaling, ids


class Dense:
    """One dense layer's inputs, as many gate weights as a graph has calls, and the providers' calls on them."""

    def __init__(self, config: RouterConfig, inputs: DenseInputs) -> None:
        self.config, self.inputs = config, inputs
        self.num_tokens = inputs.hidden_states.shape[0]
        self.gates = timing.cold_weights(inputs.gate_weight)
        self.mine = outputs(self.num_tokens, config.top_k, inputs.hidden_states.device.type)

    @classmethod
    def random(cls, config: RouterConfig, num_tokens: int, device: str) -> Dense:
        return cls(config, make_dense_inputs(config, num_tokens, seed=num_tokens, device=device))

    def compare(self, weights: torch.Tensor, ids: torch.Tensor) -> Comparison:
        """Results with float64."""
        return compare_dense(self.inputs, self.config.top_k, self.config.routed_scaling_factor, weights, ids)

    def peers(self, peers: list[Peer]) -> Routes:
        hidden_states, _, bias = self.inputs

        def call(i: int, peer: Peer) -> Outputs:
            return peer.route(hidden_states, self.gates[i], bias, self.config.routed_scaling_factor)

        return {peer.provider: partial(call, peer=peer) for peer in peers}

    def own(self, **options: Any) -> Route:
        """This project's entry point, with options such as ``backend``."""
        hidden_states, _, bias = self.inputs
        scaling = self.config.routed_scaling_factor

        def call(i: int) -> Outputs:
            return dsv4_router.dense_router_dispatch(
                hidden_states, self.gates[i], bias, self.config.top_k, scaling, *self.mine, **options
            )

        return call

    def pytorch(self) -> Routes:
        """The plain formula, as it is and compiled for exactly these sizes."""
        hidden_states, _, bias = self.inputs
        torch._dynamo.reset()  # it would give up specialising after a few sizes
        router = torch.compile(plain_router, dynamic=False)
        sizes = self.config.top_k, self.config.routed_scaling_factor
        return {
            EAGER: lambda i: plain_router(hidden_states, self.gates[i], bias, *sizes),
            COMPILED: lambda i: router(hidden_states, self.gates[i], bias, *sizes),
        }

    def floors(self) -> dict[str, Callable[[int], None]]:
        return {
            EMPTY: lambda i: neighbours.empty_launch(self.inputs.hidden_states),
            STREAM: lambda i: neighbours.stream_weight(self.gates[i]),
        }


class Hash:
    """One hash layer's inputs, as many gate weights as a graph has calls, and calls on them, scored."""

    def __init__(self, config: RouterConfig, num_tokens: int, device: str) -> None:
        self._config = config
        self.inputs = make_hash_inputs(config, num_tokens, seed=num_tokens, device=device)
        self.gates = timing.cold_weights(self.inputs.gate_weight)
        self.mine = outputs(num_tokens, config.top_k, device)

    def from_hidden(self, i: int) -> Outputs:
        return self._route(hidden_states=self.inputs.hidden_states, gate_weight=self.gates[i])

    def from_logits_of(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Route:
        """A peer's product, and this project's hash top-k."""
        return lambda i: self._route(router_logits=product(self.inputs.hidden_states, self.gates[i]))

    def _route(self, **scored: Any) -> Outputs:
        return dsv4_router.hash_router_dispatch(
            self.inputs.token_ids,
            self.inputs.hash_lut,
            self._config.top_k,
            *self.mine,
            routed_scaling_factor=self._config.routed_scaling_factor,
            **scored,
        )

    def compare(self, weights: torch.Tensor, ids: torch.Tensor) -> Comparison:
        """Results with float64."""
        return compare_hash(self.inputs, self._config.top_k, self._config.routed_scaling_factor, weights, ids)


class Chain:
    """RMSNorm, router, consumer of ids and weights: the same neighbours around every provider.

    Attributes:
        dense: the router's inputs; its hidden states are what the RMSNorm writes.
    """

    def __init__(self, config: RouterConfig, num_tokens: int, device: str) -> None:
        spare = num_tokens // 4 + 8  # rows that the RMSNorm may turn into near ties
        drawn = make_dense_inputs(config, num_tokens + spare, seed=num_tokens, device=device)
        generator = torch.Generator(device).manual_seed(num_tokens)
        weight = 1 + 0.1 * torch.randn(config.hidden_size, generator=generator, device=device)
        self._norm_weight = weight.to(torch.bfloat16)
        normed = torch.empty_like(drawn.hidden_states)
        neighbours.rms_norm(drawn.hidden_states, self._norm_weight, normed)
        selection = reference.scores(float64_logits(normed, drawn.gate_weight)) + drawn.correction_bias.double()
        clear = smallest_gap(selection, config.top_k) > 4 * NEAR_TIE
        self._rows = drawn.hidden_states[clear][:num_tokens].clone()
        if self._rows.shape[0] < num_tokens:
            raise RuntimeError(f"chain: expected {num_tokens} rows without near ties, found {self._rows.shape[0]}")
        hidden_states = torch.empty_like(self._rows)
        self.dense = Dense(config, DenseInputs(hidden_states, drawn.gate_weight, drawn.correction_bias))
        shape = neighbours.num_token_blocks(num_tokens), config.num_experts
        self._counts = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._sums = torch.full(shape, torch.nan, device=device)

    def around(self, route: Route | None) -> Route:
        """A call of the whole chain; without a router, the consumer reads what the outputs happen to hold."""

        def call(i: int) -> Outputs:
            neighbours.rms_norm(self._rows, self._norm_weight, self.dense.inputs.hidden_states)
            weights, ids = self.dense.mine if route is None else route(i)
            neighbours.count_experts(weights, ids.int(), self._counts, self._sums)  # PyTorch's top-k has int64
            return weights, ids

        return call

    def checked_around(self, route: Route) -> Route:
        """As :meth:`around`, but raises RuntimeError if one of the neighbours has computed something wrong."""
        around = self.around(route)

        def call(i: int) -> Outputs:
            result = around(i)
            if (problem := self.problem(*result)) is not None:
                raise RuntimeError(f"chain: {problem}")
            return result

        return call

    def problem(self, weights: torch.Tensor, ids: torch.Tensor) -> str | None:
        """What the neighbours of the last call computed wrongly, or None."""
        rows = self._rows.double()
        scale = (rows.square().mean(dim=-1, keepdim=True) + neighbours.EPSILON).rsqrt()
        error = self.dense.inputs.hidden_states.double() / (rows * scale * self._norm_weight.double()) - 1
        if not bool((error.nan_to_num(nan=0.0).abs() < 2**-8).all()):  # 0 / 0 where a row holds a zero
            return "RMSNorm is wrong"
        block = torch.arange(ids.shape[0], device=ids.device)[:, None] // neighbours.TOKENS_PER_BLOCK
        at = (block * self._counts.shape[1] + ids).flatten()
        counts = torch.zeros(self._counts.numel(), dtype=torch.int32, device=ids.device)
        counts.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        sums = torch.zeros(self._sums.numel(), device=ids.device).index_add_(0, at, weights.flatten())
        if not torch.equal(counts, self._counts.flatten()):
            return "the consumer's counts are wrong"
        return (
            None
            if torch.allclose(sums, self._sums.flatten(), rtol=1e-5, atol=1e-6)
            else "the consumer's sums are wrong"
        )


def checked(
    routes: Mapping[str, Route],
    compare: Callable[[torch.Tensor, torch.Tensor], Comparison],
    mine: Outputs,
    say: Callable[[str], None],
    own: frozenset[str] = OWN,
) -> Routes:
    """The routes whose results agree with float64.

    Args:
        routes: by provider.
        compare: weights and ids with float64.
        mine: the outputs that own routes write, made invalid before each.
        say: hears of a foreign provider that raises or differs, which is then left out.
        own: names of this project's.

    Raises:
        RuntimeError: an own one differs. What an own one raises is passed on.
    """
    good = {}
    for name, route in routes.items():
        mine[0].fill_(9e9)
        mine[1].fill_(-7)
        try:
            found = compare(*route(0))
            problem = None if found.ok else str(found)
        except Exception as error:  # of foreign packages
            if name in own:
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if problem is None:
            good[name] = route
        elif name in own:
            raise RuntimeError(f"{name} differs from float64: {problem}")
        else:
            say(f"left out: {name} ({problem})")
    return good
