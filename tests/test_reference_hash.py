# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Hash routing on the CPU against transformers' own router and a float64 loop, and every edge case of the contract."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from routing_helpers import (
    SCALING,
    Outputs,
    PrecisionOfProducts,
    assert_bits,
    assert_weights,
    hashed,
    padding_of_8_rows,
    score_of,
    weights_of,
)
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from dsv4_router import hash_route, reference


class HashInputs(NamedTuple):
    token_ids: torch.Tensor
    hash_lut: torch.Tensor
    hidden_states: torch.Tensor
    gate_weight: torch.Tensor


def hash_inputs(
    generator: torch.Generator,
    num_tokens: int,
    *,
    top_k: int = 6,
    num_experts: int = 24,
    hidden_size: int = 96,
    vocab_size: int = 50,
    token_dtype: torch.dtype = torch.int64,
    table_dtype: torch.dtype = torch.int64,
    dtype: torch.dtype = torch.float32,
) -> HashInputs:
    table = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(vocab_size)])
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator)
    x = torch.randn(num_tokens, hidden_size, generator=generator)
    gate = torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5
    return HashInputs(tokens.to(token_dtype), table.to(table_dtype), x.to(dtype), gate.to(dtype))


def brute_force_hash(inputs: HashInputs, scaling: float = SCALING) -> Outputs:
    """The table's experts and their weights, as loops over float64 numbers."""
    all_weights, all_ids = [], []
    gate = inputs.gate_weight.double().tolist()
    table = inputs.hash_lut.tolist()
    for token_id, token in zip(inputs.token_ids.tolist(), inputs.hidden_states.double().tolist(), strict=True):
        experts = table[token_id]
        scores = [score_of(math.fsum(a * b for a, b in zip(token, gate[e], strict=True))) for e in experts]
        all_ids.append(experts)
        all_weights.append(weights_of(scores, scaling))
    return torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_ids)


def ready_logits(inputs: HashInputs) -> torch.Tensor:
    return (inputs.hidden_states.double() @ inputs.gate_weight.double().T).float()


def scored(form: str, inputs: HashInputs) -> dict[str, Any]:
    """The keyword arguments of a form of the call."""
    if form == "hidden":
        return {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight}
    return {"router_logits": ready_logits(inputs)} if form == "logits" else {}


FORMS = ["plain", "logits", "hidden"]
INDEX_TYPES = list(itertools.product([torch.int32, torch.int64], repeat=3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("token_dtype", "table_dtype", "ids_dtype"), INDEX_TYPES)
def test_hash_index_types(
    form: str,
    token_dtype: torch.dtype,
    table_dtype: torch.dtype,
    ids_dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    inputs = hash_inputs(generator, 9, token_dtype=token_dtype, table_dtype=table_dtype)
    options = {"routed_scaling_factor": SCALING, **scored(form, inputs)}
    weights, ids = hashed(inputs.token_ids, inputs.hash_lut, 6, ids_dtype, **options)
    expected_weights, expected_ids = brute_force_hash(inputs)
    assert torch.equal(ids, expected_ids.to(ids_dtype))
    assert_weights(weights, torch.full((9, 6), SCALING / 6) if form == "plain" else expected_weights)
    new_weights, new_ids = hash_route(inputs.token_ids, inputs.hash_lut, 6, ids_dtype=ids_dtype, **options)
    assert new_ids.dtype is ids_dtype
    assert_bits((new_weights, new_ids), (weights, ids))


@pytest.mark.parametrize("top_k", [1, 3, 6, 7, 16])
def test_plain_hash_is_uniform(top_k: int, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 9, top_k=top_k)
    weights, ids = hashed(inputs.token_ids, inputs.hash_lut, top_k)
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids])
    assert weights.tolist() == torch.full((9, top_k), 1 / top_k).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_scored_hash_is_the_float64_loop(form: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 12, dtype=dtype, top_k=7, num_experts=33, hidden_size=72)
    weights, ids = hashed(inputs.token_ids, inputs.hash_lut, 7, routed_scaling_factor=SCALING, **scored(form, inputs))
    expected_weights, expected_ids = brute_force_hash(inputs)
    assert torch.equal(ids.long(), expected_ids)
    assert_weights(weights, expected_weights)


def test_scored_hash_in_float64(generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 12)
    options = scored("hidden", inputs)
    weights, ids = reference.hash_route(
        inputs.token_ids, inputs.hash_lut, 6, routed_scaling_factor=SCALING, dtype=torch.float64, **options
    )
    expected_weights, expected_ids = brute_force_hash(inputs)
    assert weights.dtype is torch.float64
    assert torch.equal(ids, expected_ids)
    assert_weights(weights, expected_weights, 1e-12)


@pytest.mark.parametrize("top_k", [1, 6])
def test_hash_is_the_router_of_transformers(top_k: int, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 40, top_k=top_k)
    config = DeepseekV4Config(
        hidden_size=96, n_routed_experts=24, num_experts_per_tok=top_k, routed_scaling_factor=2.5, vocab_size=50
    )
    theirs = DeepseekV4HashRouter(config).float()
    with torch.no_grad():
        theirs.weight.copy_(inputs.gate_weight)
        theirs.tid2eid.copy_(inputs.hash_lut)
        _, their_weights, their_ids = theirs(inputs.hidden_states, inputs.token_ids)
    for form in ("logits", "hidden"):
        weights, ids = hashed(
            inputs.token_ids, inputs.hash_lut, top_k, routed_scaling_factor=2.5, **scored(form, inputs)
        )
        assert torch.equal(ids.long(), their_ids)
        assert_weights(weights, their_weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_token_ids_outside_the_vocabulary(form: str, token_dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 9, token_dtype=token_dtype)
    options = scored(form, inputs)
    clean = hashed(inputs.token_ids, inputs.hash_lut, 6, **options)
    limits = torch.iinfo(token_dtype)
    tokens = inputs.token_ids.clone()
    bad = [0, 2, 3, 5, 8]
    tokens[bad] = torch.tensor([-1, 50, 51, limits.max, limits.min], dtype=token_dtype)
    good = [1, 4, 6, 7]
    weights, ids = hashed(tokens, inputs.hash_lut, 6, padding_id=999, **options)
    assert ids[bad].tolist() == [[999] * 6] * 5
    assert weights[bad].tolist() == [[0.0] * 6] * 5
    assert_bits((weights[good], ids[good]), (clean[0][good], clean[1][good]))


@pytest.mark.parametrize("form", FORMS)
def test_empty_vocabulary(form: str, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 3)
    weights, ids = hashed(inputs.token_ids, torch.empty(0, 6, dtype=torch.int64), 6, **scored(form, inputs))
    assert ids.tolist() == [[-1] * 6] * 3
    assert weights.tolist() == [[0.0] * 6] * 3


@pytest.mark.parametrize("form", FORMS)
def test_duplicates_in_a_row_of_the_table(form: str, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 9)
    inputs.hash_lut[:, 4] = inputs.hash_lut[:, 1]
    inputs.hash_lut[7] = 5
    weights, ids = hashed(inputs.token_ids, inputs.hash_lut, 6, routed_scaling_factor=SCALING, **scored(form, inputs))
    expected_weights, expected_ids = brute_force_hash(inputs)
    assert torch.equal(ids.long(), expected_ids)
    assert torch.equal(weights[:, 1], weights[:, 4])
    assert_weights(weights, torch.full((9, 6), SCALING / 6) if form == "plain" else expected_weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
def test_table_that_names_no_expert(form: str, table_dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 4, table_dtype=table_dtype)
    inputs.token_ids.copy_(torch.tensor([10, 11, 12, 13]))
    options = scored(form, inputs)
    clean = hashed(inputs.token_ids, inputs.hash_lut, 6, **options)
    table = inputs.hash_lut.clone()
    table[10, 3] = 24
    table[12, 0] = -2
    table[13, 5] = torch.iinfo(torch.int32).max
    weights, ids = hashed(inputs.token_ids, table, 6, padding_id=77, **options)
    assert_bits((weights[1:2], ids[1:2]), (clean[0][1:2], clean[1][1:2]))
    if form == "plain":  # knows no number of experts, and copies
        assert torch.equal(ids.long(), table[10:14].long())
        assert torch.equal(weights, clean[0])
    else:
        assert ids[[0, 2, 3]].tolist() == [[77] * 6] * 3
        assert weights[[0, 2, 3]].tolist() == [[0.0] * 6] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", ["none", "int", "tensor", "tensor-1d"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_hash_padding_rows(
    form: str, masked: bool, count: str, ids_dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs = hash_inputs(generator, 8)
    clean = hashed(inputs.token_ids, inputs.hash_lut, 6, ids_dtype, **scored(form, inputs))
    padding, valid = padding_of_8_rows(count, masked)
    inputs.hidden_states[~valid] = math.nan
    weights, ids = hashed(
        inputs.token_ids, inputs.hash_lut, 6, ids_dtype, padding_id=333, **padding, **scored(form, inputs)
    )
    assert_bits((weights[valid], ids[valid]), (clean[0][valid], clean[1][valid]))
    assert bool((ids[~valid] == 333).all())
    assert bool((weights[~valid] == 0).all())


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hash_with_bad_scores(form: str, bad: float, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 6)
    clean = hashed(inputs.token_ids, inputs.hash_lut, 6, **scored(form, inputs))
    inputs.hidden_states[[0, 5]] = bad
    weights, ids = hashed(inputs.token_ids, inputs.hash_lut, 6, **scored(form, inputs))
    assert torch.equal(ids, clean[1])
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    assert_bits((weights[1:5], ids[1:5]), (clean[0][1:5], clean[1][1:5]))
    if math.isnan(bad):
        assert weights[[0, 5]].tolist() == [[0.0] * 6] * 2


def test_hash_from_logits_of_every_kind() -> None:
    logits = torch.tensor(
        [[math.inf, 0.0, math.nan, -math.inf], [-1e4, -1e4, -1e4, -1e4], [math.inf, math.inf, 3e38, -1e4]]
    )
    table = torch.tensor([[0, 1, 2, 3]])
    weights, _ = hashed(torch.zeros(3, dtype=torch.int32), table, 4, router_logits=logits)
    assert weights[0, 0].item() == pytest.approx(1.0)
    assert 0 < weights[0, 1].item() < 1e-18
    assert weights[0, 2:].tolist() == [0.0, 0.0]
    assert weights[1].tolist() == [0.0] * 4
    assert weights[2, 0].item() == weights[2, 1].item() == pytest.approx(0.34, abs=0.01)
    assert weights[2, 3].item() == 0.0


def test_hash_underflow_of_the_experts_of_the_table_alone() -> None:
    logits = torch.full((1, 8), 5.0)
    logits[0, [1, 3, 6]] = -1e4
    weights, ids = hashed(torch.tensor([0]), torch.tensor([[6, 1, 3]]), 3, router_logits=logits)
    assert ids.tolist() == [[6, 1, 3]]
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.usefixtures("medium_precision")
def test_hash_fp32_means_fp32(generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 9)
    with PrecisionOfProducts() as products:
        got = hashed(inputs.token_ids, inputs.hash_lut, 6, **scored("hidden", inputs))
    assert set(products.seen) <= {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert_bits(got, hashed(inputs.token_ids, inputs.hash_lut, 6, **scored("hidden", inputs)))


def test_hash_rows_of_hidden_states_may_lie_apart(generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 9)
    wide = torch.full((9, 130), math.nan)
    wide[:, 7:103] = inputs.hidden_states
    weights, ids = hashed(
        inputs.token_ids,
        inputs.hash_lut,
        6,
        routed_scaling_factor=SCALING,
        hidden_states=wide[:, 7:103],
        gate_weight=inputs.gate_weight,
    )
    expected_weights, expected_ids = brute_force_hash(inputs)
    assert torch.equal(ids.long(), expected_ids)
    assert_weights(weights, expected_weights)


def test_hash_long_calls_go_in_pieces(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    inputs = hash_inputs(generator, 11)
    monkeypatch.setattr(reference, "_ROWS_AT_ONCE", 3)
    expected_weights, expected_ids = brute_force_hash(inputs)
    for form in ("logits", "hidden"):
        weights, ids = hashed(
            inputs.token_ids, inputs.hash_lut, 6, routed_scaling_factor=SCALING, **scored(form, inputs)
        )
        assert torch.equal(ids.long(), expected_ids)
        assert_weights(weights, expected_weights)
