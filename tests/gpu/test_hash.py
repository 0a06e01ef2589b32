# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Hash routing on a GPU: the gather and both scored forms, against float64 and in every edge case."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import pytest
import torch
from routing_helpers import CONFIGS, TOKENS, TOP_KS
from routing_helpers import poisoned_on_gpu as poisoned
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv4_router
from dsv4_router import dispatch, reference
from dsv4_router.backends import cuda_hash, cuda_module
from dsv4_router.config import RouterConfig
from dsv4_router.testing import HashInputs, compare_hash, make_hash_inputs

pytestmark = pytest.mark.gpu

VOCABULARY = 5000
INTEGERS = (torch.int32, torch.int64)


@lru_cache(maxsize=1)
def inputs_of(name: str, top_k: int) -> tuple[RouterConfig, HashInputs]:
    """The same inputs for all token counts of a configuration: tests of one follow each other."""
    c = CONFIGS[name]
    config = RouterConfig(c.hidden_size, c.num_experts, top_k, c.routed_scaling_factor, vocab_size=VOCABULARY)
    return config, make_hash_inputs(config, max(TOKENS), seed=top_k, device="cuda")


def first(inputs: HashInputs, num_tokens: int) -> HashInputs:
    return inputs._replace(hidden_states=inputs.hidden_states[:num_tokens], token_ids=inputs.token_ids[:num_tokens])


def scored_by(inputs: HashInputs, form: str) -> dict[str, torch.Tensor]:
    """The arguments of one of the three forms."""
    if form == "plain":
        return {}
    if form == "logits":
        return {"router_logits": reference.logits(inputs.hidden_states, inputs.gate_weight)}
    return {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight}


@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
def test_tensors_without_memory_are_refused(form: str) -> None:
    _, inputs = inputs_of(next(iter(CONFIGS)), 6)
    inputs = first(inputs, 4)
    given: dict[str, torch.Tensor] = {"token_ids": inputs.token_ids} | scored_by(inputs, form)
    for name, tensor in given.items():
        with FakeTensorMode():
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        with pytest.raises(TypeError, match=rf"^{name}: expected a tensor with memory of its own"):
            dsv4_router.hash_route(hash_lut=inputs.hash_lut, top_k=6, **given | {name: fake})


def route(
    inputs: HashInputs, form: str, scaling: float = 1.5, ids_dtype: torch.dtype = torch.int32, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    top_k = inputs.hash_lut.shape[1]
    outputs = poisoned(inputs.token_ids.shape[0], top_k, ids_dtype)
    return dsv4_router.hash_router_dispatch(
        inputs.token_ids,
        inputs.hash_lut,
        top_k,
        *outputs,
        routed_scaling_factor=scaling,
        **scored_by(inputs, form),
        **options,
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_against_float64(name: str, top_k: int, num_tokens: int) -> None:
    config, whole = inputs_of(name, top_k)
    inputs = first(whole, num_tokens)
    for form in ("logits", "hidden"):
        weights, ids = route(inputs, form, config.routed_scaling_factor)
        if num_tokens:
            result = compare_hash(inputs, top_k, config.routed_scaling_factor, weights, ids)
            assert result.ok, (form, result)
    weights, ids = route(inputs, "plain", 1.0)
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids])
    assert torch.equal(weights, torch.full_like(weights, 1 / top_k))


@pytest.mark.parametrize(("token_dtype", "table_dtype", "ids_dtype"), list(itertools.product(INTEGERS, repeat=3)))
@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
def test_index_types_in_any_combination(
    token_dtype: torch.dtype, table_dtype: torch.dtype, ids_dtype: torch.dtype, form: str, seed: int
) -> None:
    config = RouterConfig(512, 384, 6, 1.0, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 100, seed=seed, device="cuda", token_dtype=token_dtype, table_dtype=table_dtype)
    weights, ids = route(inputs, form, 1.0, ids_dtype)
    assert ids.dtype is ids_dtype
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids.long()].long())
    if form != "plain":
        result = compare_hash(inputs, 6, 1.0, weights, ids)
        assert result.ok, result


@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
@pytest.mark.parametrize("token_dtype", INTEGERS)
def test_token_ids_outside_the_table_are_padding(form: str, token_dtype: torch.dtype, seed: int) -> None:
    config = RouterConfig(512, 384, 6, 1.0, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 64, seed=seed, device="cuda", token_dtype=token_dtype)
    clean = route(inputs, form)
    limits = torch.iinfo(token_dtype)
    bad = torch.tensor([-1, VOCABULARY, limits.min, limits.max], dtype=token_dtype, device="cuda")
    inputs.token_ids[::4] = bad.repeat(4)
    rows = torch.arange(64, device="cuda") % 4 == 0
    weights, ids = route(inputs, form, padding_id=-5)
    assert (ids[rows] == -5).all()
    assert (weights[rows] == 0).all()
    assert torch.equal(ids[~rows], clean[1][~rows])
    assert torch.equal(weights[~rows], clean[0][~rows])


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("expert", [-1, 384, 2**40])
def test_experts_that_do_not_exist_make_padding_rows(form: str, expert: int, seed: int) -> None:
    config = RouterConfig(512, 384, 6, 1.0, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 64, seed=seed, device="cuda")
    clean = route(inputs, form)
    inputs.hash_lut[inputs.token_ids[7], 3] = expert
    rows = inputs.token_ids == inputs.token_ids[7]
    weights, ids = route(inputs, form)
    assert (ids[rows] == -1).all()
    assert (weights[rows] == 0).all()
    assert torch.equal(ids[~rows], clean[1][~rows])
    assert torch.equal(weights[~rows], clean[0][~rows])


@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
@pytest.mark.parametrize("how", ["mask", "int", "device", "both"])
def test_padding_rows(form: str, how: str, seed: int) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 77, seed=seed, device="cuda")
    clean = route(inputs, form)
    rows = torch.arange(77, device="cuda")
    mask, count = rows % 3 != 1, torch.tensor(50, dtype=torch.int32, device="cuda")
    options, valid = {
        "mask": ({"token_mask": mask}, mask),
        "int": ({"num_valid_tokens": 50}, rows < 50),
        "device": ({"num_valid_tokens": count}, rows < 50),
        "both": ({"token_mask": mask, "num_valid_tokens": 50}, mask & (rows < 50)),
    }[how]
    inputs.hidden_states[~valid] = torch.nan
    weights, ids = route(inputs, form, **options)  # type: ignore[arg-type]
    assert (ids[~valid] == -1).all()
    assert (weights[~valid] == 0).all()
    assert torch.equal(ids[valid], clean[1][valid])
    assert torch.equal(weights[valid], clean[0][valid])


@pytest.mark.parametrize("hidden_size", [8, 100, 1001, 5120, 8192, 20000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 6, 7, 16])
def test_hidden_sizes_dtypes_and_strides(hidden_size: int, dtype: torch.dtype, top_k: int, seed: int) -> None:
    config = RouterConfig(hidden_size, 64, top_k, 2.5, vocab_size=100)
    inputs = make_hash_inputs(config, 33, seed=seed, device="cuda", dtype=dtype)
    wide = torch.full((33, hidden_size + 24), torch.nan, dtype=dtype, device="cuda")
    wide[:, :hidden_size] = inputs.hidden_states
    shifted = torch.empty(33 * hidden_size + 1, dtype=dtype, device="cuda")[1:].view(33, hidden_size)
    shifted.copy_(inputs.hidden_states)
    plain = route(inputs, "hidden", 2.5)
    result = compare_hash(inputs, top_k, 2.5, *plain)
    assert result.ok, result
    for hidden_states in (wide[:, :hidden_size], shifted):
        weights, ids = route(inputs._replace(hidden_states=hidden_states), "hidden", 2.5)
        assert torch.equal(weights, plain[0])
        assert torch.equal(ids, plain[1])


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_hidden_states_stay_in_their_rows(form: str, bad: float, seed: int) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 50, seed=seed, device="cuda")
    clean = route(inputs, form)
    rows = torch.arange(50, device="cuda") % 7 == 3
    inputs.hidden_states[rows] = bad
    weights, ids = route(inputs, form)
    assert torch.equal(ids, clean[1])
    assert torch.equal(weights[~rows], clean[0][~rows])
    assert weights.isfinite().all()


def test_an_expert_named_twice(seed: int) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 40, seed=seed, device="cuda")
    inputs.hash_lut[:, 4] = inputs.hash_lut[:, 1]
    for form in ("logits", "hidden"):
        weights, ids = route(inputs, form)
        assert torch.equal(weights[:, 4], weights[:, 1])
        assert compare_hash(inputs, 6, 1.5, weights, ids).ok


def test_bits_of_a_token_do_not_depend_on_the_call(seed: int) -> None:
    config = RouterConfig(7168, 384, 6, 2.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 256, seed=seed, device="cuda")
    whole = route(inputs, "hidden")
    for num_tokens in (1, 2, 31, 128, 255):
        part = inputs._replace(
            hidden_states=inputs.hidden_states[-num_tokens:], token_ids=inputs.token_ids[-num_tokens:]
        )
        weights, ids = route(part, "hidden")
        assert torch.equal(weights, whole[0][-num_tokens:])
        assert torch.equal(ids, whole[1][-num_tokens:])


def test_a_lone_row_may_have_any_stride(seed: int) -> None:
    """Contiguous, and yet of stride 1: the transpose of a column."""
    config = RouterConfig(4096, 256, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 1, seed=seed, device="cuda")
    column = inputs.hidden_states.reshape(-1, 1).clone()
    assert column.t().stride() == (1, 1)
    expected = route(inputs, "hidden")
    weights, ids = route(inputs._replace(hidden_states=column.t()), "hidden")
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
def test_a_million_tokens(form: str, seed: int) -> None:
    config = RouterConfig(64, 128, 6, 1.5)
    inputs = make_hash_inputs(config, 1 << 20, seed=seed, device="cuda")
    weights, ids = route(inputs, form)
    assert torch.equal(ids.long(), inputs.hash_lut[inputs.token_ids])
    assert (weights > 0).all()
    if form != "plain":
        result = compare_hash(inputs, 6, 1.5, weights, ids)
        assert result.ok, result


@pytest.mark.parametrize("form", ["plain", "logits", "hidden"])
def test_one_launch_and_no_synchronisation(form: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 16, seed=seed, device="cuda")
    outputs = poisoned(16, 6)
    arguments = scored_by(inputs, form)
    call = lambda: dsv4_router.hash_router_dispatch(inputs.token_ids, inputs.hash_lut, 6, *outputs, **arguments)  # noqa: E731
    call()
    launches = []
    launch = cuda_module.launch
    monkeypatch.setattr(cuda_module, "launch", lambda *args: (launches.append(args), launch(*args))[1])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 1
    assert len(kernels) == 1, kernels
    assert kernels[0].startswith("hash_")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_missing_cuda_python_leads_to_the_reference_visibly(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RouterConfig(512, 64, 6, 1.5, vocab_size=VOCABULARY)
    inputs = make_hash_inputs(config, 16, seed=seed, device="cuda")
    found = dispatch.availability(inputs.hidden_states.device)
    lacking = dispatch.Availability(found.device, found.compute_capability, missing_cuda_python="no NVRTC here")
    monkeypatch.setattr(dispatch, "availability", lambda device: lacking)
    monkeypatch.setattr(dispatch, "hash_path_of_call", lambda device: dispatch.hash_path(lacking))
    monkeypatch.setattr(cuda_hash, "from_hidden", None)
    with pytest.warns(RuntimeWarning, match="no NVRTC here"):
        weights, ids = route(inputs, "hidden")
    assert compare_hash(inputs, 6, 1.5, weights, ids).ok
