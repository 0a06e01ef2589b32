# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Dense routing on the CPU against transformers' own router and a float64 loop, and every edge case of the contract."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest
import torch
from routing_helpers import (
    POISON_WEIGHT,
    SCALING,
    SHAPES,
    PrecisionOfProducts,
    assert_bits,
    assert_weights,
    brute_force,
    hashed,
    of_logits,
    padding_of_8_rows,
    route,
    score_of,
    separated,
    weights_of,
)
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from dsv4_router import dense_route, reference

# ---- dense: against other implementations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_experts", "hidden_size", "top_k"), SHAPES)
def test_dense_is_the_float64_loop(
    num_experts: int, hidden_size: int, top_k: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, gate, bias = separated(generator, 6, num_experts, hidden_size, top_k, dtype)
    expected_weights, expected_ids = brute_force(x, gate, bias, top_k)
    weights, ids = route(x, gate, bias, top_k)
    assert torch.equal(ids.long(), expected_ids)
    assert_weights(weights, expected_weights)
    for reference_dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        weights, ids = reference.dense_route(x, gate, bias, top_k, SCALING, dtype=reference_dtype)
        assert weights.dtype is reference_dtype
        assert torch.equal(ids, expected_ids)
        assert_weights(weights, expected_weights, rtol)


@pytest.mark.parametrize("scaling", [1.0, 2.5, -1.0, 0, 3])
def test_dense_without_bias_and_scaling(scaling: float, generator: torch.Generator) -> None:
    x, gate, _ = separated(generator, 8, 24, 64, 6, torch.float32)
    zero = torch.zeros(24)
    x = x[[row for row in range(8) if len(set((x[row] @ gate.T).tolist())) == 24]]
    expected_weights, expected_ids = brute_force(x, gate, zero, 6, scaling)
    for bias in (None, zero):
        weights, ids = reference.dense_route(x, gate, bias, 6, scaling, dtype=torch.float64)
        assert torch.equal(ids, expected_ids)
        assert_weights(weights, expected_weights, 1e-12)
        assert_bits(route(x, gate, bias, 6, scaling), route(x, gate, zero, 6, scaling))


@pytest.mark.parametrize(("num_experts", "hidden_size", "top_k"), SHAPES)
def test_dense_is_the_router_of_transformers(
    num_experts: int, hidden_size: int, top_k: int, generator: torch.Generator
) -> None:
    config = DeepseekV4Config(
        hidden_size=hidden_size, n_routed_experts=num_experts, num_experts_per_tok=top_k, routed_scaling_factor=2.5
    )
    theirs = DeepseekV4TopKRouter(config).float()
    x, gate, bias = separated(generator, 40, num_experts, hidden_size, top_k, torch.float32)
    with torch.no_grad():
        theirs.weight.copy_(gate)
        theirs.e_score_correction_bias.copy_(bias)
        their_logits, their_weights, their_ids = theirs(x)
    logits = torch.full((40, num_experts), POISON_WEIGHT)
    weights, ids = route(x, gate, bias, top_k, 2.5, logits_out=logits)
    ours, order = ids.long().sort(dim=-1)
    expected, their_order = their_ids.sort(dim=-1)
    assert torch.equal(ours, expected)
    assert_weights(weights.gather(1, order), their_weights.gather(1, their_order))
    torch.testing.assert_close(logits, their_logits, rtol=0.0, atol=1e-5)
    selection = reference.scores(logits) + bias
    chosen = selection.gather(1, ids.long())
    assert bool((chosen[:, :-1] >= chosen[:, 1:]).all()), "not in descending order"


def test_dense_route_allocates_what_dispatch_writes(generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 7, 16, 64, 3, torch.bfloat16)
    for ids_dtype in (torch.int32, torch.int64):
        weights, ids = dense_route(x, gate, bias, 3, SCALING, ids_dtype=ids_dtype, padding_id=5, num_valid_tokens=4)
        assert (weights.dtype, ids.dtype) == (torch.float32, ids_dtype)
        assert_bits((weights, ids), route(x, gate, bias, 3, SCALING, ids_dtype, padding_id=5, num_valid_tokens=4))
    assert dense_route(x, gate, bias, 3, SCALING)[1].dtype is torch.int32


def test_weights_are_scores_and_not_selections_less_bias() -> None:
    x, gate = of_logits([[-30.0, -31.0, -32.0, -33.0]])
    bias = torch.tensor([100.0, 101.0, 102.0, 103.0])
    weights, ids = route(x, gate, bias, 3)
    assert ids.tolist() == [[3, 2, 1]]
    assert_weights(weights, torch.tensor([weights_of([score_of(-33.0), score_of(-32.0), score_of(-31.0)], SCALING)]))


def test_long_calls_go_in_pieces(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 11, 16, 64, 3, torch.float32)
    for batch_invariant in (False, True):
        logits, again = torch.full((11, 16), POISON_WEIGHT), torch.full((11, 16), POISON_WEIGHT)
        weights, ids = route(x, gate, bias, 3, logits_out=logits, batch_invariant=batch_invariant)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_ROWS_AT_ONCE", 3)
            pieces = route(x, gate, bias, 3, logits_out=again, batch_invariant=batch_invariant)
        assert torch.equal(pieces[1], ids)
        assert_weights(pieces[0], weights)
        torch.testing.assert_close(again, logits, rtol=0.0, atol=1e-5)


# ---- dense: ties


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [-200.0, -3.0, 0.0, 2.0, 200.0])
def test_all_equal(dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(3, 64, dtype=dtype)
    x[:, 0] = 1
    gate = torch.zeros(40, 64, dtype=dtype)
    gate[:, 0] = value
    weights, ids = route(x, gate, None, 7)
    assert ids.tolist() == [list(range(7))] * 3
    if value > -90:
        assert_weights(weights, torch.full((3, 7), SCALING / 7))


def test_pairs_of_equal_logits(generator: torch.Generator) -> None:
    ranks = torch.stack([torch.randperm(16, generator=generator) for _ in range(20)])  # each value twice, anywhere
    logits = torch.cat([ranks, ranks], dim=1)[:, torch.randperm(32, generator=generator)].double() / 4
    x, gate = of_logits(logits.tolist())
    for top_k in (1, 2, 5, 6, 16):
        weights, ids = route(x, gate, None, top_k)
        expected_weights, expected_ids = brute_force(x, gate, None, top_k)
        assert torch.equal(ids.long(), expected_ids)
        assert_weights(weights, expected_weights)


def test_bias_makes_ties() -> None:
    # +1e4 has a score of exactly 100, and -1e4 of exactly 0: selections are exact sums with the bias.
    x, gate = of_logits([[1e4, -1e4, 1e4, -1e4, -1e4, 1e4]])
    bias = torch.tensor([-50.0, 50.0, -50.0, 50.0, 49.0, -51.0])
    weights, ids = route(x, gate, bias, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    assert_weights(weights, torch.tensor([[SCALING / 2, 0.0, SCALING / 2, 0.0, 0.0]]))
    assert route(x, gate, bias, 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]
    # A bias below the resolution of the score makes no difference, neither does the sign of a zero.
    tiny = torch.tensor([0.0, -0.0, 1e-9, 0.0, -0.0, 2e-9])
    assert route(x, gate, tiny, 6)[1].tolist() == [[0, 2, 5, 1, 3, 4]]


# ---- dense: data that is no good


BAD_VALUES = {
    "nan": [math.nan],
    "+inf": [math.inf],
    "-inf": [-math.inf],
    "both-inf": [math.inf, -math.inf],
    "all": [math.nan, math.inf, -math.inf],
    "overflow": [3e38, 3e38, 3e38],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_hidden_states(
    values: list[float], whole_row: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, gate, bias = separated(generator, 9, 33, 72, 6, dtype)
    clean = route(x, gate, bias, 6)
    bad_rows, good_rows = [0, 4, 8], [1, 2, 3, 5, 6, 7]
    spoilt = x.clone()
    row = torch.tensor(values, dtype=dtype).repeat(72)[:72]
    for bad in bad_rows:
        spoilt[bad] = row if whole_row else torch.cat([row[: len(values)], spoilt[bad, len(values) :]])
    for batch_invariant in (False, True):
        weights, ids = route(spoilt, gate, bias, 6, batch_invariant=batch_invariant)
        assert bool(weights.isfinite().all())
        assert bool((weights >= 0).all())
        assert bool(((ids >= 0) & (ids < 33)).all())
        assert all(len(set(row_ids)) == 6 for row_ids in ids.tolist())
        before = route(x, gate, bias, 6, batch_invariant=True) if batch_invariant else clean
        assert_bits((weights[good_rows], ids[good_rows]), (before[0][good_rows], before[1][good_rows]))


def test_row_of_nan_takes_the_first_experts_with_weight_zero() -> None:
    weights, ids = route(torch.full((2, 64), math.nan), torch.ones(20, 64), torch.arange(20.0), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert weights.tolist() == [[0.0] * 4] * 2


def test_infinite_logits() -> None:
    x, gate = torch.zeros(3, 64), torch.zeros(8, 64)
    x[:, 0] = torch.tensor([math.inf, -math.inf, math.inf])
    gate[:, 0] = -1.0
    gate[[2, 5], 0] = 1.0  # logits +inf of the experts 2 and 5, -inf of the others; row 1 the other way round
    weights, ids = route(x, gate, None, 4)
    assert ids.tolist() == [[2, 5, 0, 1], [0, 1, 3, 4], [2, 5, 0, 1]]
    half, quarter = SCALING / 2, SCALING / 4
    assert_weights(weights, torch.tensor([[half, half, 0.0, 0.0], [quarter] * 4, [half, half, 0.0, 0.0]]))


def test_an_infinite_score_is_the_largest_finite_one() -> None:
    largest = torch.finfo(torch.float32).max
    gate = torch.tensor([[1.0], [largest], [math.inf]])
    weights, ids = route(torch.ones(1, 1), gate, None, 3)
    assert ids.tolist() == [[2, 1, 0]]
    assert_weights(weights[:, :2], torch.full((1, 2), SCALING / 2))
    assert 0 < weights[0, 2].item() < 1e-18


def test_nan_ranks_below_every_number() -> None:
    x = torch.ones(2, 64) / 64
    gate = torch.ones(6, 64)
    gate[1] = math.nan
    gate[4] = -math.nan
    bias = torch.tensor([0.0, 1e30, -math.inf, 0.0, 1e30, -1e30])
    weights, ids = route(x, gate, bias, 6)
    assert ids.tolist() == [[0, 3, 5, 2, 1, 4]] * 2
    assert weights[:, 4:].tolist() == [[0.0, 0.0]] * 2
    assert_weights(weights[:, :4], torch.full((2, 4), SCALING / 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_bias(bad: float, generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 5, 16, 64, 6, torch.float32)
    bias[3] = bad
    weights, ids = route(x, gate, bias, 6)
    assert bool(weights.isfinite().all())
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert (ids == 3).any(dim=-1).tolist() == [bad == math.inf] * 5
    if bad == math.inf:
        assert ids[:, 0].tolist() == [3] * 5


# ---- dense: range of the logits


@pytest.mark.parametrize("centre", [-20.0, -40.0, -60.0, -90.0, 20.0, 88.0, 90.0, 1e4])
def test_logits_far_from_zero(centre: float, generator: torch.Generator) -> None:
    steps = torch.stack([torch.randperm(24, generator=generator) for _ in range(8)]).double()
    x, gate = of_logits((centre + steps / 4).tolist())
    weights, ids = route(x, gate, None, 6)
    expected_weights, expected_ids = brute_force(x, gate, None, 6)
    assert torch.equal(ids.long(), expected_ids)
    assert_weights(weights, expected_weights)
    assert bool((weights > 0).all())


@pytest.mark.parametrize("logit", [-1e4, -500.0, -3e38])
def test_every_score_underflows(logit: float) -> None:
    x, gate = of_logits([[logit] * 12] * 2)
    weights, ids = route(x, gate, None, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert weights.tolist() == [[0.0] * 5] * 2
    bias = torch.zeros(12)
    bias[[3, 11]] = torch.tensor([0.5, 1.0])
    weights, ids = route(x, gate, bias, 5)
    assert ids.tolist() == [[11, 3, 0, 1, 2]] * 2
    assert weights.tolist() == [[0.0] * 5] * 2


def test_scores_do_not_lose_small_values() -> None:
    logits = torch.tensor([-100.0, -50.0, -16.7, -16.5, -1.0, 0.0, 1.0, 16.6, 88.7, 89.0, 1e4, 3e38])
    expected = torch.tensor([score_of(value) for value in logits.double().tolist()], dtype=torch.float64)
    assert_weights(reference.scores(logits), expected, 1e-7)
    assert_weights(reference.scores(logits.double()), expected, 1e-15)
    special = reference.scores(torch.tensor([math.inf, -math.inf, math.nan]))
    assert special[:2].tolist() == [math.inf, 0.0]
    assert bool(special[2].isnan())


# ---- dense: padding


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding_id", [-1, 0, 255, -(2**31), 2**31 - 1, 2**40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", ["none", "int", "tensor", "tensor-1d"])
def test_padding_rows(
    count: str, masked: bool, padding_id: int, ids_dtype: torch.dtype, generator: torch.Generator
) -> None:
    if padding_id == 2**40 and ids_dtype is torch.int32:
        ids_dtype, padding_id = torch.int64, -(2**63)
    x, gate, bias = separated(generator, 8, 16, 64, 3, torch.bfloat16)
    clean = route(x, gate, bias, 3, ids_dtype=ids_dtype)
    padding, valid = padding_of_8_rows(count, masked)
    spoilt = x.clone()
    spoilt[~valid] = math.nan
    weights, ids = route(spoilt, gate, bias, 3, ids_dtype=ids_dtype, padding_id=padding_id, **padding)
    assert_bits((weights[valid], ids[valid]), (clean[0][valid], clean[1][valid]))
    assert bool((ids[~valid] == padding_id).all())
    assert bool((weights[~valid] == 0).all())


@pytest.mark.parametrize(("num_valid", "valid"), [(0, 0), (4, 4), (5, 5), (-3, 0), (99, 5)])
def test_count_of_valid_tokens_on_the_device_is_not_checked_but_harmless(
    num_valid: int, valid: int, generator: torch.Generator
) -> None:
    x, gate, bias = separated(generator, 5, 16, 64, 3, torch.float32)
    clean = route(x, gate, bias, 3)
    weights, ids = route(x, gate, bias, 3, num_valid_tokens=torch.tensor(num_valid, dtype=torch.int32))
    assert_bits((weights[:valid], ids[:valid]), (clean[0][:valid], clean[1][:valid]))
    assert ids[valid:].tolist() == [[-1] * 3] * (5 - valid)
    assert weights[valid:].tolist() == [[0.0] * 3] * (5 - valid)


def test_logits_of_padding_rows_are_written_too(generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 5, 16, 64, 3, torch.float32)
    logits = torch.full((5, 16), POISON_WEIGHT)
    route(x, gate, bias, 3, num_valid_tokens=0, logits_out=logits)
    torch.testing.assert_close(logits.double(), x.double() @ gate.double().T, rtol=0.0, atol=1e-5)


# ---- dense: shapes, strides, autograd


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_tokens(batch_invariant: bool) -> None:
    x, gate = torch.empty(0, 64), torch.ones(16, 64)
    weights, ids = route(
        x,
        gate,
        None,
        3,
        batch_invariant=batch_invariant,
        logits_out=torch.empty(0, 16),
        token_mask=torch.empty(0, dtype=torch.bool),
        num_valid_tokens=0,
    )
    assert (weights.shape, ids.shape) == ((0, 3), (0, 3))
    assert reference.dense_route(x, gate, None, 3, 1.0)[1].shape == (0, 3)
    tokens, table = torch.empty(0, dtype=torch.int32), torch.zeros(9, 3, dtype=torch.int64)
    assert hashed(tokens, table, 3)[0].shape == (0, 3)
    assert hashed(tokens, table, 3, hidden_states=x, gate_weight=gate)[1].shape == (0, 3)
    assert reference.hash_route(tokens, table, 3)[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_rows_may_lie_apart(dtype: torch.dtype, batch_invariant: bool, generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 7, 24, 72, 6, dtype)
    wide_x, wide_gate = torch.full((7, 90), math.nan, dtype=dtype), torch.full((24, 101), math.nan, dtype=dtype)
    wide_x[:, 5:77] = x
    wide_gate[:, 3:75] = gate
    assert wide_x[:, 5:77].stride(0) == 90
    weights, ids = route(wide_x[:, 5:77], wide_gate[:, 3:75], bias, 6, batch_invariant=batch_invariant)
    expected_weights, expected_ids = brute_force(x, gate, bias, 6)
    assert torch.equal(ids.long(), expected_ids)
    assert_weights(weights, expected_weights)


def test_nothing_is_recorded_for_autograd(generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 3, 16, 64, 3, torch.float32)
    for tensor in (x, gate, bias):
        tensor.requires_grad_()
    for batch_invariant in (False, True):
        logits = torch.empty(3, 16)
        weights, _ = route(x, gate, bias, 3, logits_out=logits, batch_invariant=batch_invariant)
        assert not weights.requires_grad
        assert not logits.requires_grad
    table = torch.zeros(5, 3, dtype=torch.int64)
    tokens = torch.zeros(3, dtype=torch.int64)
    assert not hashed(tokens, table, 3, hidden_states=x, gate_weight=gate)[0].requires_grad


# ---- numerical identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_experts", "hidden_size"), [(24, 64), (33, 201)])
def test_batch_invariant(num_experts: int, hidden_size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gate = torch.randn(num_experts, hidden_size, generator=generator).to(dtype)
    bias = torch.randn(num_experts, generator=generator)
    token = torch.randn(hidden_size, generator=generator).to(dtype)
    first_logits = torch.full((1, num_experts), POISON_WEIGHT)
    first = route(token[None], gate, bias, 6, logits_out=first_logits, batch_invariant=True)
    for num_tokens in range(1, 10):
        for position in range(num_tokens):
            x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
            x[position] = token
            logits = torch.full((num_tokens, num_experts), POISON_WEIGHT)
            weights, ids = route(x, gate, bias, 6, logits_out=logits, batch_invariant=True)
            assert_bits((weights[position : position + 1], ids[position : position + 1]), first)
            assert torch.equal(logits[position].view(torch.int32), first_logits[0].view(torch.int32))


def test_deterministic(generator: torch.Generator) -> None:
    x = torch.randn(33, 96, generator=generator)
    gate = torch.randn(24, 96, generator=generator)
    first = route(x, gate, None, 6)
    for _ in range(5):
        assert_bits(route(x, gate, None, 6), first)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.usefixtures("medium_precision")
def test_fp32_means_fp32(batch_invariant: bool, generator: torch.Generator) -> None:
    x, gate, bias = separated(generator, 9, 33, 128, 6, torch.float32)
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    logits, expected = torch.full((9, 33), POISON_WEIGHT), torch.full((9, 33), POISON_WEIGHT)
    assert matmul.fp32_precision == "bf16"
    with PrecisionOfProducts() as products:
        got = route(x, gate, bias, 6, logits_out=logits, batch_invariant=batch_invariant)
    assert products.seen
    assert set(products.seen) == {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"
    assert matmul.fp32_precision == "bf16"
    torch.set_float32_matmul_precision("highest")
    assert_bits(got, route(x, gate, bias, 6, logits_out=expected, batch_invariant=batch_invariant))
    assert torch.equal(logits, expected)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    autocast: torch.dtype, dtype: torch.dtype, batch_invariant: bool, generator: torch.Generator
) -> None:
    inputs = separated(generator, 9, 33, 128, 6, dtype)
    table, tokens = torch.randint(33, (10, 6), generator=generator), torch.arange(9)
    operands = {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight}

    def results() -> list[torch.Tensor]:
        logits = torch.full((9, 33), POISON_WEIGHT)
        dense = route(*inputs, 6, logits_out=logits, batch_invariant=batch_invariant)
        return [*dense, logits, *hashed(tokens, table, 6, **operands)]

    expected = results()
    with torch.autocast("cpu", dtype=autocast):
        assert (inputs.hidden_states @ inputs.gate_weight.T).dtype is autocast
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("medium_precision")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_leaves_other_threads_behind() -> None:
    """The child of a process in which another thread multiplies."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cpu = torch.device("cpu")
    with reference.full_precision_matmul(cpu), reference._precision_lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            seen = [matmul.fp32_precision]
            with reference.full_precision_matmul(cpu):
                seen.append(matmul.fp32_precision)
            seen.append(matmul.fp32_precision)
            os._exit(0 if seen == ["bf16", "ieee", "bf16"] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("medium_precision")
def test_precision_is_restored_after_an_error() -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="shapes"):
        reference.logits(torch.ones(2, 3), torch.ones(4, 5))
    assert matmul.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"


def test_precision_is_everybodys_until_the_last_leaves() -> None:
    """Two threads inside: the first to leave must not take the precision from the other."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    cpu = torch.device("cpu")
    try:
        first, second = reference.full_precision_matmul(cpu), reference.full_precision_matmul(cpu)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_inherited_precision_stays_inherited() -> None:
    backend: Any = torch.backends.mkldnn  # type: ignore[attr-defined]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with reference.full_precision_matmul(torch.device("cpu")):
            assert backend.matmul.fp32_precision == "ieee"
        assert backend.matmul.fp32_precision == "bf16"
        backend.fp32_precision = "ieee"
        assert backend.matmul.fp32_precision == "ieee"
    finally:
        backend.fp32_precision = before
