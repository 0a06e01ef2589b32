# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Streams, CUDA graphs, dependent launches and repetition: the same bits, whatever runs around a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from routing_helpers import Outputs, write_late
from routing_helpers import poisoned_on_gpu as poisoned

import dsv4_router
from dsv4_router.arguments import Options
from dsv4_router.backends import cublas
from dsv4_router.config import RouterConfig
from dsv4_router.testing import compare_dense, compare_hash, make_dense_inputs, make_hash_inputs

pytestmark = pytest.mark.gpu

CONFIG = RouterConfig(4096, 256, 6, 1.5, vocab_size=5000)
FORMS = ("dense", "plain", "logits", "hidden")


class Call:
    """A call of one form on inputs of its own, whose tensors can be overwritten."""

    def __init__(self, form: str, num_tokens: int, seed: int, config: RouterConfig = CONFIG) -> None:
        self.form, self.config = form, config
        self.dense = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
        self.hash = make_hash_inputs(config, num_tokens, seed=seed, device="cuda")
        self.logits = self.hash.hidden_states.float() @ self.hash.gate_weight.float().T
        self.mask = torch.arange(num_tokens, device="cuda") % 3 != seed % 3
        self.count = torch.tensor([num_tokens - 1 - seed % 3], dtype=torch.int32, device="cuda")
        self.outputs = poisoned(num_tokens, config.top_k)

    def __call__(self, **options: Any) -> Outputs:
        if self.form == "dense":
            options = {"backend": "cublas"} | options  # the decode path has tests of its own
            return dsv4_router.dense_router_dispatch(
                *self.dense, self.config.top_k, self.config.routed_scaling_factor, *self.outputs, **options
            )
        scored: dict[str, torch.Tensor] = {}
        if self.form == "logits":
            scored = {"router_logits": self.logits}
        elif self.form == "hidden":
            scored = {"hidden_states": self.hash.hidden_states, "gate_weight": self.hash.gate_weight}
        return dsv4_router.hash_router_dispatch(
            self.hash.token_ids, self.hash.hash_lut, self.config.top_k, *self.outputs, **scored, **options
        )

    def inputs(self) -> list[torch.Tensor]:
        return [*self.dense, *self.hash, self.logits]

    def poison(self) -> None:
        self.outputs[0].fill_(9e9)
        self.outputs[1].fill_(-7)

    def copy_of_outputs(self) -> Outputs:
        return self.outputs[0].clone(), self.outputs[1].clone()


def same(a: Outputs, b: Outputs) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("form", FORMS)
def test_eight_streams_at_once(form: str, seed: int) -> None:
    calls = [Call(form, 16 + i, seed + i) for i in range(8)]
    expected = []
    for call in calls:
        call()
        expected.append(call.copy_of_outputs())
        call.poison()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(50):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                call.poison()
                call()
    torch.cuda.synchronize()
    assert all(same(call.outputs, wanted) for call, wanted in zip(calls, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 33, 1000])
def test_graph_replays_see_changed_inputs(form: str, num_tokens: int, seed: int) -> None:
    call, other = Call(form, num_tokens, seed), Call(form, num_tokens, seed + 1)
    for each in (call, other):
        each()
    wanted = [call.copy_of_outputs(), other.copy_of_outputs()]
    originals = [tensor.clone() for tensor in call.inputs()]
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for _ in range(3):
        for sources, outputs in ((other.inputs(), wanted[1]), (originals, wanted[0])):
            for tensor, source in zip(call.inputs(), sources, strict=True):
                tensor.copy_(source)
            call.poison()
            graph.replay()
            torch.cuda.synchronize()
            assert same(call.outputs, outputs)


@pytest.mark.parametrize("form", FORMS)
def test_first_use_may_be_captured(form: str, seed: int) -> None:
    """Shapes that no other test uses: the kernel is compiled and loaded while the stream is being captured."""
    config = RouterConfig(1536, 77 + FORMS.index(form), 5, 1.5, vocab_size=300)
    call = Call(form, 9, seed, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    captured = call.copy_of_outputs()
    assert (captured[1] >= 0).all()
    call.poison()
    call()
    assert same(call.outputs, captured)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_a_thousand_repetitions(form: str, num_tokens: int, seed: int) -> None:
    call = Call(form, num_tokens, seed)
    call()
    expected = call.copy_of_outputs()
    busy = torch.cuda.Stream()
    load = torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(busy):
                torch.mm(load, load)
        call.poison()
        call()
        wrong += (call.outputs[0] != expected[0]).sum() + (call.outputs[1] != expected[1]).sum()
    assert int(wrong) == 0


def late_cases(form: str) -> dict[str, Callable[[Call], torch.Tensor]]:
    """What the kernel before may still be writing when a call of this form is launched.

    Not for dense calls: there a GEMM stands between, which is no dependent launch. Their top-k has a test of its own.
    """
    cases: dict[str, Callable[[Call], torch.Tensor]] = {
        "token_ids": lambda c: c.hash.token_ids,
        "hash_lut": lambda c: c.hash.hash_lut,
        "token_mask": lambda c: c.mask,
        "num_valid_tokens": lambda c: c.count,
    }
    if form == "logits":
        cases["router_logits"] = lambda c: c.logits
    elif form == "hidden":
        cases["hidden_states"] = lambda c: c.hash.hidden_states
        cases["gate_weight"] = lambda c: c.hash.gate_weight
    return cases


HASH_FORMS = FORMS[1:]
LATE = [(form, name) for form in HASH_FORMS for name in late_cases(form)]
CONSTANTS = ("hash_lut", "gate_weight")


@pytest.mark.parametrize(("form", "name"), LATE)
def test_dependent_launch_waits_for_what_it_reads(form: str, name: str, seed: int) -> None:
    """The kernel before triggers at once and writes 20 us later; without the wait, the old values would be read.

    The weights may only change with ``weights_are_constant=False``; all else may change at any time.
    """
    call, other = Call(form, 8, seed), Call(form, 8, seed + 1)
    target = late_cases(form)[name](call)
    old, new = target.clone(), late_cases(form)[name](other).clone()
    options: dict[str, Any] = {"weights_are_constant": name not in CONSTANTS}
    options |= {"token_mask": call.mask} if name == "token_mask" else {}
    options |= {"num_valid_tokens": call.count} if name == "num_valid_tokens" else {}
    expected = []
    for value in (old, new):
        target.copy_(value)
        torch.cuda.synchronize()
        call(**options)
        expected.append(call.copy_of_outputs())
    assert not same(*expected), "both values give one result: this test would prove nothing"
    for _ in range(20):
        for value, wanted in zip((old, new), expected, strict=True):
            call.poison()
            write_late(target, value)
            call(**options)
            torch.cuda.synchronize()
            assert same(call.outputs, wanted)


@pytest.mark.parametrize("name", ["logits", "correction_bias", "token_mask", "num_valid_tokens"])
def test_dependent_topk_waits_for_what_it_reads(name: str, seed: int) -> None:
    """The top-k alone, right behind the kernel that writes what it reads."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    logits, other_logits = torch.randn(2, 8, 384, generator=generator, device="cuda")
    bias, other_bias = torch.randn(2, 384, generator=generator, device="cuda")
    mask = torch.arange(8, device="cuda") % 2 == 0
    count = torch.tensor([3], dtype=torch.int32, device="cuda")
    target, new = {
        "logits": (logits, other_logits),
        "correction_bias": (bias, other_bias),
        "token_mask": (mask, ~mask),
        "num_valid_tokens": (count, count + 3),
    }[name]
    old, outputs = target.clone(), poisoned(8)
    options = Options(
        token_mask=mask if name == "token_mask" else None,
        num_valid_tokens=count if name == "num_valid_tokens" else None,
        weights_are_constant=name != "correction_bias",
    )

    def topk() -> None:
        cublas.activation_topk(logits, bias, 6, 1.5, *outputs, options=options)

    expected = []
    for value in (old, new):
        target.copy_(value)
        torch.cuda.synchronize()
        topk()
        expected.append((outputs[0].clone(), outputs[1].clone()))
    assert not same(*expected)
    for _ in range(20):
        for value, wanted in zip((old, new), expected, strict=True):
            outputs[1].fill_(-7)
            write_late(target, value)
            topk()
            torch.cuda.synchronize()
            assert same(outputs, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_consumer_sees_the_outputs(form: str, seed: int) -> None:
    """A dependent launch behind ours, which waits as it must, reads the new outputs although we let it in early."""
    call = Call(form, 64, seed)
    call()
    expected = call.copy_of_outputs()
    received = torch.empty_like(expected[0])
    for _ in range(100):
        call.poison()
        received.zero_()
        call()
        write_late(received, call.outputs[0], nanoseconds=0)
        torch.cuda.synchronize()
        assert torch.equal(received, expected[0])


@pytest.mark.parametrize("form", FORMS)
def test_options_of_the_launch_change_no_bits(form: str, seed: int) -> None:
    call = Call(form, 100, seed)
    call()
    expected = call.copy_of_outputs()
    for launch_with_pdl in (False, True):
        for weights_are_constant in (False, True):
            call.poison()
            call(launch_with_pdl=launch_with_pdl, weights_are_constant=weights_are_constant)
            assert same(call.outputs, expected)


@pytest.mark.parametrize("form", HASH_FORMS)
def test_long_chain_of_dependent_launches(form: str, seed: int) -> None:
    """Each call reads token ids that the kernel before it writes: 200 links in one graph, replayed 20 times."""
    call, other = Call(form, 16, seed), Call(form, 16, seed + 1)
    target = call.hash.token_ids
    sources = [target.clone(), other.hash.token_ids.clone()]
    links = [poisoned(16) for _ in range(200)]
    expected = []
    for source in sources:
        target.copy_(source)
        call()
        expected.append(call.copy_of_outputs())
    assert not same(*expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i, outputs in enumerate(links):
            write_late(target, sources[i % 2], nanoseconds=1000)
            call.outputs = outputs
            call()
    for _ in range(20):
        for outputs in links:
            outputs[1].fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same(outputs, expected[i % 2]) for i, outputs in enumerate(links))


def test_results_are_right_and_not_only_equal(seed: int) -> None:
    dense = Call("dense", 64, seed)
    assert compare_dense(dense.dense, 6, 1.5, *dense()).ok
    scored = Call("hidden", 64, seed)
    assert compare_hash(scored.hash, 6, 1.5, *scored(routed_scaling_factor=1.5)).ok
