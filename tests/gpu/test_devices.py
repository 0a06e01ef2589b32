# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Tensors on a device that is not the current one."""

from __future__ import annotations

import pytest
import torch

import dsv4_router
from dsv4_router.testing import DenseInputs, compare_hash, make_dense_inputs, make_hash_inputs

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("backend", ["decode", "cublas"])
@pytest.mark.parametrize("num_tokens", [1, 33, 200])
def test_dense(backend: str, num_tokens: int) -> None:
    inputs = make_dense_inputs(dsv4_router.V4_FLASH, num_tokens, seed=num_tokens, device="cuda:0")
    expected = dsv4_router.dense_route(*inputs, 6, 1.5, backend=backend)
    there = DenseInputs(*(tensor.to("cuda:1") for tensor in inputs))
    with torch.cuda.device(0):
        for _ in range(3):  # the first call of a device loads, later ones may take a shorter way
            weights, ids = dsv4_router.dense_route(*there, 6, 1.5, backend=backend)
            assert weights.get_device() == ids.get_device() == 1
            assert torch.equal(weights.cpu(), expected[0].cpu())
            assert torch.equal(ids.cpu(), expected[1].cpu())
        assert torch.cuda.current_device() == 0


def test_hash() -> None:
    inputs = make_hash_inputs(dsv4_router.V4_FLASH, 9, seed=9, device="cuda:1")
    with torch.cuda.device(0):
        weights, ids = dsv4_router.hash_route(
            inputs.token_ids,
            inputs.hash_lut,
            6,
            hidden_states=inputs.hidden_states,
            gate_weight=inputs.gate_weight,
            routed_scaling_factor=1.5,
        )
        assert compare_hash(inputs, 6, 1.5, weights, ids).ok
        assert torch.cuda.current_device() == 0


def test_a_graph_on_the_second_device() -> None:
    inputs = make_dense_inputs(dsv4_router.V4_FLASH, 5, seed=5, device="cuda:1")
    weights = torch.full((5, 6), 9e9, device="cuda:1")
    ids = torch.full((5, 6), -7, dtype=torch.int32, device="cuda:1")
    with torch.cuda.device(1):
        expected = dsv4_router.dense_route(*inputs, 6, 1.5, backend="decode")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dsv4_router.dense_router_dispatch(*inputs, 6, 1.5, weights, ids, backend="decode")
        graph.replay()
    torch.cuda.synchronize(1)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])
