# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``cublas`` path on a GPU: against float64, in every edge case, and its top-k kernel alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pytest
import torch
from routing_helpers import CONFIGS, PADDING, TOKENS, TOP_KS, assert_bits, of_file, padding_options
from routing_helpers import poisoned_on_gpu as poisoned

import dsv4_router
from dsv4_router import dispatch, reference, thresholds
from dsv4_router.backends import cublas, cublaslt, cuda_module
from dsv4_router.config import RouterConfig
from dsv4_router.testing import (
    DenseInputs,
    compare_dense,
    compare_selection,
    float64_logits,
    logit_tolerance,
    make_dense_inputs,
)

pytestmark = pytest.mark.gpu


@lru_cache(maxsize=1)
def inputs_of(name: str, top_k: int) -> tuple[RouterConfig, DenseInputs]:
    """The same inputs for all token counts of a configuration: tests of one follow each other."""
    c = CONFIGS[name]
    config = RouterConfig(c.hidden_size, c.num_experts, top_k, c.routed_scaling_factor)
    return config, make_dense_inputs(config, max(TOKENS), seed=top_k, device="cuda")


def route(inputs: DenseInputs, config: RouterConfig, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A call on the cublas path, unless the options say otherwise."""
    options = {"backend": "cublas"} | options
    outputs = poisoned(inputs.hidden_states.shape[0], config.top_k)
    return dsv4_router.dense_router_dispatch(*inputs, config.top_k, config.routed_scaling_factor, *outputs, **options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_against_float64(name: str, top_k: int, num_tokens: int) -> None:
    config, (hidden_states, gate_weight, correction_bias) = inputs_of(name, top_k)
    inputs = DenseInputs(hidden_states[:num_tokens], gate_weight, correction_bias)
    ids_dtype = torch.int64 if num_tokens % 2 else torch.int32
    weights, ids = poisoned(num_tokens, top_k, ids_dtype)
    returned = dsv4_router.dense_router_dispatch(
        *inputs, top_k, config.routed_scaling_factor, weights, ids, backend="cublas"
    )
    assert returned[0] is weights
    assert returned[1] is ids
    if num_tokens:
        result = compare_dense(inputs, top_k, config.routed_scaling_factor, weights, ids)
        assert result.ok, result


@pytest.mark.parametrize(("num_experts", "num_tokens"), [(255, 16), (384, 1000)])
def test_auto_takes_the_cublas_path(num_experts: int, num_tokens: int) -> None:
    """Where the one-launch kernel cannot serve the call, and where it would be slower."""
    config = RouterConfig(7168, num_experts, 6, 2.5)
    plan = dsv4_router.explain(config, num_tokens, "cuda")
    assert plan.path == "cublas", plan
    assert "decode" in dict(plan.rejected)
    inputs = make_dense_inputs(config, num_tokens, seed=num_tokens, device="cuda")
    chosen, wanted = route(inputs, config, backend="auto"), route(inputs, config)
    assert all(torch.equal(a, b) for a, b in zip(chosen, wanted, strict=True))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "decode"}, "the one-launch kernel needs num_experts"),
        ({"backend": "cublas", "batch_invariant": True}, "not batch-invariant"),
    ],
)
def test_what_the_path_cannot_serve_raises(options: dict[str, Any], why: str, seed: int) -> None:
    inputs = make_dense_inputs(RouterConfig(4096, 255, 6, 1.5), 4, seed=seed, device="cuda")
    outputs = poisoned(4, 6)
    with pytest.raises(dsv4_router.BackendUnavailableError, match=why):
        dsv4_router.dense_router_dispatch(*inputs, 6, 1.5, *outputs, **options)
    assert (outputs[1] == -7).all()


@pytest.mark.parametrize("hidden_size", [64, 100, 1001, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_sizes_dtypes_and_strides(hidden_size: int, dtype: torch.dtype, seed: int) -> None:
    config = RouterConfig(hidden_size, 144, 4, 2.5)
    inputs = make_dense_inputs(config, 33, seed=seed, device="cuda", dtype=dtype)
    wide = torch.full((33, hidden_size + 24), torch.nan, dtype=dtype, device="cuda")
    wide[:, :hidden_size] = inputs.hidden_states
    shifted = torch.empty(33 * hidden_size + 1, dtype=dtype, device="cuda")[1:].view(33, hidden_size)
    shifted.copy_(inputs.hidden_states)
    for hidden_states in (inputs.hidden_states, wide[:, :hidden_size], shifted):
        weights, ids = route(inputs._replace(hidden_states=hidden_states), config)
        result = compare_dense(inputs, 4, 2.5, weights, ids)
        assert result.ok, result


def test_fp32_operands_never_use_tf32(seed: int) -> None:
    config = RouterConfig(4096, 256, 6, 1.5)
    inputs = make_dense_inputs(config, 64, seed=seed, device="cuda", dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    exact = float64_logits(inputs.hidden_states, inputs.gate_weight)
    tolerance = logit_tolerance(inputs.hidden_states, inputs.gate_weight)
    torch.set_float32_matmul_precision("high")
    try:
        tf32_error = (inputs.hidden_states @ inputs.gate_weight.T - exact).abs().max()
        assert tf32_error > 10 * tolerance, "the setting has no effect here: this test would prove nothing"
        for backend in ("cublas", "reference"):
            logits = torch.full((64, 256), torch.nan, device="cuda")
            route(inputs, config, logits_out=logits, backend=backend)
            assert (logits - exact).abs().max() <= tolerance
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["auto", "cublas", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [16, 5000])
def test_autocast_changes_nothing(
    autocast: torch.dtype, dtype: torch.dtype, backend: str, num_tokens: int, seed: int
) -> None:
    config = RouterConfig(4096, 256, 6, 1.5)
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda", dtype=dtype)
    expected = route(inputs, config, backend=backend)
    with torch.autocast("cuda", dtype=autocast):
        assert (inputs.hidden_states[:1] @ inputs.gate_weight.T).dtype is autocast
        assert_bits(route(inputs, config, backend=backend), expected)
        logits = torch.full((num_tokens, 256), torch.nan, device="cuda")
        assert_bits(route(inputs, config, backend=backend, logits_out=logits), expected)
    error = (logits - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs().max()
    assert error <= 14 * logit_tolerance(inputs.hidden_states, inputs.gate_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["gradient", "inference"])
@pytest.mark.parametrize("num_tokens", [16, 5000])
def test_logits_out_that_torch_would_not_write(how: str, dtype: torch.dtype, num_tokens: int, seed: int) -> None:
    config = RouterConfig(4096, 256, 6, 1.5)
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda", dtype=dtype)
    expected, logits = (torch.full((num_tokens, 256), torch.nan, device="cuda") for _ in range(2))
    if how == "gradient":
        logits.requires_grad_()
    else:
        with torch.inference_mode():
            logits = logits.clone()
    plain = route(inputs, config, logits_out=expected)
    assert_bits(route(inputs, config, logits_out=logits), plain)
    assert torch.equal(logits.detach(), expected)


@pytest.mark.parametrize("name", ["v4-pro-E384", "v4-flash-E256", "v4.1-flash-E384", "v4.1-flash-draft-E128", "E255"])
@pytest.mark.parametrize(("num_tokens", "bounds"), [(1, 1), (100, 1), (1024, 1), (1025, 6), (4096, 6), (4097, 14)])
def test_logits_out(name: str, num_tokens: int, bounds: int) -> None:
    """The contract's bound up to 1024 tokens; above, cuBLAS's longer sums exceed it by what ARCHITECTURE.md says."""
    config, whole = inputs_of(name, 6)
    inputs = whole._replace(hidden_states=whole.hidden_states[:num_tokens])
    logits = torch.full((num_tokens, config.num_experts), torch.nan, device="cuda")
    first = route(inputs, config, logits_out=logits)
    error = (logits - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs().max()
    assert error <= bounds * logit_tolerance(inputs.hidden_states, inputs.gate_weight)
    second = route(inputs, config)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    unaligned = torch.full((logits.numel() + 1,), torch.nan, device="cuda")[1:].view(num_tokens, -1)
    third = route(inputs, config, logits_out=unaligned)
    assert torch.equal(unaligned, logits)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("name", ["v4-pro-E384", "v4-flash-E256", "E132"])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 1000, 1024])
def test_the_short_way_gives_the_same_bits(
    name: str, num_tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call of a shape goes straight to cuBLASLt and to the launch."""
    config = CONFIGS[name]
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    monkeypatch.setattr(cublas, "remembered", {})
    monkeypatch.setattr(torch, "bmm", None)
    first = route(inputs, config)
    assert len(cublas.remembered) == 1
    monkeypatch.setattr(cublas, "route", None)
    gate = torch.nn.Parameter(inputs.gate_weight)
    for options in ({}, {"launch_with_pdl": False}, {"weights_are_constant": False}):
        second = route(inputs._replace(gate_weight=gate), config, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not second[0].requires_grad


@pytest.mark.parametrize("num_tokens", [1, 33, 1000])
def test_without_cublaslt_torch_multiplies(num_tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dsv4_router.V4_PRO
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    monkeypatch.setattr(cublas, "remembered", {})
    monkeypatch.setattr(cublaslt, "product", lambda device_index, sizes: None)
    for _ in range(2):
        result = compare_dense(inputs, 6, config.routed_scaling_factor, *route(inputs, config))
        assert result.ok, result
    assert not cublas.remembered


def test_eight_threads_at_once(seed: int) -> None:
    """They share the handle and the remembered calls; each has its stream."""
    config = dsv4_router.V4_FLASH
    inputs = [make_dense_inputs(config, 16, seed=seed + i, device="cuda") for i in range(8)]
    expected = [route(each, config) for each in inputs]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            same = torch.ones((), dtype=torch.bool, device="cuda")
            for _ in range(300):
                weights, ids = route(inputs[i], config)
                same &= (weights == expected[i][0]).all() & (ids == expected[i][1]).all()
            return bool(same)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_logits_of_padding_rows_are_written_too(seed: int) -> None:
    config = dsv4_router.V4_FLASH
    inputs = make_dense_inputs(config, 50, seed=seed, device="cuda")
    logits, clean = (torch.full((50, 256), torch.nan, device="cuda") for _ in range(2))
    route(inputs, config, logits_out=clean)
    route(inputs, config, logits_out=logits, num_valid_tokens=20)
    assert torch.equal(logits, clean)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("num_experts", [132, 255, 256, 384])
def test_topk_adds_partial_logits_in_order(splits: int, num_experts: int, seed: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    partial = torch.randn(splits, 33, num_experts, generator=generator, device="cuda")
    expected = partial[0].clone()
    for part in partial[1:]:
        expected += part
    weights, ids = poisoned(33, 6)
    sums = torch.full((33, num_experts), torch.nan, device="cuda")
    cublas.activation_topk(partial, None, 6, 2.5, weights, ids, logits_out=sums)
    assert torch.equal(sums, expected)
    alone = topk(expected, None, 6)
    assert torch.equal(weights, alone[0])
    assert torch.equal(ids, alone[1])


def test_without_bias_and_under_autograd(seed: int) -> None:
    config = dsv4_router.V4_FLASH
    inputs = make_dense_inputs(config, 33, seed=seed, device="cuda")
    weights, ids = poisoned(33, 6)
    gate = torch.nn.Parameter(inputs.gate_weight)
    dsv4_router.dense_router_dispatch(inputs.hidden_states, gate, None, 6, 1.5, weights, ids, backend="cublas")
    zero = inputs._replace(correction_bias=torch.zeros_like(inputs.correction_bias))
    assert compare_dense(zero, 6, 1.5, weights, ids).ok
    assert not weights.requires_grad


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("how", PADDING)
@pytest.mark.parametrize("num_tokens", [1, 50, 1000])
@pytest.mark.parametrize("padding_id", [-1, 12345])
def test_padding_rows(how: str, num_tokens: int, padding_id: int, seed: int) -> None:
    config = dsv4_router.V4_FLASH
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    clean = route(inputs, config)
    options, valid = padding_options(num_tokens, how)
    inputs.hidden_states[~valid] = torch.nan
    weights, ids = route(inputs, config, padding_id=padding_id, **options)
    assert (ids[~valid] == padding_id).all()
    assert (weights[~valid] == 0).all()
    assert torch.equal(ids[valid], clean[1][valid])
    assert torch.equal(weights[valid], clean[0][valid])


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_bad_hidden_states_stay_in_their_rows(bad: float, seed: int) -> None:
    config = dsv4_router.V4_PRO
    inputs = make_dense_inputs(config, 64, seed=seed, device="cuda")
    clean = route(inputs, config)
    rows = torch.arange(64, device="cuda") % 5 == 2
    inputs.hidden_states[rows] = bad
    weights, ids = route(inputs, config)
    assert torch.equal(weights[~rows], clean[0][~rows])
    assert torch.equal(ids[~rows], clean[1][~rows])
    assert_valid(weights, ids, config.num_experts)


def assert_valid(weights: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    """k distinct ids in [0, E) and finite weights in every row."""
    assert ((ids >= 0) & (ids < num_experts)).all()
    ordered = ids.sort(dim=-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def topk(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, ids_dtype: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = poisoned(logits.shape[-2], top_k, ids_dtype)
    cublas.activation_topk(logits, bias, top_k, 2.5, weights, ids)
    return weights, ids


@pytest.fixture(params=[False, True], ids=["few-rows", "many-rows"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is done in both ways of ``activation_topk``, whatever the number of rows."""
    monkeypatch.setattr(thresholds, "topk_has_many_rows", lambda num_tokens, splits: request.param)


BIASES = (0.0, -0.0, 1e-30, 0.25, -0.7, -1.0, 100.0, -1e4, 3e38, torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("bias", BIASES)
def test_bounds_of_every_selection(bias: float) -> None:
    """Of all 2^32 logits. Only with close bounds are candidates few."""
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    blocks = 8 * torch.cuda.get_device_properties(counts.device).multi_processor_count
    addresses = counts.data_ptr(), counts[1:].data_ptr()
    cuda_module.launch(of_file("score_bounds"), counts.get_device(), blocks, 256, False, bias, *addresses)
    wrong, loose = counts.tolist()
    assert (wrong, loose) == (0, 0)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("num_experts", [16, 128, 255, 256, 384, 1000, 1024])
@pytest.mark.parametrize("top_k", [1, 3, 6, 16])
@pytest.mark.parametrize("where", ["in a row", "32 close ones", "33 close ones", "one a lane", "pairs", "all equal"])
def test_topk_wherever_the_best_lie(where: str, num_experts: int, top_k: int, seed: int) -> None:
    """Many candidates, many of a lane, and equal ones, of which the lower id comes first."""
    experts = torch.arange(num_experts, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    order = torch.rand(256, num_experts, generator=generator, device="cuda").argsort(dim=-1).argsort(dim=-1)
    logits = 2e-3 * order - 8  # far enough apart that scores differ as they do
    if where == "in a row":  # more than a lane's candidates may be if lanes are to share them
        best = (experts - order[:, :1]) % num_experts < 8
        logits = torch.where(best, 2 + 1e-3 * order, logits)
    elif where.endswith("close ones"):  # so close that bounds cannot tell them apart
        logits = torch.where(order < int(where[:2]), 2 + 1e-4 * order, logits)
    elif where == "one a lane":
        per_lane = -(-num_experts // 32)
        logits = torch.where(experts % per_lane == seed % per_lane, 2 + 1e-3 * order, logits)
    elif where == "pairs":
        logits = 1e-3 * (order // 2).float()
    else:
        logits = torch.full_like(logits, 0.5)
    weights, ids = topk(logits, None, top_k)
    assert torch.equal(ids.long(), reference.order(logits)[:, :top_k])
    result = compare_selection(logits, None, top_k, 2.5, weights, ids)
    assert result.ok, result


EXPERTS = (1, 2, 16, 31, 33, 128, 132, 144, 255, 256, 384, 512, 1000, 1024)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("top_k", TOP_KS)
def test_topk_of_ties_and_hostile_logits(num_experts: int, top_k: int, seed: int) -> None:
    """Few distinct values, so that most comparisons are ties, with NaN and infinities among them."""
    if top_k > num_experts:
        top_k = num_experts
    generator = torch.Generator(device="cuda").manual_seed(seed)
    values = torch.tensor([-torch.inf, -1e4, -2.0, 0.0, 0.0, 1.0, 1.0, 1e4, torch.inf, torch.nan], device="cuda")
    picks = torch.randint(len(values), (512, num_experts), generator=generator, device="cuda")
    logits = values[picks]
    logits[:20] = values[:, None].repeat(2, 1)  # every value as a row of its own
    bias = torch.tensor([0.0, 0.5, -0.25], device="cuda")[torch.arange(num_experts, device="cuda") % 3]
    for correction_bias in (None, bias):
        weights, ids = topk(logits, correction_bias, top_k, torch.int64)
        assert_valid(weights, ids, num_experts)
        selection = reference.scores(logits)  # equal logits have equal scores on every path, and these lie far apart
        selection = selection if correction_bias is None else selection + correction_bias
        assert torch.equal(ids, reference.order(selection)[:, :top_k])
        expected = reference.normalize(reference.scores(logits.double()).gather(1, ids), 2.5)
        assert torch.allclose(weights.double(), expected, rtol=5e-6, atol=0)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("num_experts", [16, 256, 384])
@pytest.mark.parametrize("centre", [-170.0, -100.0, -90.0, -50.0, -20.0, -5.0, 0.0, 5.0, 50.0, 1e4])
def test_topk_weights_wherever_logits_lie(num_experts: int, centre: float, seed: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    logits = centre + torch.randn(1000, num_experts, generator=generator, device="cuda")
    result = compare_selection(logits, None, 6, 2.5, *topk(logits, None, 6))
    assert result.ok, result


@pytest.mark.usefixtures("each_way")
def test_topk_of_scores_that_all_underflow() -> None:
    logits = torch.full((5, 256), -1e4, device="cuda")
    bias = torch.arange(256, device="cuda", dtype=torch.float32)
    weights, ids = topk(logits, bias, 6)
    assert (weights == 0).all()
    assert torch.equal(ids, torch.arange(255, 249, -1, device="cuda", dtype=torch.int32).expand(5, 6))


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_both_ways_give_the_same_bits(
    num_experts: int, splits: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random logits, where candidates are few and, drawn from few values, where they are not."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    logits = torch.randn(splits, 1000, num_experts, generator=generator, device="cuda")
    logits[:, ::2] = (8 * logits[:, ::2]).round() / 8
    bias = 0.1 * torch.randn(num_experts, generator=generator, device="cuda")
    found = []
    for many_rows in (False, True):
        monkeypatch.setattr(thresholds, "topk_has_many_rows", lambda num_tokens, splits, way=many_rows: way)
        found.append(topk(logits, bias, min(6, num_experts)))
    assert_bits(*found)


@pytest.mark.parametrize("num_experts", [128, 256, 384])
def test_a_million_rows(num_experts: int, seed: int) -> None:
    num_tokens = 1 << 20
    generator = torch.Generator(device="cuda").manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, device="cuda")
    weights, ids = topk(logits, None, 6)
    for rows in (slice(0, 4096), slice(num_tokens // 2, num_tokens // 2 + 4096), slice(num_tokens - 4096, None)):
        result = compare_selection(logits[rows], None, 6, 2.5, weights[rows], ids[rows])
        assert result.ok, result
    assert (ids >= 0).all()


@pytest.mark.parametrize("how", ["mask", "int", "device", "both"])
def test_long_calls_go_in_pieces(how: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces see the same padding options as the whole; a piece of 100 rows stands for one of 131,072."""
    config = RouterConfig(256, 144, 4, 1.5)
    inputs = make_dense_inputs(config, 1000, seed=seed, device="cuda")
    options, valid = padding_options(1000, how)
    calls = []
    launch = cuda_module.launch
    monkeypatch.setattr(cuda_module, "launch", lambda *args: (calls.append(args), launch(*args))[1])
    monkeypatch.setattr(cublas, "_ROWS_AT_ONCE", 100)
    weights, ids = route(inputs, config, **options)
    assert len(calls) == 10
    expected = reference.dense_route(*inputs, 4, 1.5, **options)
    assert torch.equal(ids.long(), expected[1])
    assert torch.allclose(weights, expected[0], rtol=1e-5, atol=0)
    assert (ids[~valid] == -1).all()


def test_missing_cuda_python_leads_to_the_reference_visibly(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp32 operands, which the one-launch kernel, made without NVRTC, does not take."""
    config = dsv4_router.V4_FLASH
    inputs = make_dense_inputs(config, 8, seed=seed, device="cuda", dtype=torch.float32)
    found = dispatch.availability(inputs.hidden_states.device)
    lacking = dispatch.Availability(found.device, found.compute_capability, missing_cuda_python="no NVRTC here")
    monkeypatch.setattr(dispatch, "availability", lambda device: lacking)
    monkeypatch.setattr(dispatch, "path_of_call", dispatch.path_of_call.__wrapped__)
    with pytest.warns(RuntimeWarning, match="no NVRTC here"):
        weights, ids = route(inputs, config, backend="auto")
    assert compare_dense(inputs, 6, 1.5, weights, ids).ok
    with pytest.raises(dsv4_router.BackendUnavailableError, match="no NVRTC here"):
        route(inputs, config)
