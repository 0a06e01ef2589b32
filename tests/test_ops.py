# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The operators of ``torch.library``: whole graphs under torch.compile, and the results of eager calls."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from routing_helpers import assert_bits, padding_of_8_rows, poisoned
from torch._dynamo.testing import CompileCounter

from dsv4_router import (
    DenseRouter,
    HashRouter,
    RouterConfig,
    dense_route,
    dense_router_dispatch,
    hash_route,
    hash_router_dispatch,
    ops,
)
from dsv4_router.testing import DenseInputs, HashInputs, make_dense_inputs, make_hash_inputs

CONFIG = RouterConfig(64, 16, 4, 1.5, num_layers=2, num_hash_layers=1, vocab_size=50)
K, SCALING = CONFIG.top_k, CONFIG.routed_scaling_factor
OPERATORS = torch.ops.dsv4_router
Outputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dense(seed: int) -> DenseInputs:
    return make_dense_inputs(CONFIG, 8, seed=seed)


@pytest.fixture
def hashed(seed: int) -> HashInputs:
    return make_hash_inputs(CONFIG, 8, seed=seed)


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``torch.compile`` into one graph, by a backend that needs no compiler."""
    return lambda function, **options: torch.compile(function, fullgraph=True, backend=request.param, **options)


# The operators themselves.

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def passes_opcheck(operator: Any, *args: Any, **options: Any) -> None:
    assert torch.library.opcheck(operator.default, args, options) == dict.fromkeys(TESTS, "SUCCESS")


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", ["none", "int", "tensor", "tensor-1d"])
@pytest.mark.parametrize("operator", ["dense_router", "dense_router_with_logits"])
def test_dense_operators_pass_opcheck(dense: DenseInputs, operator: str, count: str, ids_dtype: torch.dtype) -> None:
    padding, _ = padding_of_8_rows(count, masked=True)
    options = {"token_mask": padding["token_mask"], "ids_dtype": ids_dtype, "padding_id": -5}
    passes_opcheck(
        getattr(OPERATORS, operator), *dense, K, SCALING, **options, **ops._count(padding["num_valid_tokens"])
    )


def test_dense_operators_pass_opcheck_otherwise(dense: DenseInputs) -> None:
    operands = dense.hidden_states.float().requires_grad_(), dense.gate_weight.float().requires_grad_()
    passes_opcheck(OPERATORS.dense_router, *operands, None, 2, 2.0, backend="reference", batch_invariant=True)
    passes_opcheck(OPERATORS.dense_router, dense.hidden_states[:0], *dense[1:], K, SCALING)
    strided = torch.zeros(8, 80, dtype=torch.bfloat16)[:, :64]
    passes_opcheck(OPERATORS.dense_router_with_logits, strided, *dense[1:], K, SCALING, launch_with_pdl=False)


@pytest.mark.parametrize("form", ["plain", "logits", "hidden states"])
def test_the_hash_operator_passes_opcheck(hashed: HashInputs, form: str) -> None:
    scores: dict[str, dict[str, Any]] = {
        "plain": {},
        "logits": {"router_logits": torch.randn(8, 16), "routed_scaling_factor": SCALING},
        "hidden states": {"hidden_states": hashed.hidden_states, "gate_weight": hashed.gate_weight},
    }
    for ids_dtype in (torch.int32, torch.int64):
        passes_opcheck(OPERATORS.hash_router, hashed.token_ids, hashed.hash_lut, K, ids_dtype=ids_dtype, **scores[form])


def test_operators_do_what_the_functions_do(dense: DenseInputs, hashed: HashInputs) -> None:
    logits = torch.zeros(8, 16)
    expected = dense_route(*dense, K, SCALING, ids_dtype=torch.int64, num_valid_tokens=6, logits_out=logits)
    count = {"num_valid_tokens_on_host": 6, "ids_dtype": torch.int64}
    assert_bits(OPERATORS.dense_router(*dense, K, SCALING, **count), expected)
    *pair, written = OPERATORS.dense_router_with_logits(*dense, K, SCALING, **count)
    assert_bits((pair[0], pair[1]), expected)
    assert torch.equal(written, logits)
    assert_bits(
        OPERATORS.hash_router(hashed.token_ids, hashed.hash_lut, K), hash_route(hashed.token_ids, hashed.hash_lut, K)
    )


@pytest.mark.parametrize("operator", ["dense_router", "dense_router_with_logits", "hash_router"])
def test_defaults_are_those_of_the_functions(operator: str) -> None:
    """The dispatcher withholds an option that equals the operator's default, so the function must have the same one."""
    dense, hashed = (dense_route, dense_router_dispatch), (hash_route, hash_router_dispatch)
    expected = {
        name: parameter.default
        for function in (hashed if operator == "hash_router" else dense)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    int32 = 3  # torch.int32 in a schema
    for argument in getattr(OPERATORS, operator).default._schema.arguments:
        if argument.has_default_value():
            default = expected[argument.name.removesuffix("_on_host")]
            assert argument.default_value == (int32 if default is torch.int32 else default), argument.name


def test_wrong_arguments_raise_what_eager_calls_raise(dense: DenseInputs) -> None:
    with pytest.raises(ValueError, match=r"^top_k: expected an int from 1 to 16 .* got int 17$"):
        OPERATORS.dense_router(*dense, 17, SCALING)
    with pytest.raises(TypeError, match=r"^gate_weight: expected"):
        OPERATORS.dense_router(dense.hidden_states, dense.gate_weight.float(), None, K, SCALING)


# Under torch.compile.


def test_dense_route_is_one_graph(dense: DenseInputs, compiled: Callable[..., Any]) -> None:
    def layer(hidden_states: torch.Tensor) -> Outputs:
        weights, ids = dense_route(hidden_states * 1, *dense[1:], K, SCALING, ids_dtype=torch.int64)
        return weights * 2, ids + 1

    weights, ids = dense_route(*dense, K, SCALING, ids_dtype=torch.int64)
    assert_bits(compiled(layer)(dense.hidden_states), (weights * 2, ids + 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", ["none", "int", "tensor", "tensor-1d"])
def test_every_option(dense: DenseInputs, compiled: Callable[..., Any], count: str, masked: bool) -> None:
    padding, _ = padding_of_8_rows(count, masked)
    options: dict[str, Any] = padding | {"padding_id": 7, "launch_with_pdl": False, "weights_are_constant": False}
    options |= {"backend": "reference", "batch_invariant": True}

    def call(hidden_states: torch.Tensor, outputs: Outputs, logits: torch.Tensor) -> Outputs:
        return dense_router_dispatch(hidden_states, *dense[1:], K, SCALING, *outputs, logits_out=logits, **options)

    got, expected = (poisoned(8, K), torch.zeros(8, 16)), (poisoned(8, K), torch.zeros(8, 16))
    returned = compiled(call)(dense.hidden_states, *got)
    call(dense.hidden_states, *expected)
    assert returned[0] is got[0][0]
    assert returned[1] is got[0][1]
    assert_bits(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    into = compiled(lambda x, logits: dense_route(x, *dense[1:], K, SCALING, logits_out=logits, **options))
    assert_bits(into(dense.hidden_states, got[1].zero_()), expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("form", ["plain", "logits", "hidden states"])
@pytest.mark.parametrize("count", ["none", "int", "tensor"])
def test_hash_routing(hashed: HashInputs, compiled: Callable[..., Any], form: str, count: str) -> None:
    options: dict[str, Any] = padding_of_8_rows(count, masked=True)[0]
    if form != "plain":
        options["routed_scaling_factor"] = SCALING
    if form == "logits":
        options["router_logits"] = torch.randn(8, 16)
    elif form == "hidden states":
        options |= {"hidden_states": hashed.hidden_states, "gate_weight": hashed.gate_weight}
    call = hashed.hash_lut, K
    expected = hash_route(hashed.token_ids, *call, **options)
    assert_bits(compiled(lambda tokens: hash_route(tokens, *call, **options))(hashed.token_ids), expected)
    outputs = poisoned(8, K)
    compiled(lambda tokens, w, i: hash_router_dispatch(tokens, *call, w, i, **options))(hashed.token_ids, *outputs)
    assert_bits(outputs, expected)


def test_modules(dense: DenseInputs, hashed: HashInputs, compiled: Callable[..., Any]) -> None:
    router = DenseRouter(CONFIG)
    router.weight.data.copy_(dense.gate_weight)
    router.e_score_correction_bias.copy_(dense.correction_bias)
    hidden = dense.hidden_states.view(2, 4, -1)
    assert_bits(compiled(router)(hidden), router(hidden))
    hash_router = HashRouter(CONFIG)
    hash_router.weight.data.copy_(hashed.gate_weight)
    hash_router.tid2eid.copy_(hashed.hash_lut)
    inputs = hashed.hidden_states, hashed.token_ids
    assert_bits(compiled(hash_router)(*inputs), hash_router(*inputs))


def test_a_dynamic_number_of_tokens_is_one_compilation(dense: DenseInputs, compiled: Callable[..., Any]) -> None:
    frames = CompileCounter()

    def layer(hidden_states: torch.Tensor, num_valid_tokens: int) -> Outputs:
        return dense_route(hidden_states, *dense[1:], K, SCALING, num_valid_tokens=num_valid_tokens)

    counted = torch.compile(layer, fullgraph=True, backend=frames, dynamic=True)
    function = compiled(layer, dynamic=True)
    for rows in (8, 5, 4, 3):
        hidden_states = dense.hidden_states[:rows].clone()
        for call in (counted, function):
            assert_bits(call(hidden_states, rows - 1), layer(hidden_states, rows - 1))
    assert frames.frame_count == 1


@pytest.mark.parametrize("argument", ["out_weights", "out_ids", "logits_out", "top_k", "gate_weight"])
def test_wrong_arguments_raise(dense: DenseInputs, argument: str) -> None:
    """Also those that a copy into the caller's tensors would have converted or broadcast."""
    weights, ids = poisoned(8, K)
    call = {"out_weights": weights, "out_ids": ids, "logits_out": None, "top_k": K, "gate_weight": dense.gate_weight}
    wrong: dict[str, Any] = {"out_weights": weights.bfloat16(), "out_ids": ids.short(), "logits_out": torch.zeros(8, 1)}
    wrong |= {"top_k": 17, "gate_weight": dense.gate_weight[:, 1:]}
    call[argument] = wrong[argument]

    def route(hidden_states: torch.Tensor) -> Outputs:
        return dense_router_dispatch(hidden_states, correction_bias=None, routed_scaling_factor=SCALING, **call)

    messages = []
    for function in (route, torch.compile(route, backend="eager")):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected") as caught:
            function(dense.hidden_states)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_wrong_logits_of_an_allocating_call_raise(dense: DenseInputs) -> None:
    route = torch.compile(lambda x, out: dense_route(x, *dense[1:], K, SCALING, logits_out=out), backend="eager")
    with pytest.raises(ValueError, match=r"^logits_out: expected"):
        route(dense.hidden_states, torch.zeros(1, 16).expand(8, 16))


@pytest.mark.parametrize("option", ["batch_invariant", "launch_with_pdl", "weights_are_constant"])
def test_what_the_schema_would_convert_raises(option: str, dense: DenseInputs, hashed: HashInputs) -> None:
    route = torch.compile(lambda x, **options: dense_route(x, *dense[1:], K, SCALING, **options), backend="eager")
    lookup = torch.compile(lambda x, **options: hash_route(x, hashed.hash_lut, K, **options), backend="eager")
    calls = [(route, dense.hidden_states)] + [(lookup, hashed.token_ids)] * (option != "batch_invariant")
    for call, tensor in calls:
        for options in ({option: 1}, {"num_valid_tokens": True}, {"padding_id": True}):
            with pytest.raises(TypeError, match=f"^{next(iter(options))}: expected "):
                call(tensor, **options)


def test_autocast_changes_nothing(dense: DenseInputs) -> None:
    route = torch.compile(lambda x: dense_route(x, *dense[1:], K, SCALING), backend="aot_eager")
    expected = dense_route(*dense, K, SCALING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bits(route(dense.hidden_states), expected)


def test_nothing_requires_a_gradient(dense: DenseInputs) -> None:
    hidden = dense.hidden_states.float().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        weights, _ = dense_route(x.bfloat16(), *dense[1:], K, SCALING)
        assert not weights.requires_grad
        return (weights.sum() * x).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden).backward()
    assert hidden.grad is not None
    expected = dense_route(*dense, K, SCALING)[0].sum()
    torch.testing.assert_close(hidden.grad, expected.expand_as(hidden))
    assert not OPERATORS.dense_router(hidden, dense.gate_weight.float(), None, K, SCALING)[0].requires_grad


def test_export(dense: DenseInputs) -> None:
    router = DenseRouter(CONFIG)
    router.weight.data.copy_(dense.gate_weight)
    tokens = torch.export.Dim("tokens", min=2)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = router

        def forward(self, hidden_states: torch.Tensor) -> Outputs:
            result: Outputs = self.router(hidden_states)
            return result

    program = torch.export.export(Layer(), (dense.hidden_states,), dynamic_shapes=({0: tokens},), strict=True)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "dsv4_router.dense_router.default" in names
    assert_bits(program.module()(dense.hidden_states[:5]), router(dense.hidden_states[:5]))


def test_operators_are_registered_when_needed() -> None:
    code = (
        "import sys, time, torch, dsv4_router\n"
        "for name in dsv4_router.__all__:\n"
        "    if name != 'DenseRouterDecodeKernel': getattr(dsv4_router, name)\n"
        "dsv4_router.dense_route(torch.zeros(2, 64), torch.zeros(16, 64), None, 4, 1.5)\n"
        "print('dsv4_router.ops' in sys.modules, 'torch._dynamo' in sys.modules)\n"
        "start = time.perf_counter()\n"
        "import dsv4_router.ops\n"
        "print(time.perf_counter() - start < 0.1, 'torch._dynamo' in sys.modules)\n"
        "print(torch.ops.dsv4_router.dense_router.default._schema.is_mutable)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "True False", "False"]
