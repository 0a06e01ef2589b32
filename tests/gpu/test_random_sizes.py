# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Every path at sizes that nobody chose; ``--random-sizes 400`` draws more of them."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from routing_helpers import Result, assert_same, poisoned_result, route_on_gpu

import dsv4_router
from dsv4_router import decode_config, dispatch
from dsv4_router.arguments import NO_OPTIONS
from dsv4_router.backends import cublas, decode
from dsv4_router.config import RouterConfig
from dsv4_router.decode_config import TOKEN_TILES
from dsv4_router.logits_config import logits_configs
from dsv4_router.profiling.splits import ways
from dsv4_router.testing import (
    DenseInputs,
    compare_dense,
    compare_hash,
    float64_logits,
    logit_tolerance,
    make_dense_inputs,
    make_hash_inputs,
)

pytestmark = pytest.mark.gpu

ROWS = 560
GUARD = 16  # rows around the outputs, which stay as they are
INTEGERS = (torch.int32, torch.int64)


class Sizes(NamedTuple):
    """What the decode path can serve."""

    hidden_size: int
    num_experts: int
    top_k: int


def drawn(number: int) -> Sizes:
    """The same for a number every time."""
    draw = random.Random(number)
    hidden_size = draw.randrange(
        decode_config.MIN_HIDDEN_SIZE, decode_config.MAX_HIDDEN_SIZE + 1, decode_config.HIDDEN_SIZE_STEP
    )
    num_experts = draw.randrange(
        decode_config.MIN_NUM_EXPERTS, decode_config.MAX_NUM_EXPERTS + 1, decode_config.NUM_EXPERTS_STEP
    )
    return Sizes(hidden_size, num_experts, draw.randint(1, decode_config.MAX_TOP_K))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = [drawn(number) for number in range(metafunc.config.getoption("--random-sizes"))]
    metafunc.parametrize("sizes", every, ids=lambda sizes: "H{}-E{}-k{}".format(*sizes))


class Rows:
    """Calls for some of a number of rows, of which each must have the same bits as in every other call."""

    def __init__(self, config: RouterConfig, draw: random.Random) -> None:
        self.config, self.draw = config, draw
        self.inputs = make_dense_inputs(config, ROWS, seed=draw.getrandbits(32), device="cuda")

    def by_tile(self, tile: int) -> None:
        """What all calls shall write, from calls for so many rows each; compared with float64."""
        self.expected = poisoned_result(ROWS, self.config)
        for start in range(0, ROWS, tile):
            rows = slice(start, start + tile)
            route_on_gpu(self.inputs_of(rows), self.config, self.expected.rows(rows))
        found = compare_dense(self.inputs, self.config.top_k, self.config.routed_scaling_factor, *self.expected[:2])
        assert found.ok, found
        self.assert_logits(self.expected, slice(None))

    def inputs_of(self, rows: slice) -> DenseInputs:
        return self.inputs._replace(hidden_states=self.inputs.hidden_states[rows])

    def some(self, num_tokens: int) -> slice:
        start = self.draw.randint(0, ROWS - num_tokens)
        return slice(start, start + num_tokens)

    def assert_logits(self, result: Result, rows: slice) -> None:
        inputs = self.inputs_of(rows)
        error = (result.logits - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs().max()
        assert error <= logit_tolerance(*inputs[:2])

    def call(self, rows: slice, max_looks: int | None = None, **options: object) -> Result:
        """A call into guarded outputs; with ``max_looks``, one whose rows their owners compute alone."""
        num_tokens = rows.stop - rows.start
        guarded = poisoned_result(num_tokens + 2 * GUARD, self.config, self.draw.choice(INTEGERS))
        result = guarded.rows(slice(GUARD, GUARD + num_tokens))
        inputs = self.inputs_of(rows)
        if max_looks is None:
            launch = {name: self.draw.random() < 0.5 for name in ("weights_are_constant", "launch_with_pdl")}
            route_on_gpu(inputs, self.config, result, **launch | options)
        else:
            operands = *inputs, self.config.top_k, self.config.routed_scaling_factor, *result[:2]
            decode.route(operands, result.logits, NO_OPTIONS, max_looks)
        untouched = poisoned_result(GUARD, self.config)
        assert_same(guarded.rows(slice(None, GUARD)), untouched)
        assert_same(guarded.rows(slice(GUARD + num_tokens, None)), untouched)
        return result

    def check(self, num_tokens: int, **options: object) -> None:
        rows = self.some(num_tokens)
        assert_same(self.call(rows, **options), self.expected.rows(rows))  # type: ignore[arg-type]


@pytest.fixture
def draw(seed: int) -> random.Random:
    return random.Random(seed)


def config_of(sizes: Sizes, draw: random.Random) -> RouterConfig:
    return RouterConfig(*sizes, draw.choice((1.0, 1.5, 2.5, 1e-3)), vocab_size=1000)


@pytest.mark.usefixtures("served_by_decode")
def test_bits_of_the_decode_path(sizes: Sizes, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the decode kernel's variants, and every kernel for more rows, with and without rows left."""
    rows = Rows(config_of(sizes, draw), draw)
    target = dispatch.architecture(torch.cuda.get_device_capability())
    largest = decode_config.max_tokens(*sizes, target)
    tiles = draw.sample([tile for tile in TOKEN_TILES if tile <= largest], 2)
    rows.by_tile(tiles[0])
    for tile in tiles:
        fewest = (0, *TOKEN_TILES)[TOKEN_TILES.index(tile)] + 1
        for num_tokens in (fewest, draw.randint(fewest, tile), tile):
            rows.check(num_tokens)
            rows.check(num_tokens, max_looks=draw.choice((0, 1, 3)))
    for way in ways(range(len(logits_configs(*sizes[:2], target)))):
        for num_tokens in (129, draw.choice((255, 256, 257, 384, 512, 513)), draw.randint(130, ROWS)):
            left = draw.choice((0, draw.randint(1, largest)))
            monkeypatch.setattr(decode, "fastest", way._replace(rows_left=left).choose)
            monkeypatch.setattr(cublas, "remembered", {})  # which holds choices
            for _ in range(2):
                rows.check(num_tokens)
    monkeypatch.undo()
    rows.check(draw.randint(1, ROWS), backend="auto", batch_invariant=True)


def test_the_cublas_path(sizes: Sizes, draw: random.Random) -> None:
    rows = Rows(config_of(sizes, draw), draw)
    for num_tokens in (draw.randint(1, 16), draw.randint(17, 128), draw.randint(129, ROWS)):
        some = rows.some(num_tokens)
        result = rows.call(some, backend="cublas")
        found = compare_dense(rows.inputs_of(some), sizes.top_k, rows.config.routed_scaling_factor, *result[:2])
        assert found.ok, found
        rows.assert_logits(result, some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_sizes_go_somewhere(sizes: Sizes, dtype: torch.dtype, draw: random.Random) -> None:
    """Hidden sizes and numbers of experts that the decode kernel does not take, among others."""
    top_k = sizes.top_k
    config = RouterConfig(draw.randint(1, 3000), draw.randint(top_k, 1024), top_k, 1.5)
    inputs = make_dense_inputs(config, draw.randint(1, 3000), seed=draw.getrandbits(32), device="cuda", dtype=dtype)
    result = route_on_gpu(inputs, config, backend="auto")
    found = compare_dense(inputs, top_k, config.routed_scaling_factor, *result[:2])
    assert found.ok, found


def test_hash_routing(sizes: Sizes, draw: random.Random) -> None:
    config = config_of(sizes, draw)
    for num_tokens in (draw.randint(1, 16), draw.randint(17, 600)):
        dtypes = {name: draw.choice(INTEGERS) for name in ("token_dtype", "table_dtype")}
        inputs = make_hash_inputs(config, num_tokens, seed=draw.getrandbits(32), device="cuda", **dtypes)
        weights, ids = dsv4_router.hash_route(
            inputs.token_ids,
            inputs.hash_lut,
            sizes.top_k,
            ids_dtype=draw.choice(INTEGERS),
            routed_scaling_factor=config.routed_scaling_factor,
            hidden_states=inputs.hidden_states,
            gate_weight=inputs.gate_weight,
        )
        found = compare_hash(inputs, sizes.top_k, config.routed_scaling_factor, weights, ids)
        assert found.ok, found
