# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``decode`` path on a GPU: against float64, in every edge case, and the same bits however a token is routed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from routing_helpers import PADDING, Result, assert_same, differing, padding_options
from routing_helpers import poisoned_result as poisoned
from routing_helpers import route_on_gpu as route
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv4_router
from dsv4_router import decode_config, dispatch, reference, thresholds
from dsv4_router.arguments import NO_OPTIONS
from dsv4_router.backends import decode, workspaces
from dsv4_router.config import PRESETS, RouterConfig
from dsv4_router.testing import DenseInputs, compare_dense, float64_logits, logit_tolerance, make_dense_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("served_by_decode")]

ODD = {
    "H1088-E132": RouterConfig(1088, 132, 4, 1.0),  # 9 slices of 2 chunks, the last one half empty
    "H1024-E32": RouterConfig(1024, 32, 1, 3.0),  # one chunk a slice, one group of experts, one expert a token
    "H2112-E144": RouterConfig(2112, 144, 8, 1e-3),  # 11 slices
    "H8192-E512": RouterConfig(8192, 512, 16, 2.5),  # no variant of 128 rows
    "H4096-E36": RouterConfig(4096, 36, 5, 1.5),  # most of the last expert tile is empty
}
CONFIGS = PRESETS | ODD
TOKENS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 100, 127, 128, 129, 200, 1000)
ODD_TOKENS = (1, 3, 16, 33, 65, 128, 200)
COUNTS = (1, 6, 16, 20, 33, 80, 100, 128)  # one for each token tile, for both ways of rows into it, and the fullest


def route_with_looks(inputs: DenseInputs, config: RouterConfig, max_looks: int) -> Result:
    """A call whose rows are computed by their owners alone after so many looks at the other blocks' sums."""
    result = poisoned(inputs.hidden_states.shape[0], config)
    operands = *inputs, config.top_k, config.routed_scaling_factor, result.weights, result.ids
    decode.route(operands, result.logits, NO_OPTIONS, max_looks)
    return result


def assert_valid(result: Result) -> None:
    """k distinct ids in [0, E) and finite weights in every row."""
    weights, ids, logits = result
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    ordered = ids.sort(dim=-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def assert_right(inputs: DenseInputs, config: RouterConfig, result: Result) -> None:
    """Ids, weights and logits against float64."""
    comparison = compare_dense(inputs, config.top_k, config.routed_scaling_factor, result.weights, result.ids)
    assert comparison.ok, comparison
    error = (result.logits - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs().max()
    assert error <= logit_tolerance(inputs.hidden_states, inputs.gate_weight)


@cache
def all_inputs(name: str) -> DenseInputs:
    """The same inputs for all token counts of a configuration: tests of one follow each other."""
    return make_dense_inputs(CONFIGS[name], max(TOKENS), seed=len(name), device="cuda")


def first_inputs(name: str, num_tokens: int) -> tuple[RouterConfig, DenseInputs]:
    inputs = all_inputs(name)
    return CONFIGS[name], inputs._replace(hidden_states=inputs.hidden_states[:num_tokens])


CASES = [(name, n) for name in PRESETS for n in TOKENS] + [(name, n) for name in ODD for n in ODD_TOKENS]


@pytest.mark.parametrize(("name", "num_tokens"), CASES)
def test_against_float64(name: str, num_tokens: int) -> None:
    config, inputs = first_inputs(name, num_tokens)
    for ids_dtype, bias in ((torch.int32, inputs.correction_bias), (torch.int64, None)):
        given = inputs._replace(correction_bias=bias)
        result = route(given, config, poisoned(num_tokens, config, ids_dtype))
        if num_tokens:
            assert_right(given, config, result)
        shorter = poisoned(num_tokens, config, ids_dtype)
        route(given, config, shorter, logits_out=None)  # the way of nearly every call
        assert_same(shorter._replace(logits=result.logits), result)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_a_row_that_its_owner_computes_alone_has_the_same_bits(name: str, num_tokens: int) -> None:
    config, inputs = first_inputs(name, num_tokens)
    expected = route(inputs, config)
    for max_looks in (0, 1, 2):
        assert_same(route_with_looks(inputs, config, max_looks), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_computed_alone_among_others(name: str) -> None:
    """Launches with and without the others' sums alternate on one stream, in all token tiles."""
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    expected = {n: route(first_inputs(name, n)[1], CONFIGS[name]) for n in COUNTS}
    for i in range(60):
        num_tokens = COUNTS[i // 2 % len(COUNTS)]
        config, inputs = first_inputs(name, num_tokens)
        wrong += differing(route_with_looks(inputs, config, i % 2 * decode.MAX_LOOKS), expected[num_tokens])
    assert int(wrong) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_bits_of_a_token_are_the_same_in_every_call(name: str, generator: torch.Generator) -> None:
    """At every number of tokens, and at every place: calls of the first rows, and of rows from somewhere, wrapped."""
    config, inputs = first_inputs(name, 128)
    expected = route(inputs, config)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for num_tokens in range(1, 129):
        start = int(torch.randint(128, (), generator=generator))
        for rows in (torch.arange(num_tokens), (torch.arange(num_tokens) + start) % 128):
            moved = inputs._replace(hidden_states=inputs.hidden_states[rows.cuda()])
            wrong += differing(route(moved, config), expected.rows(rows.cuda()))
    assert int(wrong) == 0


@pytest.mark.parametrize("name", ODD)
def test_bits_of_a_token_are_the_same_in_every_call_of_odd_sizes(name: str, generator: torch.Generator) -> None:
    config, inputs = first_inputs(name, 128)
    expected = route(inputs, config)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for num_tokens in (*COUNTS, 64, 65):
        rows = torch.randperm(128, generator=generator)[:num_tokens].cuda()
        moved = inputs._replace(hidden_states=inputs.hidden_states[rows])
        wrong += differing(route(moved, config), expected.rows(rows))
    assert int(wrong) == 0


@pytest.mark.parametrize("num_tokens", [300, 1000])
@pytest.mark.parametrize("name", ["v4-pro", "v4-flash"])
def test_batch_invariant_calls_of_many_tokens(name: str, num_tokens: int) -> None:
    config, inputs = first_inputs(name, num_tokens)
    more = thresholds.MOST_TOKENS + 1  # than any GPU's thresholds speak of
    assert dsv4_router.explain(config, more, "cuda").path == "cublas"
    for rows in (num_tokens, more):
        assert dsv4_router.explain(config, rows, "cuda", batch_invariant=True).path == "decode"
    together = route(inputs, config, backend="auto", batch_invariant=True)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for row in range(num_tokens):
        alone = inputs._replace(hidden_states=inputs.hidden_states[row : row + 1])
        wrong += differing(route(alone, config), together.rows(slice(row, row + 1)))
    assert int(wrong) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_options_of_the_launch_change_no_bits(name: str) -> None:
    config, inputs = first_inputs(name, 100)
    expected = route(inputs, config)
    for launch_with_pdl in (False, True):
        for weights_are_constant in (False, True):
            options = {"launch_with_pdl": launch_with_pdl, "weights_are_constant": weights_are_constant}
            assert_same(route(inputs, config, **options), expected)
            assert_same(route(inputs, config, logits_out=None, **options)._replace(logits=expected.logits), expected)


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_an_int_is_a_scaling_factor_too(num_tokens: int) -> None:
    config, inputs = first_inputs("v4-flash", num_tokens)
    for factor in (2, 10**20):
        of_int, of_float = (dataclasses.replace(config, routed_scaling_factor=kind(factor)) for kind in (int, float))
        assert_same(route(inputs, of_int), route(inputs, of_float))


@pytest.mark.parametrize("num_tokens", [4, 200])
@pytest.mark.parametrize("argument", range(2))
def test_tensors_without_memory_are_refused(argument: int, num_tokens: int) -> None:
    """Of a shape whose calls may take the short way by now."""
    config, inputs = first_inputs("v4-flash", num_tokens)
    for _ in range(2):
        route(inputs, config, logits_out=None)
    with FakeTensorMode():
        fake = torch.empty(inputs[argument].shape, dtype=inputs[argument].dtype, device="cuda")
    given = DenseInputs(*inputs[:argument], fake, *inputs[argument + 1 :])
    for backend in ("auto", "decode", "cublas"):
        with pytest.raises(TypeError, match=rf"^{inputs._fields[argument]}: expected a tensor with memory of its own"):
            route(given, config, backend=backend, logits_out=None)


@pytest.mark.parametrize("factor", [0.0, -2.0, 1.5, 1e-30, 3e38, 2])
def test_scaling_factors(factor: float) -> None:
    """The factor is the last thing that a weight is multiplied by, once, in fp32; a Python int will do."""
    config, inputs = first_inputs("v4-flash", 17)
    plain = route(inputs, RouterConfig(config.hidden_size, config.num_experts, config.top_k, 1.0))
    scaled = route(inputs, RouterConfig(config.hidden_size, config.num_experts, config.top_k, factor))
    assert torch.equal(scaled.weights, plain.weights * factor)
    assert torch.equal(scaled.ids, plain.ids)


def test_without_recording_for_autograd() -> None:
    config, inputs = first_inputs("v4-flash", 33)
    expected = route(inputs, config)
    gate = torch.nn.Parameter(inputs.gate_weight)
    result = route(inputs._replace(gate_weight=gate), config)
    assert_same(result, expected)
    assert not result.weights.requires_grad


# Ties and hostile numbers: inputs whose logits are chosen and exact.


def of_logits(hot: torch.Tensor, values: torch.Tensor, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and gate weight of which row n's logits are exactly ``hot[n] * values[n]``, bf16 numbers.

    A row has one element that is not zero; their places are spread over all slices of K.
    """
    num_tokens, num_experts = values.shape
    step = hidden_size // num_tokens
    columns = torch.arange(num_tokens, device="cuda") * step + torch.arange(num_tokens, device="cuda") % step
    hidden_states = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda")
    hidden_states[torch.arange(num_tokens, device="cuda"), columns] = hot.bfloat16().cuda()
    gate_weight = torch.zeros(num_experts, hidden_size, dtype=torch.bfloat16, device="cuda")
    gate_weight[:, columns] = values.T.bfloat16()
    return hidden_states, gate_weight


def biases(num_experts: int) -> list[torch.Tensor | None]:
    """None; three values; those and NaN for some experts; NaN for all experts but the last; NaN for all.

    The three are so far apart that selections of one logit are equal exactly if their biases are.
    """
    experts = torch.arange(num_experts, device="cuda")
    three = torch.tensor([0.0, 8.0, -16.0], device="cuda")[experts % 3]
    unwanted = (experts % 5 == 0, experts != num_experts - 1, experts >= 0)
    return [None, three, *(three.masked_fill(those, torch.nan) for those in unwanted)]


def assert_exact(config: RouterConfig, logits: torch.Tensor, bias: torch.Tensor | None, result: Result) -> None:
    """The outputs that exact logits lead to: equal selections by ascending id, NaN after every number."""
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=0, equal_nan=True)
    score = reference.scores(logits)
    selection = score if bias is None else score + bias
    assert_valid(result)
    assert torch.equal(result.ids.long(), reference.order(selection)[:, : config.top_k])
    chosen = reference.scores(logits.double()).gather(1, result.ids.long())
    expected = reference.normalize(chosen, config.routed_scaling_factor)
    assert torch.allclose(result.weights.double(), expected, rtol=5e-6, atol=1e-38)  # denormals are less exact


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_selections_go_by_id(name: str, generator: torch.Generator) -> None:
    """All equal; equal within and across groups of 32 experts and expert tiles; few distinct values at random."""
    config = CONFIGS[name]
    experts = torch.arange(config.num_experts)
    tile = decode_config.DecodeConfig(config.hidden_size, config.num_experts, config.top_k, 16).expert_tile
    patterns = [experts // 32, experts % 32, experts // tile, experts % tile, experts % 2, experts % 7, experts // 2]
    patterns += [-p for p in patterns] + [torch.full_like(experts, v) for v in (-20, 0, 20)]
    patterns += [(experts == config.num_experts - 1).long(), (experts != 0).long(), experts, -experts]
    patterns += list(torch.randint(-2, 3, (100 - len(patterns), config.num_experts), generator=generator))
    values = (torch.stack(patterns).clamp(-30, 30) * 0.25).cuda()
    hidden_states, gate_weight = of_logits(torch.ones(100), values, config.hidden_size)
    for bias in biases(config.num_experts):
        result = route(DenseInputs(hidden_states, gate_weight, bias), config)
        assert_exact(config, values, bias, result)


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_logits(name: str, generator: torch.Generator) -> None:
    """Logits of -1e4, 1e4, infinities and NaN, most of them ties, in rows beside each other."""
    config = CONFIGS[name]
    values = torch.tensor([-1e4, -170.0, -2.0, 0.0, 0.0, 1.0, 1.0, 1e4]).bfloat16().float()
    picks = torch.randint(len(values), (128, config.num_experts), generator=generator)
    picks[: len(values)] = torch.arange(len(values))[:, None]  # every value as a row of its own
    hot = torch.tensor([1.0, 1.0, -1.0, torch.inf, 1.0, torch.nan, -torch.inf])[torch.arange(128) % 7].cuda()
    hot[: len(values)] = 1.0
    chosen = values[picks].cuda()
    hidden_states, gate_weight = of_logits(hot, chosen, config.hidden_size)
    for bias in biases(config.num_experts):
        result = route(DenseInputs(hidden_states, gate_weight, bias), config)
        assert_exact(config, hot[:, None] * chosen, bias, result)


@pytest.mark.parametrize("centre", [-170.0, -90.0, -20.0, 0.0, 20.0, 1e4])
def test_weights_wherever_logits_lie(centre: float, generator: torch.Generator) -> None:
    config = CONFIGS["v4-pro"]
    values = (centre + torch.randn(128, config.num_experts, generator=generator)).bfloat16().float().cuda()
    hidden_states, gate_weight = of_logits(torch.ones(128), values, config.hidden_size)
    assert_exact(config, values, None, route(DenseInputs(hidden_states, gate_weight, None), config))


@pytest.mark.parametrize("tiny", [0.0, 1e-40, -1e-40])
def test_rows_of_zeros_and_denormals(tiny: float) -> None:
    """Their logits are as good as 0, so the bias alone chooses, and weights are equal."""
    config, inputs = first_inputs("v4-flash", 20)
    hidden_states = torch.full_like(inputs.hidden_states, tiny)
    result = route(inputs._replace(hidden_states=hidden_states), config)
    assert (result.logits.abs() < 1e-35).all()
    wanted = inputs.correction_bias.topk(config.top_k).indices
    assert torch.equal(result.ids.long(), wanted.expand(20, -1))
    assert torch.allclose(result.weights, torch.full_like(result.weights, 1.5 / config.top_k), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-40, 0.0])
@pytest.mark.parametrize("num_tokens", [2, 7, 16, 64, 128, 200])
def test_bad_hidden_states_stay_in_their_rows(bad: float, num_tokens: int) -> None:
    config, inputs = first_inputs("v4-pro", num_tokens)
    clean = route(inputs, config)
    rows = torch.arange(num_tokens, device="cuda") % 5 == 1
    hidden_states = inputs.hidden_states.clone()
    hidden_states[rows] = bad
    result = route(inputs._replace(hidden_states=hidden_states), config)
    assert_same(result.rows(~rows), clean.rows(~rows))
    assert_valid(result)


@pytest.mark.parametrize("how", PADDING)
@pytest.mark.parametrize("num_tokens", [1, 50, 128, 300])
@pytest.mark.parametrize(
    ("padding_id", "ids_dtype"), [(-1, torch.int32), (12345, torch.int32), (-(1 << 40), torch.int64)]
)
def test_padding_rows(how: str, num_tokens: int, padding_id: int, ids_dtype: torch.dtype) -> None:
    """Padding rows are full of NaN, and are the only ones that change."""
    config, inputs = first_inputs("v4-flash", num_tokens)
    clean = route(inputs, config, poisoned(num_tokens, config, ids_dtype))
    options, valid = padding_options(num_tokens, how)
    hidden_states = inputs.hidden_states.clone()
    hidden_states[~valid] = torch.nan
    result = poisoned(num_tokens, config, ids_dtype)
    route(inputs._replace(hidden_states=hidden_states), config, result, padding_id=padding_id, **options)
    assert (result.ids[~valid] == padding_id).all()
    assert (result.weights[~valid] == 0).all()
    assert result.logits[~valid].isnan().all()
    assert_same(result.rows(valid), clean.rows(valid))


def test_logits_of_padding_rows_are_written_too() -> None:
    config, inputs = first_inputs("v4-flash", 50)
    assert torch.equal(route(inputs, config, num_valid_tokens=20).logits, route(inputs, config).logits)


# Where tensors lie.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 33, 100, 200])
def test_nothing_beyond_the_rows_is_written(name: str, num_tokens: int) -> None:
    config, inputs = first_inputs(name, num_tokens)
    expected, guarded = route(inputs, config), poisoned(num_tokens + 128, config)
    inner = guarded.rows(slice(64, 64 + num_tokens))
    dsv4_router.dense_router_dispatch(
        *inputs, config.top_k, config.routed_scaling_factor, *inner[:2], logits_out=inner.logits, backend="decode"
    )
    assert_same(inner, expected)
    untouched = poisoned(64, config)
    assert_same(guarded.rows(slice(None, 64)), untouched)
    assert_same(guarded.rows(slice(64 + num_tokens, None)), untouched)


@pytest.mark.parametrize("extra", [8, 64, 1000])
@pytest.mark.parametrize("num_tokens", [1, 2, 33, 128, 200])
def test_strided_rows(extra: int, num_tokens: int) -> None:
    """Only the rows themselves are read: what lies between them is NaN."""
    config, inputs = first_inputs("H1088-E132", num_tokens)
    expected = route(inputs, config)
    wide_hidden = torch.full((num_tokens, config.hidden_size + extra), torch.nan, dtype=torch.bfloat16, device="cuda")
    wide_gate = torch.full((config.num_experts, config.hidden_size + extra), torch.nan, device="cuda").bfloat16()
    hidden_states, gate_weight = wide_hidden[:, : config.hidden_size], wide_gate[:, : config.hidden_size]
    hidden_states.copy_(inputs.hidden_states)
    gate_weight.copy_(inputs.gate_weight)
    for given in (
        inputs._replace(hidden_states=hidden_states),
        inputs._replace(gate_weight=gate_weight),
        inputs._replace(hidden_states=hidden_states, gate_weight=gate_weight),
    ):
        assert_same(route(given, config), expected)
        assert_same(route(given, config, backend="auto", batch_invariant=True), expected)


@pytest.mark.parametrize("stride", [0, 1, 13, 1 << 40])
def test_the_stride_of_a_single_row_means_nothing(stride: int) -> None:
    config, inputs = first_inputs("v4-flash", 1)
    given = inputs._replace(hidden_states=inputs.hidden_states.as_strided((1, config.hidden_size), (stride, 1)))
    assert_same(route(given, config), route(inputs, config))
    assert_same(route(given, config, backend="auto"), route(inputs, config))


def misaligned(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same matrix, whose rows do not begin at multiples of 16 bytes."""
    rows, columns = tensor.shape
    if how == "shifted":
        return torch.empty(rows * columns + 1, dtype=tensor.dtype, device="cuda")[1:].view(rows, columns).copy_(tensor)
    return torch.empty(rows, columns + 4, dtype=tensor.dtype, device="cuda")[:, :columns].copy_(tensor)


@pytest.mark.parametrize("how", ["shifted", "stride"])
@pytest.mark.parametrize("which", ["hidden_states", "gate_weight"])
def test_misaligned_rows_go_by_cublas(how: str, which: str) -> None:
    config, inputs = first_inputs("v4-flash", 16)
    route(inputs, config)  # the model is known now, and calls may take the short way
    given = inputs._replace(**{which: misaligned(getattr(inputs, which), how)})
    outputs = poisoned(16, config)
    with pytest.raises(dsv4_router.BackendUnavailableError, match="16 bytes"):
        dsv4_router.dense_router_dispatch(*given, config.top_k, 1.5, *outputs[:2], backend="decode")
    assert_same(outputs, poisoned(16, config))
    chosen = route(given, config, backend="auto", logits_out=None)
    assert compare_dense(inputs, config.top_k, 1.5, chosen.weights, chosen.ids).ok
    assert_same(chosen, route(given, config, backend="cublas", logits_out=None))


def test_fp32_operands_are_refused() -> None:
    config, inputs = first_inputs("v4-flash", 16)
    given = inputs._replace(hidden_states=inputs.hidden_states.float(), gate_weight=inputs.gate_weight.float())
    with pytest.raises(dsv4_router.BackendUnavailableError, match="bfloat16, not float32"):
        route(given, config)
    assert compare_dense(given, config.top_k, 1.5, *route(given, config, backend="auto")[:2]).ok


# Which path, and when kernels are loaded.


def test_auto_takes_the_decode_path() -> None:
    plan = dsv4_router.explain(dsv4_router.V4_PRO, 16, "cuda")
    assert (plan.path, plan.rejected) == ("decode", ()), plan
    limit = dispatch.decode_limit(7168, 384, dispatch.availability(torch.device("cuda", 0)))
    many = dsv4_router.explain(dsv4_router.V4_PRO, limit.max_tokens + 1, "cuda")
    assert many.path == "cublas", many
    assert dict(many.rejected)["decode"] == f"faster {limit} only ({limit.source})"


@pytest.mark.parametrize("beyond", [0, 1])
def test_auto_does_what_the_plan_says(beyond: int) -> None:
    limit = dispatch.decode_limit(7168, 384, dispatch.availability(torch.device("cuda", 0))).max_tokens
    num_tokens, path = limit + beyond, "cublas" if beyond else "decode"
    config, inputs = first_inputs("v4-pro", num_tokens)
    assert dsv4_router.explain(config, num_tokens, "cuda").path == path
    expected = route(inputs, config, backend=path)
    assert_same(route(inputs, config, backend="auto"), expected)
    assert_same(route(inputs, config, backend="auto", logits_out=None)._replace(logits=expected.logits), expected)


_loaded_here: list[Any] = []  # kernels stay loaded for good, as they would outside of a test


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has not routed yet: neither kernels nor workspaces. Those that there were come back."""
    torch.cuda.synchronize()
    monkeypatch.setattr(decode, "_models", {})
    monkeypatch.setattr(workspaces, "_of_streams", {})
    yield monkeypatch
    _loaded_here.append(decode._models)
    torch.cuda.synchronize()


def test_after_warmup_nothing_is_compiled_or_allocated(nothing_loaded: pytest.MonkeyPatch) -> None:
    config, inputs = first_inputs("v4-flash", 128)
    plan = dsv4_router.warmup(config, "cuda")
    assert plan.path == "decode", plan

    def refuse(*args: Any) -> None:
        raise AssertionError(f"called after warmup: {args}")

    for name in ("compile_object", "object_code", "link"):
        nothing_loaded.setattr(decode, name, refuse)
    nothing_loaded.setattr(workspaces, "_allocate", refuse)
    for num_tokens in range(1, 129):
        given = inputs._replace(hidden_states=inputs.hidden_states[:num_tokens])
        result = route(given, config)
        if num_tokens in (1, 17, 33, 128):
            assert_right(given, config, result)


def test_warmup_in_a_capture_makes_what_eager_calls_need(nothing_loaded: pytest.MonkeyPatch) -> None:
    config, inputs = first_inputs("v4-flash", 4)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        decode.warmup(torch.cuda.current_device(), config.hidden_size, config.num_experts, config.top_k)
        captured = route(inputs, config)
    nothing_loaded.setattr(workspaces, "_allocate", lambda num_bytes: pytest.fail("a workspace was made"))
    with torch.cuda.stream(stream):
        eager = route(inputs, config)
    torch.cuda.synchronize()
    assert_right(inputs, config, eager)
    graph.replay()
    assert_same(captured, eager)


def test_the_first_call_needs_no_warmup(nothing_loaded: pytest.MonkeyPatch) -> None:
    for num_tokens in COUNTS:
        config, inputs = first_inputs("v4-flash", num_tokens)
        assert_right(inputs, config, route(inputs, config))
