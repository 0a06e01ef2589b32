# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``decode`` path where its token tiles meet, past the last column, and with many equally good experts."""

from __future__ import annotations

import pytest
import torch

import dsv4_router
from dsv4_router import decode_config, dispatch, reference
from dsv4_router.arguments import NO_OPTIONS
from dsv4_router.backends import decode
from dsv4_router.config import V4_1_FLASH, V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.testing import DenseInputs, compare_dense, make_dense_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("served_by_decode")]

# 9 slices of 2 chunks with half a chunk too many, 9 of 2 that fit, 11, with the experts in small groups; 13 of 5, where
# warpgroups multiply from 17 rows on.
ODD = [
    RouterConfig(1088, 132, 4, 1.0),
    RouterConfig(1152, 64, 2, 1.0),
    RouterConfig(2112, 144, 8, 1.5),
    RouterConfig(4160, 132, 6, 1.5),
]
MODELS = [V4_PRO, V4_FLASH, V4_1_FLASH]
TIES = [RouterConfig(1024, experts, k, 1.0) for experts in (32, 132, 256, 384, 512) for k in (1, 6, 8, 16)]
# Of token tiles; and 4, up to which rows come one by one.
EDGES = [1, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 96, 97, 128]
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def name_of(config: RouterConfig) -> str:
    return f"H{config.hidden_size}-E{config.num_experts}-k{config.top_k}"


def route(inputs: DenseInputs, config: RouterConfig, max_looks: int = decode.MAX_LOOKS) -> Outputs:
    """Weights, ids and logits, poisoned before."""
    num_tokens = inputs.hidden_states.shape[0]
    weights = torch.full((num_tokens, config.top_k), 9e9, device="cuda")
    ids = torch.full((num_tokens, config.top_k), -7, dtype=torch.int32, device="cuda")
    logits = torch.full((num_tokens, config.num_experts), 9e9, device="cuda")
    operands = *inputs, config.top_k, config.routed_scaling_factor, weights, ids
    decode.route(operands, logits, NO_OPTIONS, max_looks)
    return weights, ids, logits


def assert_same(a: Outputs, b: Outputs) -> None:
    assert torch.equal(a[0].view(torch.int32), b[0].view(torch.int32))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2].view(torch.int32), b[2].view(torch.int32))


@pytest.mark.parametrize("config", MODELS + ODD, ids=name_of)
def test_edges_of_token_tiles(config: RouterConfig, seed: int) -> None:
    inputs = make_dense_inputs(config, EDGES[-1], seed=seed, device="cuda")
    expected = route(inputs, config)
    assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, *expected[:2]).ok
    for num_tokens in EDGES:
        for max_looks in (decode.MAX_LOOKS, 0):
            first = inputs._replace(hidden_states=inputs.hidden_states[:num_tokens])
            assert_same(route(first, config, max_looks), tuple(part[:num_tokens] for part in expected))


@pytest.mark.parametrize("config", [V4_PRO, V4_FLASH, ODD[-1]], ids=name_of)
def test_warps_and_warpgroups_give_the_same_bits(
    config: RouterConfig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = dispatch.architecture(torch.cuda.get_device_capability())
    if architecture not in decode_config.WGMMA_ARCHITECTURES:
        pytest.skip(f"needs one of {decode_config.WGMMA_ARCHITECTURES}, for wgmma; got {architecture}")
    sizes = config.hidden_size, config.num_experts, config.top_k
    inputs = make_dense_inputs(config, 128, seed=seed, device="cuda")
    parts = [inputs._replace(hidden_states=inputs.hidden_states[:num_tokens]) for num_tokens in (20, 50, 90, 128)]
    tiles = [decode_config.token_tile(len(part.hidden_states)) for part in parts]
    by_warpgroups = [decode_config.variant(*sizes, tile, architecture).warpgroup_mma for tile in tiles]
    assert by_warpgroups[1:] == [True] * 3
    expected = [route(part, config) for part in parts]
    asked = []

    def by_warps(*sizes_and_tile: int | str) -> decode_config.DecodeConfig:
        asked.append(sizes_and_tile[3])
        return decode_config.DecodeConfig(*sizes_and_tile[:4])

    monkeypatch.setattr(decode, "variant", by_warps)
    monkeypatch.setattr(decode, "_models", {})
    for part, outputs in zip(parts, expected, strict=True):
        for max_looks in (decode.MAX_LOOKS, 0):
            assert_same(route(part, config, max_looks), outputs)
    assert asked == tiles


@pytest.mark.parametrize("config", ODD, ids=name_of)
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 16, 20, 40])
def test_what_lies_behind_a_row_is_not_read(config: RouterConfig, num_tokens: int, seed: int) -> None:
    """In the last slices the kernel has room for columns past H; behind the rows of a view lie NaNs."""
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    wide = torch.full((num_tokens, config.hidden_size + 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    view = wide[:, : config.hidden_size]
    view.copy_(inputs.hidden_states)
    expected = route(inputs, config)
    assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, *expected[:2]).ok
    assert_same(route(inputs._replace(hidden_states=view), config), expected)


@pytest.mark.parametrize("config", TIES, ids=name_of)
@pytest.mark.parametrize("good", ["all", "one group", "every second", "two levels"])
def test_more_candidates_than_a_warp_has_lanes(config: RouterConfig, good: str) -> None:
    """With hidden states of zero every logit is 0 and the bias alone chooses: its ties are exact."""
    num_experts, top_k = config.num_experts, config.top_k
    experts = torch.arange(num_experts, device="cuda")
    bias = {
        "all": torch.zeros_like(experts),
        "one group": (experts < 32).int() * 2 + (experts < 20).int(),
        "every second": experts % 2,
        "two levels": (experts >= num_experts // 2).int() + (experts == num_experts - 1).int(),
    }[good].float()
    for num_tokens in (1, 9, 40):
        hidden_states = torch.zeros(num_tokens, 1024, dtype=torch.bfloat16, device="cuda")
        gate_weight = torch.ones(num_experts, 1024, dtype=torch.bfloat16, device="cuda")
        inputs = DenseInputs(hidden_states, gate_weight, bias)
        weights, ids, _ = route(inputs, config)
        expected_weights, expected_ids = reference.dense_route(*inputs, top_k, 1.0)
        assert torch.equal(ids, expected_ids.to(ids.dtype))
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)


def test_the_cases_cover_every_token_tile() -> None:
    assert {decode_config.token_tile(num_tokens) for num_tokens in EDGES} == set(decode_config.TOKEN_TILES)
    assert dsv4_router.explain(V4_FLASH, num_tokens=EDGES[-1], device="cuda").path == "decode"
