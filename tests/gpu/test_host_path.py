# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The short way of eager calls of two launches, and the memory that it keeps for each stream."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from routing_helpers import Outputs
from routing_helpers import poisoned_on_gpu as poisoned

import dsv4_router
from dsv4_router.backends import cublas, cublaslt, cuda_module, decode
from dsv4_router.config import V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.testing import compare_dense, make_dense_inputs, make_hash_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if cublaslt.missing_library() is not None:
        pytest.skip(f"there is no short way here: {cublaslt.missing_library()}")
    monkeypatch.setattr(cublas, "remembered", {})
    yield
    torch.cuda.synchronize()


class Call:
    """A call on inputs of its own, what it gives by the long way, and how often it gave something else."""

    def __init__(self, config: RouterConfig, num_tokens: int, seed: int, backend: str = "cublas") -> None:
        self.config, self.backend = config, backend
        self.inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
        self.outputs = poisoned(num_tokens, config.top_k)
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self()  # the first of its shape and stream
        assert compare_dense(self.inputs, config.top_k, config.routed_scaling_factor, *self.outputs).ok
        self.expected = self.outputs[0].clone(), self.outputs[1].clone()
        torch.cuda.synchronize()

    def __call__(self, outputs: Outputs | None = None, **options: Any) -> None:
        """The tensors may belong to another stream: all calls are synchronised before memory is freed."""
        options = {"backend": self.backend} | options
        outputs = self.outputs if outputs is None else outputs
        dsv4_router.dense_router_dispatch(
            *self.inputs, self.config.top_k, self.config.routed_scaling_factor, *outputs, **options
        )

    def poison(self) -> None:
        self.outputs[0].fill_(9e9)
        self.outputs[1].fill_(-7)

    def check(self, expected: Outputs | None = None) -> None:
        """Counts what differs, on the device."""
        for got, wanted in zip(self.outputs, self.expected if expected is None else expected, strict=True):
            self.wrong += (got.view(torch.int32) != wanted.view(torch.int32)).sum()

    def poisoned_and_checked(self, **options: Any) -> None:
        self.poison()
        self(**options)
        self.check()


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call that takes the long way."""
    found: list[int] = []

    def noted(route: Callable[..., None], operands: Any, *rest: Any) -> None:
        found.append(operands[0].shape[0])
        route(operands, *rest)

    for module in (cublas, decode):
        monkeypatch.setattr(module, "route", partial(noted, module.route))
    return found


def captured(work: Callable[[], object], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


class _Memory:
    """Tells torch of device memory that it did not make."""

    def __init__(self, address: int, numbers: int) -> None:
        data = {"shape": (numbers,), "typestr": "<f4", "data": (address, False), "version": 3}
        self.__cuda_array_interface__ = data


def memory_of_this_stream(num_experts: int) -> torch.Tensor:
    """The memory for partial logits that calls on the current stream use."""
    (memory,) = cublas._free[0, torch.cuda.current_stream().cuda_stream, num_experts]
    return torch.as_tensor(_Memory(memory.address, 8 * 1024 * num_experts), device="cuda")


@pytest.mark.parametrize("config", [V4_FLASH, V4_PRO, RouterConfig(2048, 132, 4, 1.5)])
@pytest.mark.parametrize("num_tokens", [1, 16, 100, 1024])
def test_whatever_the_memory_holds(config: RouterConfig, num_tokens: int, seed: int, long_ways: list[int]) -> None:
    call = Call(config, num_tokens, seed)
    assert long_ways == [num_tokens]
    memory = memory_of_this_stream(config.num_experts)
    for value in (torch.nan, torch.inf, 0.0, -3e38):
        memory.fill_(value)
        for pdl in (False, True):
            call.poisoned_and_checked(launch_with_pdl=pdl)
    assert long_ways == [num_tokens]
    assert int(call.wrong) == 0


@pytest.mark.parametrize("num_tokens", [16, 1024])
@pytest.mark.parametrize("pdl", [False, True])
def test_calls_that_follow_each_other_share_memory(num_tokens: int, pdl: bool, seed: int, long_ways: list[int]) -> None:
    """The product of each call overwrites what the top-k before it read; shapes and inputs take turns."""
    calls = [Call(V4_PRO, num_tokens, seed), Call(V4_PRO, num_tokens, seed + 1), Call(V4_PRO, 3, seed)]
    long_ways.clear()
    rounds = [[poisoned(call.outputs[0].shape[0], call.config.top_k) for call in calls] for _ in range(200)]
    for outputs in rounds:
        for call, mine in zip(calls, outputs, strict=True):
            call(mine, launch_with_pdl=pdl)
    assert not long_ways
    for outputs in rounds:
        for call, mine in zip(calls, outputs, strict=True):
            call.outputs = mine
            call.check()
    assert [int(call.wrong) for call in calls] == [0, 0, 0]


@pytest.mark.usefixtures("served_by_dense_logits")
@pytest.mark.parametrize("pdl", [False, True])
def test_both_paths_share_memory(pdl: bool, seed: int, long_ways: list[int]) -> None:
    """The decode path of more rows has the same short way: products and top-ks of both take turns in one place."""
    calls = [
        Call(V4_FLASH, num_tokens, seed + i, backend)
        for i, (num_tokens, backend) in enumerate(((300, "decode"), (300, "cublas"), (900, "decode"), (129, "decode")))
    ]
    assert long_ways == [300, 300, 900, 129]
    memory = memory_of_this_stream(V4_FLASH.num_experts)
    for i in range(200):
        if i % 5 == 0:
            memory.fill_(torch.nan)
        for call in calls:
            call.poisoned_and_checked(launch_with_pdl=pdl)
    assert len(long_ways) == len(calls)
    assert [int(call.wrong) for call in calls] == [0] * len(calls)


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_changed_inputs_are_seen(num_tokens: int, seed: int, long_ways: list[int]) -> None:
    call, other = Call(V4_FLASH, num_tokens, seed), Call(V4_FLASH, num_tokens, seed + 1)
    originals = [tensor.clone() for tensor in call.inputs]
    long_ways.clear()
    for _ in range(50):
        for sources, expected in ((other.inputs, other.expected), (originals, call.expected)):
            for tensor, source in zip(call.inputs, sources, strict=True):
                tensor.copy_(source)
            call.poison()
            call(weights_are_constant=False)
            call.check(expected)
    assert not long_ways
    assert int(call.wrong) == 0


def test_a_call_between_the_launches_of_another(seed: int, long_ways: list[int]) -> None:
    """As a second thread on the same stream could make it: it goes the long way, with memory of its own."""
    outer, inner = Call(V4_FLASH, 16, seed), Call(V4_FLASH, 16, seed + 1)
    ((key, again),) = cublas.remembered.items()
    long_ways.clear()

    def product(*numbers: Any) -> None:
        again.products[0](*numbers)
        cublas.remembered[key] = again
        inner.poisoned_and_checked()

    for _ in range(20):
        cublas.remembered[key] = again._replace(products=[product] * 4)
        outer.poisoned_and_checked()
    assert long_ways == [16] * 20
    assert (int(outer.wrong), int(inner.wrong)) == (0, 0)


def in_threads(*work: Callable[[], None]) -> None:
    """Runs each function in a thread, all at once, and raises what one of them raised."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(work))

    def guarded(each: Callable[[], None]) -> None:
        try:
            ready.wait(60)
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("same_stream", [True, False])
@pytest.mark.parametrize("num_threads", [2, 8])
def test_threads_at_once(same_stream: bool, num_threads: int, seed: int) -> None:
    calls = [Call(V4_FLASH, 16 + i % 2, seed + i) for i in range(num_threads)]
    switch_interval = sys.getswitchinterval()

    def work(call: Call) -> Callable[[], None]:
        stream = torch.cuda.current_stream() if same_stream else torch.cuda.Stream()

        def repeated() -> None:
            with torch.cuda.stream(stream):
                for _ in range(300):
                    call.poisoned_and_checked()

        return repeated

    sys.setswitchinterval(1e-5)
    try:
        in_threads(*map(work, calls))
    finally:
        sys.setswitchinterval(switch_interval)
    torch.cuda.synchronize()
    assert [int(call.wrong) for call in calls] == [0] * num_threads


def test_streams_at_once(seed: int, long_ways: list[int]) -> None:
    """One thread, and memory for each stream: products of one stream run beside the top-k of another."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    calls = [Call(V4_PRO, 200, seed + i) for i in range(4)]
    torch.cuda.synchronize()
    for _ in range(100):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                call.poisoned_and_checked()
    torch.cuda.synchronize()
    assert [int(call.wrong) for call in calls] == [0] * 4
    assert len(long_ways) == 1 + len({stream.cuda_stream for stream in streams})
    memories = [cublas._free[0, stream.cuda_stream, V4_PRO.num_experts][0].address for stream in streams]
    assert len(set(memories)) == len({stream.cuda_stream for stream in streams})


@pytest.mark.parametrize("num_tokens", [1, 16, 1000])
def test_replays_between_eager_calls(num_tokens: int, seed: int, long_ways: list[int]) -> None:
    """On one stream; a captured call goes the long way although its shape is remembered, so a graph shares nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager, other = Call(V4_FLASH, num_tokens, seed), Call(V4_FLASH, num_tokens, seed + 1)
        replayed = Call(V4_FLASH, num_tokens, seed + 2)
        for tensor, source in zip(other.inputs[1:], replayed.inputs[1:], strict=True):
            tensor.copy_(source)
        other.poison()
        other()
        originals, changed = (replayed.inputs[0].clone(), replayed.expected), (other.inputs[0], other.outputs)
        memory = memory_of_this_stream(V4_FLASH.num_experts)
        long_ways.clear()
        graph = captured(lambda: [replayed(), replayed()], stream)
        assert long_ways == [num_tokens] * 2
        for i in range(100):
            source, expected = (originals, changed)[i % 2]
            replayed.inputs[0].copy_(source)
            replayed.poison()
            eager.poison()
            eager()
            graph.replay()
            if i % 3 == 0:
                memory.fill_(torch.nan)
            eager()
            replayed.check(expected)
            eager.check()
        assert long_ways == [num_tokens] * 2
    torch.cuda.synchronize()
    assert (int(eager.wrong), int(replayed.wrong)) == (0, 0)


def test_without_memory_for_the_stream(seed: int, long_ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "allocate", lambda num_bytes: 0)
    monkeypatch.setattr(cublas, "_free", {})
    call = Call(V4_FLASH, 16, seed)
    for _ in range(3):
        call.poisoned_and_checked()
    assert long_ways == [16] * 4
    assert int(call.wrong) == 0


def test_the_memory_is_not_taken_from_torch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there any for a call: torch's allocator, whose pools may be a graph's, is not asked."""
    monkeypatch.setattr(cublas, "_free", {})
    call = Call(V4_FLASH, 16, seed)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    ((memory,),) = cublas._free.values()
    for segment in torch.cuda.memory_snapshot():
        assert not 0 <= memory.address - segment["address"] < segment["total_size"]


_FIRST_CALL = """
import torch
import dsv4_router
from dsv4_router.backends import cublas
from dsv4_router.testing import compare_dense, make_dense_inputs, make_hash_inputs
inputs = make_dense_inputs(dsv4_router.V4_FLASH, 9, seed=1, device="cuda")
weights, ids = torch.full((9, 6), 9e9, device="cuda"), torch.full((9, 6), -7, dtype=torch.int32, device="cuda")
def call():
    dsv4_router.dense_router_dispatch(*inputs, 6, 1.5, weights, ids, backend="cublas")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call()
    call()
assert (ids == -7).all(), "the call was not captured but made"
assert not cublas.remembered and not cublas._free
for work in (graph.replay, call, call, graph.replay):
    weights.fill_(9e9)
    ids.fill_(-7)
    work()
    torch.cuda.synchronize()
    print(compare_dense(inputs, 6, 1.5, weights, ids))
assert len(cublas.remembered) == 1
"""


def test_the_first_call_of_a_process_may_be_captured() -> None:
    done = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:2] for line in done.stdout.splitlines()] == ["ok"] * 4, done.stdout


@pytest.mark.parametrize("form", ["ids", "logits", "hidden"])
def test_the_first_cuda_call_of_a_thread(form: str, seed: int) -> None:
    inputs = make_hash_inputs(V4_FLASH, 5, seed=seed, device="cuda")
    source = {
        "ids": {},
        "logits": {"router_logits": inputs.hidden_states.float() @ inputs.gate_weight.float().T},
        "hidden": {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight},
    }[form]
    outputs = [torch.full((5, 6), 9e9, device="cuda") for _ in range(2)]
    ids = [torch.full((5, 6), -7, dtype=torch.int32, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def route(i: int) -> None:
        try:
            dsv4_router.hash_router_dispatch(inputs.token_ids, inputs.hash_lut, 6, outputs[i], ids[i], **source)
        except BaseException as error:
            failures.append(error)

    route(0)
    thread = threading.Thread(target=route, args=(1,))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(ids[1], ids[0])
    assert int(ids[0].min()) >= 0
