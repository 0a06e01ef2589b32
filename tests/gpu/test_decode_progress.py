# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``decode`` path under load: streams, graphs, workspaces, dependent launches, and few SMs to run on."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from routing_helpers import compiled_for_test, write_late

import dsv4_router
from dsv4_router import decode_config, dispatch
from dsv4_router.arguments import NO_OPTIONS
from dsv4_router.backends import cublas, cuda_module, decode, workspaces
from dsv4_router.config import V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.profiling.splits import Way
from dsv4_router.testing import DenseInputs, compare_dense, make_dense_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("served_by_decode")]

SMALL = RouterConfig(1088, 132, 4, 1.0)
# That a test of forward progress may take; processes that share a GPU get slices of its time.
SECONDS = 60 * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


class Call:
    """Decode calls on inputs of one's own, into ``copies`` places, in one piece of memory that compares at once."""

    def __init__(self, config: RouterConfig, num_tokens: int, seed: int, copies: int = 1) -> None:
        self.config, self.num_tokens = config, num_tokens
        self.inputs = make_dense_inputs(config, num_tokens, seed=seed, device="cuda")
        self.memory = torch.empty(copies, 2, num_tokens, config.top_k, dtype=torch.int32, device="cuda")
        self.outputs = [(weights.view(torch.float32), ids) for weights, ids in self.memory]
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.kept_for_graph: torch.Tensor | None = None  # a graph does not keep what it reads
        self.poison()

    def __call__(self, copy: int = 0, **options: Any) -> None:
        options = {"backend": "decode"} | options
        factor = self.config.routed_scaling_factor
        dsv4_router.dense_router_dispatch(*self.inputs, self.config.top_k, factor, *self.outputs[copy], **options)

    def with_looks(self, max_looks: int) -> None:
        """Rows are computed by their owners alone after so many looks at the other blocks' sums."""
        operands = *self.inputs, self.config.top_k, self.config.routed_scaling_factor, *self.outputs[0]
        decode.route(operands, None, NO_OPTIONS, max_looks)

    def poison(self) -> None:
        self.memory.fill_(-7)

    def expected(self) -> torch.Tensor:
        """What is in a place after a call, which float64 confirms."""
        self.poison()
        self()
        result = compare_dense(self.inputs, self.config.top_k, self.config.routed_scaling_factor, *self.outputs[0])
        assert result.ok, result
        return self.memory[0].clone()

    def check(self, expected: torch.Tensor) -> None:
        """Counts what differs, on the device."""
        self.wrong += (self.memory != expected).sum()

    def decode_config(self) -> decode_config.DecodeConfig:
        sizes = self.config.hidden_size, self.config.num_experts, self.config.top_k
        architecture = dispatch.architecture(torch.cuda.get_device_capability())
        return decode_config.variant(*sizes, decode_config.token_tile(self.num_tokens), architecture)


def captured(work: Callable[[], object], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def captured_launches(call: Call, stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """A graph of a launch into each place, poisoned before and compared after."""
    expected = call.kept_for_graph = call.expected()

    def launches() -> None:
        call.poison()
        for copy in range(len(call.outputs)):
            call(copy)
        call.check(expected)

    torch.cuda.synchronize()
    graph = captured(launches, stream)
    graph.replay()  # so that nothing is loaded or allocated later
    torch.cuda.synchronize()
    return graph


# Repetition under load.


@pytest.mark.parametrize(("config", "num_tokens"), [(V4_PRO, 16), (V4_FLASH, 1), (V4_FLASH, 100)])
def test_ten_thousand_repetitions_under_changing_load(config: RouterConfig, num_tokens: int, seed: int) -> None:
    call, choose = Call(config, num_tokens, seed), random.Random(seed)
    expected = call.expected()
    busy = torch.cuda.Stream()
    loads = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for size in (128, 512, 1024, 2048, 4096)]
    for i in range(10000):
        if i % 4 == 0:
            with torch.cuda.stream(busy):
                load = choose.choice(loads)
                torch.mm(load, load)
        call.poison()
        call()
        call.check(expected)
        if i % 1000 == 999:
            torch.cuda.synchronize()
    assert int(call.wrong) == 0


@pytest.mark.parametrize("config", [V4_FLASH, SMALL])
def test_sixteen_streams_at_once(config: RouterConfig, seed: int) -> None:
    """Eager calls of all token tiles, some without the others' sums."""
    calls = [Call(config, 1 + 8 * i, seed + i) for i in range(16)]
    expected = [call.expected() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for i in range(50):
        for call, stream, wanted in zip(calls, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                call.poison()
                call.with_looks((i + call.num_tokens) % 3 * 32)
                call.check(wanted)
    torch.cuda.synchronize()
    assert sum(int(call.wrong) for call in calls) == 0


# Graphs.


@pytest.mark.parametrize("num_tokens", [1, 33, 128])
def test_graph_replays_see_changed_inputs(num_tokens: int, seed: int) -> None:
    call, other = Call(V4_FLASH, num_tokens, seed), Call(V4_FLASH, num_tokens, seed + 1)
    originals = [tensor.clone() for tensor in call.inputs]
    expected = call.expected(), other.expected()
    torch.cuda.synchronize()
    graph = captured(call)
    for _ in range(3):
        for sources, wanted in ((other.inputs, expected[1]), (originals, expected[0])):
            for tensor, source in zip(call.inputs, sources, strict=True):
                tensor.copy_(source)
            call.poison()
            graph.replay()
            call.check(wanted)
    assert int(call.wrong) == 0


@pytest.mark.parametrize("config", [V4_FLASH, V4_PRO])
def test_a_hundred_thousand_replays(config: RouterConfig, seed: int) -> None:
    call = Call(config, 4, seed, copies=100)
    graph = captured_launches(call)
    for _ in range(1000):
        graph.replay()
    assert int(call.wrong) == 0


def test_graphs_of_one_capture_stream_replayed_at_once(seed: int) -> None:
    """Four graphs, captured one after the other, replayed on streams of their own beside eager calls."""
    calls = [Call(V4_FLASH, 3 + i, seed + i, copies=20) for i in range(4)]
    graphs = [captured_launches(call) for call in calls]
    eager = Call(V4_FLASH, 9, seed)
    expected = eager.expected()
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(200):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager.poison()
        eager()
        eager.check(expected)
    torch.cuda.synchronize()
    assert sum(int(call.wrong) for call in (*calls, eager)) == 0


def test_replays_between_eager_calls_of_the_same_stream(seed: int) -> None:
    """A graph may be replayed on any stream, also where calls have used the stream's own workspace."""
    call, eager = Call(V4_FLASH, 5, seed, copies=3), Call(V4_FLASH, 6, seed + 1)
    graph, expected = captured_launches(call), eager.expected()
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            for _ in range(200):
                eager.poison()
                eager()
                graph.replay()
                eager.check(expected)
        torch.cuda.synchronize()
    assert int(call.wrong) + int(eager.wrong) == 0


# Workspaces.


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The workspaces that launches get, in the order of the launches."""
    found: list[int] = []
    address = workspaces.address

    def noted(device_index: int, stream: int, num_bytes: int) -> int:
        found.append(address(device_index, stream, num_bytes))
        return found[-1]

    monkeypatch.setattr(workspaces, "address", noted)
    return found


@pytest.fixture
def new_stream() -> torch.cuda.Stream:
    """A stream that nothing has used. It is kept, since its handle may have a spoilt workspace."""
    from cuda.bindings import driver

    torch.cuda.synchronize()
    (handle,) = cuda_module.checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
    return torch.cuda.ExternalStream(int(handle))


def test_every_stream_and_every_capture_has_a_workspace(given: list[int], seed: int) -> None:
    call = Call(V4_FLASH, 2, seed)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            call()
            call()
    assert given[::2] == given[1::2]
    assert len(set(given)) == 3
    torch.cuda.synchronize()
    graphs = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), None):
        graphs.append(captured(lambda: [call(), call()], stream))
    assert given[6::2] == given[7::2]
    assert len(set(given)) == 6


def test_a_capture_may_need_more_memory_later(given: list[int], seed: int) -> None:
    calls = [Call(V4_FLASH, num_tokens, seed, copies=2) for num_tokens in (1, 128, 40)]
    expected = [call.expected() for call in calls]
    torch.cuda.synchronize()
    given.clear()
    graph = captured(lambda: [call(copy) for copy in range(2) for call in calls])
    assert len(set(given)) <= 2
    for _ in range(50):
        for call in calls:
            call.poison()
        graph.replay()
        for call, wanted in zip(calls, expected, strict=True):
            call.check(wanted)
    assert sum(int(call.wrong) for call in calls) == 0


def told(workspace: Any) -> bool:
    """Whether CUDA has posted the semaphore, which stays as it is."""
    value = ctypes.c_int()
    workspaces._libc().sem_getvalue(workspace.graph_gone, ctypes.byref(value))
    return value.value > 0


def test_the_workspace_of_a_graph_that_is_gone_is_used_again(given: list[int], seed: int) -> None:
    call = Call(V4_FLASH, 2, seed)
    call.expected()
    given.clear()
    before = len(workspaces._captured)
    for _ in range(20):
        graph = captured(call)
        memory = bytes_at(given[-1], call.decode_config().workspace_bytes)
        assert not memory.any(), "what an unfinished launch left could be taken for a later replay's"
        graph.replay()
        memory.fill_(1)
        torch.cuda.synchronize()
        (workspace,) = (known for known in workspaces._captured if known.address == given[-1])
        del graph
        wait_until(lambda known=workspace: told(known), time.monotonic() + 20, "CUDA's word of the graph's end")
    assert len(workspaces._captured) - before <= 3
    assert len(set(given)) <= 10


def test_the_first_call_of_a_stream_may_be_captured(new_stream: torch.cuda.Stream, seed: int) -> None:
    call = Call(V4_FLASH, 7, seed)
    expected = call.expected()
    torch.cuda.synchronize()
    graph = captured(call, new_stream)
    call.poison()
    graph.replay()
    call.check(expected)
    torch.cuda.synchronize()
    with torch.cuda.stream(new_stream):
        call.poison()
        call()
        call.check(expected)
    torch.cuda.synchronize()
    assert int(call.wrong) == 0


def run(script: str, *arguments: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


_FIRST_CALL = """
import torch
import dsv4_router
from dsv4_router.testing import compare_dense, make_dense_inputs
inputs = make_dense_inputs(dsv4_router.V4_FLASH, 9, seed=1, device="cuda")
weights, ids = torch.full((9, 6), 9e9, device="cuda"), torch.full((9, 6), -7, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    dsv4_router.dense_router_dispatch(*inputs, 6, 1.5, weights, ids, backend="decode")
assert (ids == -7).all(), "the call was not captured but made"
graph.replay()
torch.cuda.synchronize()
print(compare_dense(inputs, 6, 1.5, weights, ids))
"""


def test_the_first_call_of_a_process_may_be_captured() -> None:
    assert run(_FIRST_CALL).startswith("ok")


_SECOND_PROCESS = """
import sys
import time
import torch, tvm_ffi
import cutlass.base_dsl.env_manager, cutlass.cute
import cutlass._mlir._mlir_libs._cutlass_ir._execution_engine
from dsv4_router.backends import decode
from dsv4_router.decode_config import DecodeConfig
def refuse(*args):
    raise AssertionError("the disk cache should have this kernel")
decode.compile_object = refuse
start = time.process_time()
decode.link(decode.object_code(DecodeConfig(4096, 256, 6, 16), sys.argv[1]))
print(time.process_time() - start)
"""


def test_a_second_process_loads_in_a_tenth_of_a_second() -> None:
    """Of processor time, without the imports. A busy machine gets three attempts."""
    target = dispatch.architecture(torch.cuda.get_device_capability())
    decode.object_code(decode_config.DecodeConfig(4096, 256, 6, 16), target)
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 0.1:
        seconds.append(float(run(_SECOND_PROCESS, target)))
    assert min(seconds) < 0.1, seconds


class _Memory:
    """Tells torch of device memory that it did not make."""

    def __init__(self, address: int, num_bytes: int) -> None:
        data = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        self.__cuda_array_interface__ = data


def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    memory = torch.as_tensor(_Memory(address, num_bytes), device="cuda")
    assert memory.data_ptr() == address
    return memory


def workspace_of(call: Call, given: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The bytes of the current stream's workspace, its counter for this call, and by how much a launch advances it."""
    config = call.decode_config()
    call()
    memory = bytes_at(given[-1], config.workspace_bytes)
    counter = memory.view(torch.int64)[config.num_blocks]
    before = int(counter)
    call()
    assert int(counter) - before == config.num_blocks
    return memory, counter, config.num_blocks


@pytest.mark.parametrize("config", [V4_FLASH, SMALL])
@pytest.mark.parametrize("num_tokens", [1, 16, 100])
@pytest.mark.parametrize("header", [decode_config.HEADER_BYTES, 0])
def test_garbage_in_a_workspace(
    config: RouterConfig, num_tokens: int, header: int, new_stream: torch.cuda.Stream, given: list[int], seed: int
) -> None:
    """In the packets alone, or in the ticket counter too, which makes every row wait in vain: slower, but right."""
    call = Call(config, num_tokens, seed)
    expected = call.expected()
    torch.cuda.synchronize()
    with torch.cuda.stream(new_stream):
        memory, _, _ = workspace_of(call, given)
        for _ in range(20):
            memory[header:].random_()
            for _ in range(3):
                call.poison()
                call()
                call.check(expected)
        torch.cuda.synchronize()
    assert int(call.wrong) == 0


@pytest.mark.parametrize("config", [V4_FLASH, SMALL])
@pytest.mark.parametrize("bits", [decode_config.EPOCH_BITS, 64])
def test_epochs_wrap_around(
    config: RouterConfig, bits: int, new_stream: torch.cuda.Stream, given: list[int], seed: int
) -> None:
    """Of the epoch in a tag, and of the counter of tickets."""
    calls = [Call(config, 12, seed + i) for i in range(2)]
    expected = [call.expected() for call in calls]
    torch.cuda.synchronize()
    with torch.cuda.stream(new_stream):
        _, counter, step = workspace_of(calls[0], given)
        start = -2 * step if bits == 64 else ((1 << bits) - 2) * step
        counter.fill_(start)
        for i in range(10):
            calls[i % 2].poison()
            calls[i % 2]()
            calls[i % 2].check(expected[i % 2])
        assert int(counter) == start + 10 * step
    assert sum(int(call.wrong) for call in calls) == 0


@pytest.mark.parametrize("config", [V4_FLASH, SMALL])
def test_after_an_aborted_launch(
    config: RouterConfig, new_stream: torch.cuda.Stream, given: list[int], seed: int
) -> None:
    """Some blocks took no ticket, and packets of other inputs with the epoch of the next tickets lie in their places.

    From then on the blocks of a launch are in two epochs, so owners compute rows alone.
    """
    call, aborted = Call(config, 12, seed), Call(config, 12, seed + 1)
    expected = call.expected()
    torch.cuda.synchronize()
    with torch.cuda.stream(new_stream):
        _, counter, step = workspace_of(aborted, given)
        for missing in (1, step // 2, step - 1, step):
            aborted()
            counter -= missing
            for _ in range(3):
                call.poison()
                call()
                call.check(expected)
        torch.cuda.synchronize()
    assert int(call.wrong) == 0


# Dependent launches.


LATE = ("hidden_states", "gate_weight", "correction_bias", "token_mask", "num_valid_tokens")
CONSTANTS = ("gate_weight", "correction_bias")


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize(("num_tokens", "left"), [(4, 0), (8, 0), (100, 0), (200, 0), (300, 0), (300, 44)])
def test_dependent_launch_waits_for_what_it_reads(
    name: str, num_tokens: int, left: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel before triggers at once and writes 20 us later; without the wait, the old values would be read.

    Of more rows than a launch takes, the last ones may be left to the decode kernel. The weights may only change with
    ``weights_are_constant=False``; all else may change at any time.
    """
    if left:
        monkeypatch.setattr(decode, "fastest", Way(0, "halves", left).choose)
        monkeypatch.setattr(cublas, "remembered", {})
    call, other = Call(SMALL, num_tokens, seed), Call(SMALL, num_tokens, seed + 1)
    mask = torch.arange(num_tokens, device="cuda") % 3 != 0
    count = torch.tensor([3], dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"weights_are_constant": name not in CONSTANTS}
    if name == "token_mask":
        target, new = mask, ~mask
    elif name == "num_valid_tokens":
        target, new = count, count + 3
    else:
        target, new = getattr(call.inputs, name), getattr(other.inputs, name)
    options |= {name: target} if name not in call.inputs._fields else {}
    old, expected = target.clone(), []
    for value in (old, new):
        target.copy_(value)
        torch.cuda.synchronize()
        call.poison()
        call(**options)
        expected.append(call.memory.clone())
    assert not torch.equal(*expected), "both values give one result: this test would prove nothing"
    for _ in range(20):
        for value, wanted in zip((old, new), expected, strict=True):
            call.poison()
            write_late(target, value)
            call(**options)
            torch.cuda.synchronize()
            assert torch.equal(call.memory, wanted)


@pytest.mark.parametrize("max_looks", [decode.MAX_LOOKS, 0])
@pytest.mark.parametrize("num_tokens", [1, 8, 128])
def test_the_next_kernel_may_overwrite_the_inputs(max_looks: int, num_tokens: int, seed: int) -> None:
    """It is let in early, and waits as it must; rows that are computed alone are read until the very end."""
    call, other = Call(V4_FLASH, num_tokens, seed), Call(V4_FLASH, num_tokens, seed + 1)
    expected, hidden_states = call.expected(), call.inputs.hidden_states.clone()
    for _ in range(50):
        call.inputs.hidden_states.copy_(hidden_states)
        call.poison()
        call.with_looks(max_looks)
        write_late(call.inputs.hidden_states, other.inputs.hidden_states, nanoseconds=0)
        call.check(expected)
    assert int(call.wrong) == 0


def test_a_consumer_sees_the_outputs(seed: int) -> None:
    call = Call(V4_FLASH, 64, seed)
    expected = call.expected()
    received = torch.empty_like(call.memory)
    for _ in range(100):
        call.poison()
        received.zero_()
        call()
        write_late(received, call.memory, nanoseconds=0)
        call.wrong += (received != expected).sum()
    assert int(call.wrong) == 0


@pytest.mark.parametrize("num_tokens", [1, 8, 16])
def test_launches_with_cold_and_with_warm_gate_weights(num_tokens: int, seed: int) -> None:
    """Dependents are let in at once where a block's gate weight comes late, and else later: blocks of one launch, too,
    may differ. 60 launches in a graph: 20 weights, more than L2 holds, in turn, and then each of two 20 times.
    """
    call = Call(V4_PRO, num_tokens, seed, copies=60)
    hidden_states, gate_weight, bias = call.inputs
    assert 20 * gate_weight.nbytes > torch.cuda.get_device_properties(0).L2_cache_size
    inputs = [
        DenseInputs(hidden_states, torch.roll(gate_weight, shift, 0), torch.roll(bias, shift)) for shift in range(20)
    ]
    expected = []
    for each in inputs:
        call.inputs = each
        expected.append(call.expected())
    assert not torch.equal(expected[0], expected[1])
    turns = [*range(20), *[0] * 20, *[1] * 20]

    def launches() -> None:
        call.poison()
        for copy, turn in enumerate(turns):
            call.inputs = inputs[turn]
            call(copy)
        call.check(all_expected)

    all_expected = torch.stack([expected[turn] for turn in turns])

    torch.cuda.synchronize()
    graph = captured(launches)
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    assert int(call.wrong) == 0


def test_long_chain_of_dependent_launches(seed: int) -> None:
    """Each call reads hidden states that the kernel before it writes: 200 links in one graph, replayed 20 times."""
    call, other = Call(SMALL, 4, seed, copies=200), Call(SMALL, 4, seed + 1)
    sources = call.inputs.hidden_states.clone(), other.inputs.hidden_states
    expected = []
    for source in sources:
        call.inputs.hidden_states.copy_(source)
        call()
        expected.append(call.memory[0].clone())
    assert not torch.equal(*expected)

    def links() -> None:
        call.poison()
        for copy in range(200):
            write_late(call.inputs.hidden_states, sources[copy % 2], nanoseconds=1000)
            call(copy)
        call.check(all_expected)

    all_expected = torch.stack(expected * 100)
    torch.cuda.synchronize()
    graph = captured(links)
    for _ in range(20):
        graph.replay()
    assert int(call.wrong) == 0


# Forward progress: no launch needs more than one block on the GPU at a time.

# One block an SM, beside which no block of the decode kernel has shared memory left. flags[0] sends all away.
_HOLD = """
extern "C" __global__ void hold(volatile int* flags, long long nanoseconds) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  flags[1 + blockIdx.x] = 1;
  __threadfence_system();
  do {
    __nanosleep(500);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (flags[0] == 0 && now - start < (unsigned long long)nanoseconds);
  flags[1 + blockIdx.x] = 2;
}
"""
_HOLD_BYTES = 220 * 1024


@cache
def hold_kernel() -> Any:
    from cuda.bindings import driver

    kernel = compiled_for_test(_HOLD, "hold")
    largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    device = torch.cuda.current_device()
    cuda_module.checked(driver.cuKernelSetAttribute(largest, _HOLD_BYTES, kernel.handle, device))
    return kernel


def hold(flags: torch.Tensor, stream: torch.cuda.Stream, nanoseconds: int) -> None:
    """Holds as many SMs as ``flags``, pinned memory, has places behind the first: until that is set, or the time."""
    import cuda.core

    config = cuda.core.LaunchConfig(grid=flags.numel() - 1, block=1, shmem_size=_HOLD_BYTES)
    handle = cuda.core.Stream.from_handle(stream.cuda_stream)
    cuda.core.launch(handle, config, hold_kernel(), flags.data_ptr(), nanoseconds)


def wait_until(done: Callable[[], bool], deadline: float, what: str) -> None:
    while not done():
        assert time.monotonic() < deadline, f"{what} took too long"
        time.sleep(0.001)


def num_sms() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@contextmanager
def held_sms(count: int, deadline: float) -> Iterator[Callable[[], bool]]:
    """Within, somebody else's kernel holds that many SMs; the value tells whether it still holds all of them.

    Nothing is put behind that kernel in its stream meanwhile: such a command might keep other streams waiting, too.
    """
    flags = torch.zeros(1 + count, dtype=torch.int32, pin_memory=True)
    stream = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    hold(flags, stream, int((deadline - time.monotonic() + 5) * 1e9))

    def all_held() -> bool:
        return bool((flags[1:] == 1).all())

    try:
        wait_until(all_held, deadline, "taking the SMs")
        yield all_held
    finally:
        flags[0] = 1
        stream.synchronize()


@cache
def sixteen_graphs() -> tuple[list[Call], list[torch.cuda.CUDAGraph]]:
    """Of 50 launches each, of 1 to 8 rows, for two models."""
    calls = [Call((V4_FLASH, V4_PRO)[i % 2], 1 + i // 2, i, copies=50) for i in range(16)]
    return calls, [captured_launches(call) for call in calls]


def replay_all(graphs: list[torch.cuda.CUDAGraph], streams: list[torch.cuda.Stream], deadline: float) -> None:
    """Replays each graph on a stream of its own, at once, and waits for all; never longer than the deadline."""
    for graph, stream in zip(graphs, streams, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    events = [stream.record_event() for stream in streams]
    wait_until(lambda: all(event.query() for event in events), deadline, "a round of launches")


@pytest.mark.parametrize(("num_free", "rounds"), [(20, 20), (2, 4), (1, 2)])
def test_progress_on_the_few_sms_that_another_kernel_leaves(num_free: int, rounds: int) -> None:
    """Sixteen streams, 800 launches a round: 20,800 in all. The other kernel stays until the last has ended."""
    deadline = time.monotonic() + SECONDS
    calls, graphs = sixteen_graphs()
    streams = [torch.cuda.Stream() for _ in graphs]
    replay_all(graphs, streams, deadline)
    with held_sms(num_sms() - num_free, deadline) as all_held:
        for _ in range(rounds):
            replay_all(graphs, streams, deadline)
        assert all_held()
    assert sum(int(call.wrong) for call in calls) == 0


@pytest.mark.parametrize("config", [V4_FLASH, V4_PRO])
def test_rows_of_a_launch_on_a_gpu_of_few_sms(config: RouterConfig, seed: int) -> None:
    """Of as many rows as such a GPU takes, no owner waits in vain. Of more, all blocks that it holds would.

    They look on for minutes here, and no row is computed alone: that a launch ends shows that it needs no more SMs.
    """
    few_sms = 78
    architecture = dispatch.architecture(torch.cuda.get_device_capability())
    rows = decode_config.max_tokens(config.hidden_size, config.num_experts, config.top_k, architecture, few_sms)
    assert rows == few_sms
    deadline = time.monotonic() + SECONDS
    calls = [Call(config, num_tokens, seed) for num_tokens in (rows, rows + 1)]
    expected = [call.expected() for call in calls]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call.with_looks(1)  # what the first launch on a stream makes is made
            call.poison()
        with held_sms(num_sms() - few_sms, deadline) as all_held:
            ends = []
            for call in calls:
                call.with_looks(1 << 30)
                ends.append(stream.record_event())
            wait_until(ends[0].query, deadline, "a launch of as many rows as SMs")
            time.sleep(2)
            assert not ends[1].query(), "more rows than SMs are no matter: this test proves nothing"
            assert all_held()
        for call, wanted in zip(calls, expected, strict=True):
            call.check(wanted)
            assert int(call.wrong) == 0


def test_progress_beside_kernels_that_come_and_go() -> None:
    """They ask for every SM, first of all, for 0.1 ms each: launches lose SMs between one block and the next."""
    deadline = time.monotonic() + SECONDS
    calls, graphs = sixteen_graphs()
    streams = [torch.cuda.Stream() for _ in graphs]
    flags = torch.zeros(1 + num_sms(), dtype=torch.int32, pin_memory=True)
    others = [torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)]
    replay_all(graphs, streams, deadline)
    for _ in range(10):
        for i in range(40):
            hold(flags, others[i % 2], 100_000)
        replay_all(graphs, streams, deadline)
    torch.cuda.synchronize()
    assert sum(int(call.wrong) for call in calls) == 0


def test_progress_with_rows_that_are_all_computed_alone(seed: int) -> None:
    """The slowest launches there are, on two SMs: every row by its owner, in each of eight streams."""
    deadline = time.monotonic() + SECONDS
    calls = [Call((V4_FLASH, SMALL)[i % 2], 1 + i, seed + i) for i in range(8)]
    expected = [call.expected() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]

    def launches() -> list[torch.cuda.Event]:
        for call, stream, wanted in zip(calls, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                call.poison()
                call.with_looks(0)
                call.check(wanted)
        return [stream.record_event() for stream in streams]

    torch.cuda.synchronize()
    launches()
    with held_sms(num_sms() - 2, deadline) as all_held:
        for _ in range(20):
            events = launches()
            wait_until(lambda events=events: all(event.query() for event in events), deadline, "a round of launches")
        assert all_held()
    assert sum(int(call.wrong) for call in calls) == 0
