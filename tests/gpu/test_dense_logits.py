# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""More rows than one launch of the decode kernel takes: logits by warpgroup MMA, with the decode kernel's bits."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from routing_helpers import Result, assert_same
from routing_helpers import poisoned_result as poisoned
from routing_helpers import route_on_gpu as route

import dsv4_router
from dsv4_router import dispatch, thresholds
from dsv4_router.backends import cublas, cuda_module, decode
from dsv4_router.config import V4_1_FLASH, V4_1_FLASH_DRAFT, V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.logits_config import MANY_TILES, ROW_TILE, LogitsConfig, logits_configs
from dsv4_router.profiling.splits import Way, ways
from dsv4_router.testing import DenseInputs, compare_dense, float64_logits, logit_tolerance, make_dense_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("served_by_dense_logits")]

# 9 slices of 2 chunks with half a chunk too many; one chunk a slice; 11 slices; 3 clusters of experts; few experts.
ODD = [
    RouterConfig(1088, 132, 4, 1.0),
    RouterConfig(1024, 32, 1, 3.0),
    RouterConfig(2112, 144, 8, 1.5),
    RouterConfig(8192, 512, 16, 2.5),
    RouterConfig(4096, 36, 5, 1.5),
    RouterConfig(1024, 392, 6, 1.5),  # 7 tiles of 56 experts, and one past E that completes a cluster
]
MODELS = [V4_PRO, V4_FLASH, V4_1_FLASH, V4_1_FLASH_DRAFT]
SMALL = ODD[0]
WAYS = ways((0, -1))  # with small tiles of experts and, if there are any, with large ones


def name_of(config: RouterConfig) -> str:
    return f"H{config.hidden_size}-E{config.num_experts}-k{config.top_k}"


def route_by_128(inputs: DenseInputs, config: RouterConfig, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The same call by launches of the decode kernel alone, as where there is no other."""
    model = decode._model(torch.cuda.current_device(), config.hidden_size, config.num_experts, config.top_k)
    with monkeypatch.context() as patch:
        patch.setattr(model, "many_rows", ())
        patch.setattr(model, "logits_kernel", lambda config: pytest.fail("the logits kernel was launched"))
        return route(inputs, config)


def force(patch: pytest.MonkeyPatch, way: Way) -> None:
    """Calls take this way from here on, whatever the number of rows."""
    patch.setattr(decode, "fastest", way.choose)
    patch.setattr(cublas, "remembered", {})  # which holds choices


@pytest.fixture(params=WAYS, ids=lambda way: f"{'small' if way.kernel == 0 else 'large'}-{way.parts}")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """The test is done in each of :data:`WAYS`."""
    force(monkeypatch, request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", MODELS + ODD, ids=name_of)
def test_the_bits_of_the_decode_kernel(config: RouterConfig, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and broken tiles of rows, and rows left, in the way that the host chooses, and in each other one."""
    inputs = make_dense_inputs(config, 2100, seed=seed, device="cuda")
    expected = route_by_128(inputs, config, monkeypatch)
    assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, *expected[:2]).ok
    error = (expected.logits.double() - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs()
    assert float(error.max()) <= logit_tolerance(inputs.hidden_states, inputs.gate_weight)

    def check(num_tokens: int) -> None:
        first = inputs._replace(hidden_states=inputs.hidden_states[:num_tokens])
        assert_same(route(first, config), expected.rows(slice(num_tokens)))

    for num_tokens in (129, 192, 255, 256, 257, 512, 513, 768, 1000, 1409, 2048, 2049, 2100):
        check(num_tokens)
    for way in WAYS:
        with monkeypatch.context() as patch:
            force(patch, way)
            for num_tokens in (129, 300, 1000, 2048):
                check(num_tokens)


@pytest.mark.parametrize("rows", [1, 17, 128])
@pytest.mark.parametrize("config", [V4_PRO, SMALL], ids=name_of)
def test_rows_left_to_the_decode_kernel(
    config: RouterConfig, rows: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three launches: of eager calls, the long way and the short one, with every option, and of replays."""
    num_tokens = 384 + rows
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    expected = route_by_128(inputs, config, monkeypatch)
    mask = torch.arange(num_tokens, device="cuda") % 4 != 1
    count = torch.tensor(num_tokens - 1, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"token_mask": mask, "num_valid_tokens": count, "padding_id": -5}
    padded = route(inputs, config, **options)
    force(monkeypatch, Way(0, "halves", rows))
    assert_same(route(inputs, config), expected)
    assert_same(route(inputs, config, **options), padded)
    assert_same(route(inputs, config, **options | {"num_valid_tokens": num_tokens - 1}), padded)
    result = poisoned(num_tokens, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            route(inputs, config, result)
    for _ in range(2):
        result.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(result, expected)
    route(inputs, config, logits_out=None)
    assert [again.num_rows for again in cublas.remembered.values()] == [384]
    monkeypatch.setattr(decode, "route", None)
    for options in ({}, {"launch_with_pdl": False}, {"weights_are_constant": False}):
        assert_same(route(inputs, config, logits_out=None, **options)._replace(logits=expected.logits), expected)


@pytest.mark.parametrize("max_clusters", [1, 9, 1000])
@pytest.mark.parametrize("config", [V4_PRO, SMALL], ids=name_of)
def test_few_blocks_take_turns(
    config: RouterConfig, max_clusters: int, way: Way, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with few multiprocessors, or with many rows: a block makes one tile of rows after the other."""
    inputs = make_dense_inputs(config, 700, seed=seed, device="cuda")
    expected = route_by_128(inputs, config, monkeypatch)
    model = decode._model(torch.cuda.current_device(), config.hidden_size, config.num_experts, config.top_k)
    monkeypatch.setattr(model, "max_clusters", max_clusters)
    for pdl in (True, False):
        assert_same(route(inputs, config, launch_with_pdl=pdl), expected)


@pytest.mark.parametrize("dependents", range(3))
@pytest.mark.parametrize("num_tokens", [129, 700, 1665, 2060])
def test_whenever_dependents_are_let_in(
    num_tokens: int, dependents: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once too where they find no room; calls follow each other without a gap, and graphs repeat it.

    On the short way calls share the memory of their partial logits.
    """
    config = V4_FLASH
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    expected = route_by_128(inputs, config, monkeypatch)
    monkeypatch.setattr(LogitsConfig, "dependents", lambda self, *of_call: dependents)
    monkeypatch.setattr(cublas, "remembered", {})
    results = [poisoned(num_tokens, config) for _ in range(5)]
    graph = torch.cuda.CUDAGraph()
    for logits_out in (True, False):
        for result in results:
            result.poison()
        for result in results:
            route(inputs, config, result, **({} if logits_out else {"logits_out": None}))
        for result in results:
            assert_same(result if logits_out else result._replace(logits=expected.logits), expected)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for result in results:
            route(inputs, config, result)
    for _ in range(3):
        for result in results:
            result.poison()
        graph.replay()
        torch.cuda.synchronize()
        for result in results:
            assert_same(result, expected)


def test_dependents_let_in_early_or_as_blocks_end(way: Way, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of rows less, and as many tiles as let dependents in early; calls follow each other without a gap."""
    config = V4_1_FLASH
    inputs = make_dense_inputs(config, 1024, seed=seed, device="cuda")
    expected = route_by_128(inputs, config, monkeypatch)
    configs = logits_configs(config.hidden_size, config.num_experts, "sm_90a")
    of_kernel, num_parts, _ = way.choose(configs, 1024, 132, 0)
    row_tiles = -(-MANY_TILES // (of_kernel.num_expert_tiles * num_parts))
    for num_tokens in ((row_tiles - 1) * ROW_TILE, row_tiles * ROW_TILE):
        rows = torch.arange(num_tokens, device="cuda") % 1024
        long = inputs._replace(hidden_states=inputs.hidden_states[rows])
        results = [poisoned(num_tokens, config) for _ in range(4)]
        for result in results:
            route(long, config, result)
        for result in results:
            assert_same(result, expected.rows(rows))


@pytest.mark.parametrize("kind", ["wide", "denormal", "large", "hostile"])
def test_the_bits_of_the_decode_kernel_for_any_numbers(
    kind: str, way: Way, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of MMA align, cut and flush products alike; nothing that blocks add turns -0.0 into 0.0."""
    config, num_tokens = V4_1_FLASH, 1665
    inputs = make_dense_inputs(config, num_tokens, seed=1, device="cuda")
    hidden_states = inputs.hidden_states.float()
    exponents = torch.randint(-40, 40, hidden_states.shape, generator=generator).cuda()
    rows = torch.arange(num_tokens, device="cuda")
    if kind == "wide":
        hidden_states = torch.ldexp(hidden_states, exponents)
    elif kind == "denormal":
        hidden_states *= 2.0**-125
    elif kind == "large":
        hidden_states *= 2.0**120
    else:
        hidden_states[rows % 7 == 0] = torch.nan
        hidden_states[rows % 7 == 1, 5] = torch.inf
        hidden_states[rows % 7 == 2] = 0.0
        hidden_states[rows % 7 == 3] = -0.0
    inputs = inputs._replace(hidden_states=hidden_states.bfloat16())
    expected = route_by_128(inputs, config, monkeypatch)
    result = route(inputs, config)
    assert_same(result, expected)
    assert int(result.ids.min()) >= 0
    assert all(len(set(ids)) == config.top_k for ids in result.ids.tolist())


def test_bad_rows_change_no_other(way: Way, seed: int) -> None:
    num_tokens = 300
    inputs = make_dense_inputs(SMALL, num_tokens, seed=seed, device="cuda")
    clean = route(inputs, SMALL)
    bad = torch.arange(num_tokens, device="cuda") % 5 == 2
    hidden_states = inputs.hidden_states.clone()
    hidden_states[bad] = torch.nan
    assert_same(route(inputs._replace(hidden_states=hidden_states), SMALL).rows(~bad), clean.rows(~bad))


def test_options_of_the_launch_change_no_bits(way: Way, seed: int) -> None:
    num_tokens = 300
    inputs = make_dense_inputs(SMALL, num_tokens, seed=seed, device="cuda")
    expected = route(inputs, SMALL)
    for launch_with_pdl in (False, True):
        for weights_are_constant in (False, True):
            options = {"launch_with_pdl": launch_with_pdl, "weights_are_constant": weights_are_constant}
            assert_same(route(inputs, SMALL, **options), expected)


@pytest.mark.parametrize("rows_at_once", [129, 256, 1000])
def test_long_calls_go_in_pieces(rows_at_once: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece may be so short that one launch of the decode kernel would take it."""
    num_tokens = 1030
    inputs = make_dense_inputs(SMALL, num_tokens, seed=seed, device="cuda")
    mask = torch.arange(num_tokens, device="cuda") % 4 != 1
    count = torch.tensor(900, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"token_mask": mask, "num_valid_tokens": count, "padding_id": -5}
    expected = route(inputs, SMALL, **options)
    assert torch.equal(expected.ids[:, 0] == -5, ~mask | (torch.arange(num_tokens, device="cuda") >= 900))
    monkeypatch.setattr(decode, "_ROWS_AT_ONCE", rows_at_once)
    assert_same(route(inputs, SMALL, **options), expected)
    assert_same(route(inputs, SMALL, **options | {"num_valid_tokens": 900}), expected)


def test_more_rows_than_go_at_once(seed: int) -> None:
    num_tokens = decode._ROWS_AT_ONCE + 77
    inputs = make_dense_inputs(RouterConfig(1024, 32, 1, 3.0), 300, seed=seed, device="cuda")
    config = RouterConfig(1024, 32, 1, 3.0)
    expected = route(inputs, config)
    rows = torch.arange(num_tokens, device="cuda") % 300
    assert_same(route(inputs._replace(hidden_states=inputs.hidden_states[rows]), config), expected.rows(rows))


def test_replays_see_changed_inputs(way: Way, seed: int) -> None:
    num_tokens = 300
    first, second = (make_dense_inputs(SMALL, num_tokens, seed=seed + i, device="cuda") for i in range(2))
    expected = [route(inputs, SMALL) for inputs in (first, second)]
    given = DenseInputs(*(tensor.clone() for tensor in first))
    result = poisoned(num_tokens, SMALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            route(given, SMALL, result)
    for i in (1, 0, 1):
        for tensor, source in zip(given, (first, second)[i], strict=True):
            tensor.copy_(source)
        result.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(result, expected[i])


def test_first_use_may_be_captured(seed: int) -> None:
    """A shape that no other test uses: its kernel is compiled and loaded while the stream is being captured."""
    config = RouterConfig(1280, 68, 3, 1.0)
    inputs = make_dense_inputs(config, 150, seed=seed, device="cuda")
    result = poisoned(150, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route(inputs, config, result)
    graph.replay()
    torch.cuda.synchronize()
    assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, *result[:2]).ok
    assert_same(route(inputs, config), result)


def test_a_thousand_repetitions_beside_other_streams(seed: int) -> None:
    """Threads, each on a stream of its own, while one more stream multiplies: the same bits every time."""
    sizes = 300, 1400, 2304, 2100  # on 132 multiprocessors pairs apart, halves, all of K, and rows left
    calls = [make_dense_inputs(V4_FLASH, num_tokens, seed=seed + num_tokens, device="cuda") for num_tokens in sizes]
    expected = [route(inputs, V4_FLASH) for inputs in calls]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in calls]
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                result = poisoned(sizes[i], V4_FLASH)
                for _ in range(1000):
                    result.poison()
                    route(calls[i], V4_FLASH, result)
                    for got, wanted in zip(result, expected[i], strict=True):
                        wrong[i] += (got != wanted).sum()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    load = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(200):
            load @ load
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert [int(count) for count in wrong] == [0] * len(sizes)


@pytest.mark.parametrize("config", [V4_PRO, V4_FLASH, SMALL], ids=name_of)
@pytest.mark.parametrize("num_tokens", [129, 300, 1000])
def test_the_short_way_gives_the_same_bits(
    config: RouterConfig, num_tokens: int, way: Way, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second eager call of a shape goes straight to both launches."""
    inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
    expected = route(inputs, config)
    assert not cublas.remembered, "a call that wants logits is no ordinary one"
    route(inputs, config, logits_out=None)
    (again,) = cublas.remembered.values()
    monkeypatch.setattr(decode, "route", None)
    for options in ({}, {"launch_with_pdl": False}, {"weights_are_constant": False}):
        second = route(inputs, config, logits_out=None, **options)
        assert_same(second._replace(logits=expected.logits), expected)
    assert list(cublas.remembered.values()) == [again]


# Which path, and when kernels are loaded.


def test_after_warmup_more_rows_compile_nothing(way: Way, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ids of either type."""
    config = RouterConfig(1024, 32, 3, 1.0)
    inputs = make_dense_inputs(config, 150, seed=seed, device="cuda")
    dsv4_router.warmup(config, "cuda")

    def refuse(*args: Any) -> None:
        raise AssertionError(f"called after warmup: {args}")

    for owner, name in ((decode, "compile_object"), (decode, "object_code"), (decode, "link"), (cuda_module, "_load")):
        monkeypatch.setattr(owner, name, refuse)
    for dtype in (torch.int32, torch.int64):
        result = poisoned(150, config)
        result = result._replace(ids=result.ids.to(dtype))
        route(inputs, config, result, logits_out=None)
        assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, *result[:2]).ok


def test_auto_takes_this_path_up_to_its_threshold(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = V4_FLASH, torch.device("cuda", torch.cuda.current_device())
    found = dispatch.availability(device)
    assert found.gpu is not None
    assert found.compute_capability is not None
    own = thresholds.DecodeThreshold(
        found.gpu, found.compute_capability, config.hidden_size, config.num_experts, 300, "2026-11-24"
    )
    monkeypatch.setattr(dispatch, "availability", lambda device: dataclasses.replace(found, tuned=(own,)))
    monkeypatch.setattr(dispatch, "path_of_call", dispatch.path_of_call.__wrapped__)
    monkeypatch.setattr(cublas, "remembered", {})  # the choices of other tests, and of this one afterwards
    inputs = make_dense_inputs(config, 301, seed=seed, device="cuda")
    for num_tokens, path in ((128, "decode"), (129, "decode"), (300, "decode"), (301, "cublas")):
        assert dsv4_router.explain(config, num_tokens, device).path == path
        first = inputs._replace(hidden_states=inputs.hidden_states[:num_tokens])
        expected = route(first, config, backend=path)
        assert_same(route(first, config, backend="auto"), expected)
        for _ in range(2):  # the short way, if there is one, from the second call on
            ordinary = route(first, config, backend="auto", logits_out=None)
            assert_same(ordinary._replace(logits=expected.logits), expected)
