# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The operators under inductor: whole graphs, the bits of eager calls, dynamic shapes, and inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from routing_helpers import assert_bits
from routing_helpers import poisoned_on_gpu as poisoned
from torch._dynamo.utils import counters

from dsv4_router import V4_FLASH, DenseRouter, HashRouter, dense_route, dense_router_dispatch, dispatch, hash_route
from dsv4_router.testing import DenseInputs, HashInputs, make_dense_inputs, make_hash_inputs

pytestmark = pytest.mark.gpu

K, SCALING = V4_FLASH.top_k, V4_FLASH.routed_scaling_factor
MOST = 300
Outputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@lru_cache(maxsize=1)
def all_dense() -> DenseInputs:
    return make_dense_inputs(V4_FLASH, MOST, seed=1, device="cuda")


@lru_cache(maxsize=1)
def all_hashed() -> HashInputs:
    return make_hash_inputs(V4_FLASH, MOST, seed=2, device="cuda")


def hidden_states(num_tokens: int, step: int = 0) -> torch.Tensor:
    """Other rows for each step."""
    return all_dense().hidden_states.roll(step, 0)[:num_tokens].clone()


def make_layer(**options: Any) -> Callable[..., Outputs]:
    """A dense router between kernels of inductor's, all of whose arithmetic is exact."""
    _, gate, bias = all_dense()

    def layer(hidden: torch.Tensor, **padding: Any) -> Outputs:
        weights, ids = dense_route(hidden * 2 * 0.5, gate, bias, K, SCALING, **options, **padding)
        return weights * 2, ids + 1

    return layer


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **options)


BACKENDS = ("auto", "decode", "cublas")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    found = dispatch.availability(torch.device("cuda", torch.cuda.current_device()))
    if chosen == "decode" and dispatch.plan_refusals(dispatch.Request(4096, 256, K, 1), found, ("decode",)):
        pytest.skip("needs a GPU that the decode path serves")
    return chosen


@pytest.mark.parametrize("num_tokens", [1, 17, 64, 300])
def test_the_bits_of_eager_calls(backend: str, num_tokens: int) -> None:
    layer = make_layer(backend=backend, ids_dtype=torch.int64 if num_tokens % 2 else torch.int32)
    function = compiled(layer)
    for step in range(3):
        hidden = hidden_states(num_tokens, step)
        assert_bits(function(hidden), layer(hidden))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_dynamic_number_of_tokens_is_one_compilation(backend: str) -> None:
    """Each number takes the path that an eager call would take."""
    layer = make_layer(backend=backend)
    function = compiled(layer, dynamic=True)
    for num_tokens in (300, 2, 64, 65, 96, 97, 128, 129, 33, 16):
        hidden = hidden_states(num_tokens)
        assert_bits(function(hidden), layer(hidden))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("num_tokens", [1, 17, 64, 200])
def test_inside_cuda_graphs(backend: str, num_tokens: int) -> None:
    layer = make_layer(backend=backend)
    function = compiled(layer, mode="reduce-overhead")
    for step in range(6):
        hidden = hidden_states(num_tokens, step)
        torch.compiler.cudagraph_mark_step_begin()
        assert_bits(function(hidden), layer(hidden))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_several_routers_in_one_cuda_graph(backend: str) -> None:
    """Dense and hash routers in a chain, as in a model: workspaces and memory of one must not meet another's."""
    hashed, (_, gate, bias) = all_hashed(), all_dense()

    def chain(hidden: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        results: list[torch.Tensor] = []
        for _ in range(3):
            results += dense_route(hidden, gate, bias, K, SCALING, backend=backend)
            results += hash_route(
                tokens,
                hashed.hash_lut,
                K,
                hidden_states=hidden,
                gate_weight=hashed.gate_weight,
                routed_scaling_factor=SCALING,
            )
            hidden = hidden + results[-2].sum().to(torch.bfloat16)
        return results

    graphs = {n: compiled(chain, mode="reduce-overhead", dynamic=False) for n in (16, 48)}
    for step in range(5):
        for num_tokens, function in graphs.items():
            hidden, tokens = hidden_states(num_tokens, step), hashed.token_ids.roll(step)[:num_tokens].clone()
            torch.compiler.cudagraph_mark_step_begin()
            first = [tensor.clone() for tensor in function(hidden, tokens)]
            torch.compiler.cudagraph_mark_step_begin()
            again = function(hidden, tokens)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            # The first two routers' inputs are the caller's own, to the bit.
            assert_bits((first[0], first[1]), dense_route(hidden, gate, bias, K, SCALING, backend=backend))
            scores = {"hidden_states": hidden, "gate_weight": hashed.gate_weight, "routed_scaling_factor": SCALING}
            assert_bits((first[2], first[3]), hash_route(tokens, hashed.hash_lut, K, **scores))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_padding_in_replays(backend: str) -> None:
    """The count on the device may change from replay to replay."""
    layer = make_layer(backend=backend, padding_id=-7)
    function = compiled(layer, mode="reduce-overhead")
    mask = torch.arange(40, device="cuda") % 3 != 1
    for valid in (40, 7, 0, 33, 40):
        count = torch.tensor([valid], dtype=torch.int32, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        weights, ids = function(hidden_states(40, valid), token_mask=mask, num_valid_tokens=count)
        expected = layer(hidden_states(40, valid), token_mask=mask, num_valid_tokens=count)
        assert_bits((weights, ids), expected)
        assert bool((ids[valid:] == -6).all())
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_into_the_callers_tensors(backend: str, mode: str) -> None:
    _, gate, bias = all_dense()

    def call(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> None:
        dense_router_dispatch(hidden * 1, gate, bias, K, SCALING, weights, ids, backend=backend, logits_out=logits)

    function = compiled(call, mode=mode)
    got, logits = poisoned(33), torch.zeros(33, 256, device="cuda")
    expected, expected_logits = poisoned(33), torch.zeros(33, 256, device="cuda")
    for step in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        function(hidden_states(33, step), *got, logits)
        call(hidden_states(33, step), *expected, expected_logits)
        assert_bits(got, expected)
        assert torch.equal(logits, expected_logits)


def test_modules() -> None:
    router = DenseRouter(V4_FLASH, device="cuda")
    router.weight.data.copy_(all_dense().gate_weight)
    router.e_score_correction_bias.copy_(all_dense().correction_bias)
    hash_router = HashRouter(V4_FLASH, device="cuda")
    hash_router.weight.data.copy_(all_hashed().gate_weight)
    hash_router.tid2eid.copy_(all_hashed().hash_lut)
    hidden, tokens = hidden_states(24).view(4, 6, -1), all_hashed().token_ids[:24].view(4, 6)
    for mode in ("default", "reduce-overhead"):
        dense, hashed = compiled(router, mode=mode), compiled(hash_router, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            assert_bits(dense(hidden), router(hidden))
            torch.compiler.cudagraph_mark_step_begin()
            assert_bits(hashed(hidden, tokens), hash_router(hidden, tokens))


def test_operators_pass_opcheck(backend: str) -> None:
    operators, inputs, hashed = torch.ops.dsv4_router, all_dense(), all_hashed()
    call = hidden_states(9), inputs.gate_weight, inputs.correction_bias, K, SCALING
    options = {"backend": backend, "num_valid_tokens": torch.tensor(5, dtype=torch.int32, device="cuda")}
    torch.library.opcheck(operators.dense_router.default, call, options)
    torch.library.opcheck(operators.dense_router_with_logits.default, call, options | {"ids_dtype": torch.int64})
    scores = {"hidden_states": hidden_states(9), "gate_weight": hashed.gate_weight}
    torch.library.opcheck(operators.hash_router.default, (hashed.token_ids[:9].clone(), hashed.hash_lut, K), scores)


def test_rows_with_a_stride(backend: str) -> None:
    """The operator gets the strides of an eager call, not a layout of inductor's choice."""
    wide = torch.zeros(20, 4096 + 64, dtype=torch.bfloat16, device="cuda")
    wide[:, :4096] = hidden_states(20)
    _, gate, bias = all_dense()

    def call(x: torch.Tensor) -> Outputs:
        return dense_route((x * 1)[:, :4096], gate, bias, K, SCALING, backend=backend)

    assert_bits(compiled(call)(wide), call(wide))
