# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The modules: what they compute, what they load, and what a conversion leaves alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsv4_router import DenseRouter, HashRouter, Router, RouterConfig, api, testing

# `python -m pytest` puts this repository first on sys.path, where transformers would take its folder kernels/ for the
# package of that name.
with pytest.MonkeyPatch.context() as _patch:
    _root = Path(__file__).resolve().parent.parent
    _patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != _root])
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

TINY = RouterConfig(64, 16, 4, 1.5, num_layers=3, num_hash_layers=1, vocab_size=50, name="tiny")
TOKENS = 24
INDEX_TYPES = [torch.int32, torch.int64]
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
    "inside another": lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
    "twice": lambda module: module.to(torch.bfloat16).to(torch.float32),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


@pytest.fixture
def dense(seed: int) -> tuple[DenseRouter, testing.DenseInputs]:
    """A bf16 router and inputs without near ties; the bias is not representable in bf16."""
    inputs = testing.make_dense_inputs(TINY, TOKENS, seed=seed)
    assert not torch.equal(inputs.correction_bias.bfloat16().float(), inputs.correction_bias)
    router = DenseRouter(TINY)
    router.load_state_dict({"weight": inputs.gate_weight, "bias": inputs.correction_bias})
    return router, inputs


@pytest.fixture
def hashed(seed: int) -> tuple[HashRouter, testing.HashInputs]:
    inputs = testing.make_hash_inputs(TINY, TOKENS, seed=seed)
    router = HashRouter(TINY)
    router.load_state_dict({"weight": inputs.gate_weight, "tid2eid": inputs.hash_lut})
    return router, inputs


def table(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.arange(200, dtype=torch.int64).remainder(16).view(50, 4).to(dtype)


def hash_state(tid2eid: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(16, 64, dtype=torch.bfloat16), "tid2eid": tid2eid}


# Construction


def test_new_dense_router() -> None:
    router = DenseRouter(TINY)
    assert isinstance(router, Router)
    assert router.config is TINY
    assert {name: (tuple(t.shape), t.dtype) for name, t in router.state_dict().items()} == {
        "weight": ((16, 64), torch.bfloat16),
        "e_score_correction_bias": ((16,), torch.float32),
    }
    assert not router.weight.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.bias is router.e_score_correction_bias
    assert not router.bias.any()


@pytest.mark.parametrize("table_dtype", INDEX_TYPES)
def test_new_hash_router(table_dtype: torch.dtype) -> None:
    router = HashRouter(TINY, dtype=torch.float32, table_dtype=table_dtype)
    assert isinstance(router, Router)
    assert {name: (tuple(t.shape), t.dtype) for name, t in router.state_dict().items()} == {
        "weight": ((16, 64), torch.float32),
        "tid2eid": ((50, 4), table_dtype),
    }
    assert not router.weight.requires_grad
    assert not router.tid2eid.any()


def test_hash_table_is_int64_unless_told() -> None:
    assert HashRouter(TINY).tid2eid.dtype is torch.int64


@pytest.mark.parametrize("kind", [DenseRouter, HashRouter])
def test_device_and_representation(kind: type[DenseRouter] | type[HashRouter]) -> None:
    router = kind(TINY, device="meta")
    assert {tensor.device.type for tensor in router.state_dict().values()} == {"meta"}
    assert repr(router) == f"{kind.__name__}({TINY})"


def test_for_layer() -> None:
    kinds = [type(Router.for_layer(TINY, layer)) for layer in range(3)]
    assert kinds == [HashRouter, DenseRouter, DenseRouter]
    router = Router.for_layer(TINY, 1, dtype=torch.float32, device="meta")
    assert (router.weight.dtype, router.weight.device.type) == (torch.float32, "meta")
    assert type(HashRouter.for_layer(TINY, 0)) is HashRouter


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DenseRouter({"hidden_size": 64}), TypeError, "config: expected a RouterConfig, got dict"),
        (lambda: DenseRouter(TINY, dtype=torch.float16), TypeError, "dtype: expected torch.bfloat16 or torch.float32"),
        (lambda: HashRouter(TINY, table_dtype=torch.int16), TypeError, "table_dtype: expected torch.int32"),
        (lambda: Router.for_layer(None, 0), TypeError, "config: expected a RouterConfig"),
        (lambda: Router.for_layer(TINY, 3), ValueError, "layer: expected an int from 0 to 2"),
        (lambda: Router.for_layer(TINY, "0"), TypeError, "layer: expected an int from 0 to 2"),
        (lambda: DenseRouter.for_layer(TINY, 0), TypeError, "DenseRouter, got 0 with a HashRouter"),
        (lambda: HashRouter.for_layer(TINY, 1), TypeError, "HashRouter, got 1 with a DenseRouter"),
    ],
)
def test_wrong_construction(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Dense routing


def test_dense_forward_is_dense_route(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    weights, ids = router(inputs.hidden_states)
    expected = api.dense_route(*inputs, TINY.top_k, TINY.routed_scaling_factor)
    assert (weights.dtype, ids.dtype, tuple(ids.shape)) == (torch.float32, torch.int32, (TOKENS, 4))
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])
    unbiased = api.dense_route(inputs.hidden_states, inputs.gate_weight, None, TINY.top_k, 1.5)
    assert not torch.equal(ids, unbiased[1])


@pytest.mark.parametrize("shape", [(2, 12, 64), (2, 3, 4, 64), (24, 1, 64)])
def test_dense_forward_flattens(shape: tuple[int, ...], dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    weights, ids = router(inputs.hidden_states.view(shape))
    assert torch.equal(ids, router(inputs.hidden_states)[1])
    assert weights.shape == (TOKENS, 4)


def test_dense_forward_of_one_and_of_no_token(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    assert torch.equal(router(inputs.hidden_states[5])[1], router(inputs.hidden_states)[1][5:6])
    assert router(inputs.hidden_states.view(2, 12, 64)[:, :0])[0].shape == (0, 4)


def test_dense_forward_of_strided_rows(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    wide = torch.full((TOKENS, 80), torch.nan, dtype=torch.bfloat16)
    wide[:, :64] = inputs.hidden_states
    assert torch.equal(router(wide[:, :64])[1], router(inputs.hidden_states)[1])


def test_dense_forward_passes_options_on(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    logits = torch.full((TOKENS, 16), torch.nan)
    weights, ids = router(
        inputs.hidden_states, ids_dtype=torch.int64, num_valid_tokens=3, padding_id=-5, logits_out=logits
    )
    assert ids.dtype is torch.int64
    assert (ids[3:] == -5).all()
    assert (ids[:3] >= 0).all()
    assert not weights[3:].any()
    assert not logits.isnan().any()
    with pytest.raises(ValueError, match="backend"):
        router(inputs.hidden_states, backend="none such")


@pytest.mark.parametrize(
    ("hidden_states", "error", "message"),
    [
        # 32 divides into rows of 64, which would be other tokens.
        (torch.zeros(4, 32, dtype=torch.bfloat16), ValueError, r"hidden_states: expected a tensor \[..., 64\]"),
        (torch.zeros(64, 1, dtype=torch.bfloat16), ValueError, r"hidden_states: expected a tensor \[..., 64\]"),
        (torch.zeros((), dtype=torch.bfloat16), ValueError, r"hidden_states: expected a tensor \[..., 64\]"),
        (torch.zeros(4, 64, dtype=torch.float16), TypeError, "hidden_states: expected a bfloat16 or float32"),
        (torch.zeros(4, 64, dtype=torch.float32), TypeError, "gate_weight: .*hidden_states' dtype"),
        (None, TypeError, "hidden_states: expected a tensor"),
        ([[0.0] * 64], TypeError, "hidden_states: expected a tensor"),
    ],
)
def test_wrong_hidden_states(hidden_states: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseRouter(TINY)(hidden_states)


def test_wrong_hidden_states_of_a_hash_router() -> None:
    with pytest.raises(ValueError, match=r"hidden_states: expected a tensor \[..., 64\]"):
        HashRouter(TINY)(torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64))


def test_routing_records_no_gradient(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    assert not router(inputs.hidden_states.clone().requires_grad_())[0].requires_grad


# Hash routing


def test_hash_forward_is_scored_hash_route(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    weights, ids = router(inputs.hidden_states.view(4, 6, 64), inputs.token_ids.view(4, 6))
    expected = api.hash_route(
        inputs.token_ids,
        inputs.hash_lut,
        TINY.top_k,
        hidden_states=inputs.hidden_states,
        gate_weight=inputs.gate_weight,
        routed_scaling_factor=1.5,
    )
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids])
    assert weights.unique().numel() > TOKENS  # scores, not one uniform weight


def test_hash_forward_of_strided_token_ids(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    turned = inputs.token_ids.view(4, 6).T
    assert not turned.is_contiguous()
    _, ids = router(None, turned)
    assert torch.equal(ids.long(), inputs.hash_lut[turned.reshape(-1)])


def test_hash_forward_without_hidden_states_is_uniform(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    weights, ids = router(None, inputs.token_ids)
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids])
    assert weights.tolist() == torch.full((TOKENS, 4), 1.5 / 4).tolist()


def test_hash_forward_of_logits(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    logits = inputs.hidden_states.float() @ inputs.gate_weight.float().T
    weights, _ = router(None, inputs.token_ids, router_logits=logits)
    torch.testing.assert_close(weights, router(inputs.hidden_states, inputs.token_ids)[0], rtol=1e-5, atol=0)


def test_hash_forward_passes_options_on(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    mask = torch.arange(TOKENS) % 2 == 0
    weights, ids = router(inputs.hidden_states, inputs.token_ids, ids_dtype=torch.int64, token_mask=mask, padding_id=-3)
    assert ids.dtype is torch.int64
    assert torch.equal(ids[:, 0] == -3, ~mask)
    assert torch.equal(weights.sum(dim=1) == 0, ~mask)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        (None, TypeError, "token_ids: expected an int32 or int64"),
        ([1, 2], TypeError, "token_ids: expected an int32 or int64"),
        (torch.zeros(2), TypeError, "token_ids: expected an int32 or int64"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "hidden_states: expected a row for each of the 3 token_ids"),
    ],
)
def test_wrong_token_ids(token_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HashRouter(TINY)(torch.zeros(2, 64, dtype=torch.bfloat16), token_ids)


# The routers of transformers


def test_dense_router_is_that_of_transformers(seed: int) -> None:
    inputs = testing.make_dense_inputs(TINY, TOKENS, seed=seed, dtype=torch.float32)
    config = DeepseekV4Config(
        hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5, vocab_size=50
    )
    state = {"weight": inputs.gate_weight, "e_score_correction_bias": inputs.correction_bias}
    theirs, ours = DeepseekV4TopKRouter(config).float(), DenseRouter(TINY, dtype=torch.float32)
    theirs.load_state_dict(state)
    ours.load_state_dict(theirs.state_dict())
    hidden = inputs.hidden_states.view(2, 12, 64)
    with torch.no_grad():
        _, their_weights, their_ids = theirs(hidden)
    weights, ids = ours(hidden, ids_dtype=torch.int64)
    ids, order = ids.sort(dim=-1)
    their_ids, their_order = their_ids.sort(dim=-1)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-5, atol=0)


def test_hash_router_is_that_of_transformers(seed: int) -> None:
    inputs = testing.make_hash_inputs(TINY, TOKENS, seed=seed, dtype=torch.float32)
    config = DeepseekV4Config(
        hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5, vocab_size=50
    )
    theirs, ours = DeepseekV4HashRouter(config).float(), HashRouter(TINY, dtype=torch.float32)
    theirs.load_state_dict({"weight": inputs.gate_weight, "tid2eid": inputs.hash_lut})
    ours.load_state_dict(theirs.state_dict())
    hidden, token_ids = inputs.hidden_states.view(2, 12, 64), inputs.token_ids.view(2, 12)
    with torch.no_grad():
        _, their_weights, their_ids = theirs(hidden, token_ids)
    weights, ids = ours(hidden, token_ids)
    assert torch.equal(ids.long(), their_ids)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=0)


# Conversions


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_bias_bits_survive_a_conversion(
    convert: Callable[[nn.Module], nn.Module], dense: tuple[DenseRouter, testing.DenseInputs]
) -> None:
    router, inputs = dense
    router = router.float()
    before = router.weight.dtype
    converted = convert(router)
    assert isinstance(converted, DenseRouter)
    assert converted.bias.dtype is torch.float32
    assert torch.equal(bits(converted.bias), bits(inputs.correction_bias))
    assert converted.bias is converted.state_dict(keep_vars=True)["e_score_correction_bias"]
    if convert is not CONVERSIONS["twice"]:
        assert converted.weight.dtype is not before


@pytest.mark.parametrize("table_dtype", INDEX_TYPES)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_table_survives_a_conversion(convert: Callable[[nn.Module], nn.Module], table_dtype: torch.dtype) -> None:
    config = RouterConfig(64, 384, 4, 1.5, vocab_size=50)
    router = HashRouter(config, table_dtype=table_dtype)
    router.tid2eid.fill_(383)  # 384 in bfloat16
    converted = convert(router)
    assert isinstance(converted, HashRouter)
    assert converted.tid2eid.dtype is table_dtype
    assert (converted.tid2eid == 383).all()


def test_conversion_still_moves_the_buffers() -> None:
    dense, hashed = DenseRouter(TINY).to("meta", torch.float32), HashRouter(TINY).to("meta", torch.float32)
    assert (dense.bias.device.type, dense.bias.dtype) == ("meta", torch.float32)
    assert (hashed.tid2eid.device.type, hashed.tid2eid.dtype) == ("meta", torch.int64)
    assert DenseRouter(TINY, device="meta").to_empty(device="cpu").bias.device.type == "cpu"
    both = DenseRouter(TINY, dtype=torch.float32).to("meta", torch.bfloat16).bias
    assert (both.device.type, both.dtype) == ("meta", torch.float32)


def test_copies_are_independent(dense: tuple[DenseRouter, testing.DenseInputs]) -> None:
    router, inputs = dense
    copied = copy.deepcopy(router)
    copied.bias.zero_()
    assert torch.equal(router.bias, inputs.correction_bias)
    assert torch.equal(copied.weight, router.weight)


# State dicts


@pytest.mark.parametrize("prefix", ["", "gate."])
@pytest.mark.parametrize("name", ["bias", "e_score_correction_bias"])
def test_both_names_of_the_bias_load(name: str, prefix: str, seed: int) -> None:
    inputs = testing.make_dense_inputs(TINY, 1, seed=seed)
    state = {f"{prefix}weight": inputs.gate_weight, f"{prefix}{name}": inputs.correction_bias}
    given = dict(state)
    router = DenseRouter(TINY)
    target = nn.ModuleDict({"gate": router}) if prefix else router
    target.load_state_dict(state)
    assert torch.equal(bits(router.bias), bits(inputs.correction_bias))
    assert torch.equal(router.weight, inputs.gate_weight)
    assert state.keys() == given.keys()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(16, 64)}, "Missing key.*e_score_correction_bias"),
        ({"bias": torch.zeros(16)}, "Missing key.*weight"),
        ({"weight": torch.zeros(16, 64), "bias": torch.zeros(16), "extra": torch.zeros(1)}, "Unexpected key.*extra"),
        (
            {"weight": torch.zeros(16, 64), "bias": torch.zeros(16), "e_score_correction_bias": torch.zeros(16)},
            'Unexpected key.*"bias"',
        ),
        ({"weight": torch.zeros(16, 64), "bias": torch.zeros(17)}, "size mismatch for e_score_correction_bias"),
        ({"weight": torch.zeros(15, 64), "bias": torch.zeros(16)}, "size mismatch for weight"),
    ],
)
def test_dense_state_dicts_are_strict(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        DenseRouter(TINY).load_state_dict(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(16, 64)}, "Missing key.*tid2eid"),
        (hash_state(table()) | {"bias": torch.zeros(16)}, "Unexpected key.*bias"),
        (hash_state(table()[:49]), "size mismatch for tid2eid"),
    ],
)
def test_hash_state_dicts_are_strict(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        HashRouter(TINY).load_state_dict(state)


def test_integer_bias_is_refused() -> None:
    state = {"weight": torch.zeros(16, 64), "bias": torch.zeros(16, dtype=torch.int32)}
    with pytest.raises(TypeError, match="e_score_correction_bias: expected a floating-point tensor"):
        DenseRouter(TINY).load_state_dict(state)


@pytest.mark.parametrize("kind", [DenseRouter, HashRouter])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float16])
@pytest.mark.parametrize("assign", [False, True])
def test_other_gate_weights_are_refused(kind: type[Router], dtype: torch.dtype, assign: bool) -> None:
    """A quantised one would be loaded without its scale."""
    router = kind(TINY)
    state = router.state_dict() | {"weight": torch.ones(16, 64).to(dtype)}
    with pytest.raises(TypeError, match=r"^weight: expected a bfloat16 or float32 tensor"):
        router.load_state_dict(state, assign=assign)
    assert not router.weight.any()


def test_assigned_bias_is_float32() -> None:
    bias = torch.linspace(-1, 1, 16).bfloat16()
    router = DenseRouter(TINY)
    router.load_state_dict({"weight": torch.zeros(16, 64), "bias": bias}, assign=True)
    assert router.weight.dtype is torch.float32  # it was assigned
    assert not router.weight.requires_grad
    assert router.bias.dtype is torch.float32
    assert torch.equal(router.bias, bias.float())


@pytest.mark.parametrize("stored", INDEX_TYPES)
@pytest.mark.parametrize("held", INDEX_TYPES)
def test_integer_tables_load_into_either_integer(held: torch.dtype, stored: torch.dtype) -> None:
    router = HashRouter(TINY, table_dtype=held)
    router.load_state_dict(hash_state(table(stored)))
    assert router.tid2eid.dtype is held
    assert torch.equal(router.tid2eid.long(), table())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "gate."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
def test_other_tables_are_refused(dtype: torch.dtype, prefix: str, assign: bool) -> None:
    router = HashRouter(TINY)
    target = nn.ModuleDict({"gate": router}) if prefix else router
    state = {prefix + name: tensor for name, tensor in hash_state(table(dtype)).items()}
    with pytest.raises(TypeError, match=rf"{prefix}tid2eid: expected an int32 or int64 tensor.*, got \w+ \[50, 4\]"):
        target.load_state_dict(state, assign=assign)
    assert router.tid2eid.dtype is torch.int64
    assert not router.tid2eid.any()
    assert not router.weight.any()


def test_table_that_does_not_fit_into_int32_is_refused() -> None:
    wide = table()
    wide[7, 1] = 2**32 + 5  # 5, if cut
    with pytest.raises(ValueError, match="tid2eid: expected entries that fit into int32"):
        HashRouter(TINY, table_dtype=torch.int32).load_state_dict(hash_state(wide))


def test_state_dict_round_trip(hashed: tuple[HashRouter, testing.HashInputs]) -> None:
    router, inputs = hashed
    other = HashRouter(TINY)
    other.load_state_dict(router.state_dict())
    expected = router(inputs.hidden_states, inputs.token_ids)
    weights, ids = other(inputs.hidden_states, inputs.token_ids)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])
