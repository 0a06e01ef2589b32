# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What eager calls on the cublas path pass on and share, without a GPU: right results are shown on one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_router import arguments
from dsv4_router.arguments import DenseOperands, Options, OrdinaryCall
from dsv4_router.backends import cublas, cublaslt, cuda_module, decode, workspaces
from dsv4_router.logits_config import LogitsConfig, Schedule

N, E, H, K = 5, 12, 128, 3
CALL: OrdinaryCall = (0, N, E, H)


class Gpu:
    """Device 0 without one: products and launches are noted, each with the stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.current, self.capturing, self.full = 77, 0, False, False
        self.allocated: list[int] = []
        self.products: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.on_product: Callable[[], None] = lambda: None
        for name, answer in {
            "_cuda_getCurrentRawStream": lambda index: self.stream,
            "_cuda_getDevice": lambda: self.current,
            "_cuda_isCurrentStreamCapturing": lambda: self.capturing,
        }.items():
            monkeypatch.setattr(torch._C, name, answer, raising=False)
        monkeypatch.setattr(cublas, "remembered", {})
        monkeypatch.setattr(cublas, "_free", {})
        monkeypatch.setattr(cublas, "topk_kernel", lambda device_index, *of_spec: cublas.topk_spec(*of_spec))
        monkeypatch.setattr(cublaslt, "c_pointer", lambda number: ("pointer", number))
        monkeypatch.setattr(cublaslt, "product", lambda device_index, sizes: self.multiply)
        monkeypatch.setattr(cuda_module, "allocate", self.allocate)
        monkeypatch.setattr(cuda_module, "bound_launch", self.bound_launch)
        monkeypatch.setattr(cuda_module, "_thread", SimpleNamespace(has_context=True))

    def allocate(self, num_bytes: int) -> int:
        self.allocated.append(num_bytes)
        return 0 if self.full else len(self.allocated) << 30

    def multiply(self, *numbers: Any) -> None:
        self.products.append(numbers)
        self.on_product()

    def bound_launch(self, *how: Any) -> Callable[..., None]:
        return lambda *args: self.launches.append((how, args))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def operands(dtype: torch.dtype = torch.bfloat16, bias_offset: int = 0) -> DenseOperands:
    bias = torch.zeros(E + bias_offset)[bias_offset:]
    hidden, gate = torch.zeros(N, H, dtype=dtype), torch.zeros(E, H, dtype=dtype)
    return hidden, gate, bias, K, 1.5, torch.zeros(N, K), torch.zeros(N, K, dtype=torch.int32)


CHOICE = cublas.Choice("cublas", False, K, torch.int32)


def remember(call: OrdinaryCall = CALL) -> None:
    cublas.remember(CHOICE, call)


def again(of: DenseOperands, call: OrdinaryCall = CALL, pdl: bool = True, constant: bool = True) -> bool:
    return cublas.route_again("cublas", False, call, of, pdl, constant)


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_short_way_launches_what_the_long_way_does(
    pdl: bool, constant: bool, with_bias: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernel, grid and arguments, but for where the partial logits lie."""
    of = operands()
    if not with_bias:
        of = *of[:2], None, *of[3:]
    remember()
    assert again(of, pdl=pdl, constant=constant)
    hidden, gate = of[0].data_ptr(), of[1].data_ptr()
    assert gpu.products == [(hidden, gate, ("pointer", 1 << 30), ("pointer", 77))]

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))
    cublas.route(of, None, Options(launch_with_pdl=pdl, weights_are_constant=constant))
    logits = gpu.products[1][2][1]
    assert gpu.products[1] == (hidden, gate, ("pointer", logits), ("pointer", 77))
    (short_how, short), (long_how, long) = gpu.launches
    assert short == (1 << 30, *long[1:])
    assert long[0] == logits
    assert short_how == (long_how[0], 0, *long_how[2:])  # the CPU's tensors are on device -1
    assert long_how[2:] == (77, 2, 128, pdl)


def test_what_cuda_posts_is_never_freed() -> None:
    """A graph may be destroyed when the interpreter has forgotten the workspaces."""
    workspace = workspaces._Workspace(0, 1 << 40, 1 << 20)
    semaphore = weakref.ref(workspace.graph_gone)
    del workspace
    gc.collect()
    assert semaphore() is not None


@pytest.mark.parametrize("how", ["gradient", "inference"])
def test_logits_go_by_another_way_where_torch_would_not_write_them(how: str) -> None:
    hidden, gate = torch.randn(5, 64), torch.randn(8, 64)
    expected, logits_out = hidden @ gate.T, torch.zeros(5, 8)
    if how == "gradient":
        logits_out.requires_grad_()
    else:
        with torch.inference_mode():
            logits_out = logits_out.clone()
    found = cublas.gate_logits(hidden, gate, logits_out)
    assert torch.equal(found, expected)
    assert not logits_out.any(), "the top-k writes them"
    direct = torch.zeros(5, 8)
    assert cublas.gate_logits(hidden, gate, direct) is direct


def test_the_short_way_takes_no_tensors_without_memory(gpu: Gpu) -> None:
    of = operands()
    remember()
    assert again(of)
    with FakeTensorMode():
        fake = torch.empty(of[1].shape, dtype=torch.bfloat16)
    assert not again((of[0], fake, *of[2:]))


MORE_ROWS: OrdinaryCall = (0, 300, 132, 1088)
OF_DECODE = cublas.Choice("decode", True, K, torch.int32)


@pytest.fixture
def hopper(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU with the decode path, whose kernels are noted as products."""
    monkeypatch.setattr(decode, "_models", {})
    monkeypatch.setattr(decode, "object_code", lambda config, target: b"")
    monkeypatch.setattr(decode, "link", lambda code: gpu.multiply)
    monkeypatch.setattr(decode.workspaces, "address", lambda device_index, stream, num_bytes: 1 << 40)
    monkeypatch.setattr(cuda_module, "capture_allowed", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return gpu


def more_rows() -> DenseOperands:
    _, num_tokens, num_experts, hidden_size = MORE_ROWS
    hidden, gate = (torch.zeros(rows, hidden_size, dtype=torch.bfloat16) for rows in (num_tokens, num_experts))
    outputs = torch.zeros(num_tokens, K), torch.zeros(num_tokens, K, dtype=torch.int32)
    return hidden, gate, torch.zeros(num_experts), K, 1.5, *outputs


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("parts", [5, 4, 2, 1])
@pytest.mark.parametrize("rows_left", [0, 44])
def test_the_short_way_of_more_rows_launches_what_the_long_way_does(
    pdl: bool, constant: bool, parts: int, rows_left: int, hopper: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rows are left take a launch of the decode kernel, whose arguments the long way makes too."""
    monkeypatch.setattr(decode, "fastest", lambda configs, rows, *_: Schedule(configs[0], parts, rows - rows_left))
    of = more_rows()
    decode.remember(OF_DECODE, MORE_ROWS)
    assert cublas.route_again("decode", True, MORE_ROWS, of, pdl, constant)
    assert not cublas.route_again("decode", False, MORE_ROWS, of, pdl, constant)
    short_way, hopper.products = hopper.products, []
    decode.route(of, None, Options(launch_with_pdl=pdl, weights_are_constant=constant))
    short, *short_left = short_way
    long, *long_left = hopper.products
    hidden, gate, num_rows = of[0].data_ptr(), of[1].data_ptr(), 300 - rows_left
    early = 0 if not constant else 1 if rows_left == 0 else 4  # of 300 or of 256 rows
    dependents = LogitsConfig(1088, 132, 40).dependents(parts, num_rows, 132)
    assert short == (hidden, 1088, gate, 1088, 1 << 30, num_rows, parts, 66, early, dependents, pdl, 77)
    assert long == (*short[:4], long[4], *short[5:])
    (short_how, short_numbers), (long_how, long_numbers) = hopper.launches
    assert short_numbers == (1 << 30, *long_numbers[1:])
    assert short_numbers[6] == num_rows
    assert short_how == (long_how[0], 0, *long_how[2:])
    assert short_how[3] == num_rows // 4
    macros = dict(short_how[0].macros)
    assert (macros["NUM_SPLITS"], macros["FIRST_HALF"]) == {5: ("5", "3"), 4: ("4", "2")}.get(parts, (str(parts),) * 2)
    if rows_left == 0:
        assert short_left == long_left == []
        return
    ((*of_short, short_count, short_first, rows), *rest), ((*of_long, long_count, long_first, _), *long_rest) = (
        (args[:15], *args[15:]) for (args,) in (short_left, long_left)
    )
    assert of_short == of_long
    assert rest == long_rest
    assert of_short[0] == of[0][num_rows:].data_ptr()
    assert (rows, rest[-3:]) == (rows_left, [decode.MAX_LOOKS, pdl, 77])
    # Which rows there are is counted from the launch's first row on, or from the call's: all of them.
    assert (short_count - short_first, long_count - long_first) == (rows_left, rows_left)


def test_which_calls_of_the_decode_path_are_remembered(hopper: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of more rows than a launch takes, whose partial logits fit the memory of a stream."""
    for num_tokens in (1, 128, 1 << 14):
        decode.remember(OF_DECODE, (0, num_tokens, 132, 1088))
    hopper.capturing = True
    decode.remember(OF_DECODE, MORE_ROWS)
    hopper.capturing = False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    decode.remember(OF_DECODE, (1, 300, 132, 1088))  # where no kernel makes logits of more rows
    assert not cublas.remembered
    assert not hopper.allocated
    decode.remember(OF_DECODE, MORE_ROWS)
    assert len(cublas.remembered) == 1


def test_both_ways_share_one_entry_of_the_cache(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cublas, "topk_kernel", lambda device_index, *of_spec: asked.append(of_spec))
    remember()
    of = operands()
    for first_half in (None, 4):
        cublas.activation_topk(torch.zeros(8, N, E), *of[2:], first_half=first_half)
    assert asked == [asked[0], asked[0], (*asked[0][:-2], 4, False)]
    assert asked[0] == (E, K, torch.int32, True, 8, False, None, False)


def test_without_being_remembered_nothing_is_done(gpu: Gpu) -> None:
    assert not again(operands())
    remember()
    for other in ((1, N, E, H), (0, N + 1, E, H), (0, N, E + 1, H), (0, N, E, 2 * H)):
        assert not again(operands(), other)
    assert not cublas.route_again("auto", False, CALL, operands(), True, True)
    assert not cublas.route_again("cublas", True, CALL, operands(), True, True)
    gpu.stream = 78
    assert not again(operands())
    assert not gpu.products
    assert not gpu.launches


def test_what_goes_the_long_way(gpu: Gpu) -> None:
    remember()
    assert not again(operands(torch.float32))
    assert not again(operands(bias_offset=1))
    gpu.current = 1
    assert not again(operands())
    gpu.current, gpu.capturing = 0, True
    assert not again(operands())
    assert not gpu.products
    gpu.capturing = False
    assert again(operands())


@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1025, 128), (4, 100)])
def test_what_is_not_remembered(num_tokens: int, hidden_size: int, gpu: Gpu) -> None:
    """Many tokens, and a hidden size that is not cut, are no products of pieces by cuBLASLt."""
    remember((0, num_tokens, E, hidden_size))
    gpu.capturing = True
    remember()
    assert not cublas.remembered
    assert not gpu.allocated


def test_the_memory_is_as_large_as_what_is_remembered_needs(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    most = cublas._FEW_TOKENS
    remember((0, most, E, H))
    assert gpu.allocated == [4 * E * most * cublas.num_splits(most, H, E)]
    monkeypatch.setattr(cublas, "num_splits", lambda num_tokens, hidden_size, num_experts: 16)
    remember((0, most // 2 + 1, E, H))
    assert len(cublas.remembered) == 1
    remember((0, most // 2, E, H))
    assert len(cublas.remembered) == 2


def test_shapes_of_a_stream_share_memory_and_streams_do_not(gpu: Gpu) -> None:
    for stream in (77, 78):
        gpu.stream = stream
        for num_tokens in range(1, 9):
            remember((0, num_tokens, E, H))
        remember((0, 1, E + 4, H))
        remember((1, 1, E, H))
    assert gpu.allocated == 2 * [4 * E * 8192, 4 * (E + 4) * 8192, 4 * E * 8192]
    memories = [memory.address for free in cublas._free.values() for memory in free]
    assert len(set(memories)) == len(memories) == 6


def test_without_memory_calls_go_the_long_way_and_ask_once(gpu: Gpu) -> None:
    gpu.full = True
    for num_tokens in (N, N + 1, N):
        remember((0, num_tokens, E, H))
        assert not again(operands(), (0, num_tokens, E, H))
    assert len(gpu.allocated) == 1
    assert not gpu.products


def test_memory_is_taken_while_a_call_launches(gpu: Gpu) -> None:
    """A second call of the same stream, between the two launches of the first, does not write where that one reads."""
    remember()
    inner = []
    gpu.on_product = lambda: inner.append(again(operands()))
    assert again(operands())
    assert inner == [False]
    gpu.on_product = lambda: None
    assert again(operands())
    assert len(gpu.launches) == 2


def test_memory_comes_back_from_a_call_that_fails(gpu: Gpu) -> None:
    def fail() -> None:
        raise RuntimeError("cuBLASLt: of the test")

    remember()
    gpu.on_product = fail
    with pytest.raises(RuntimeError, match="of the test"):
        again(operands())
    gpu.on_product = lambda: None
    assert again(operands())


def test_threads_on_one_stream_never_share_memory(gpu: Gpu) -> None:
    remember()
    inside, most, lock = 0, 0, threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(1e-4)
        with lock:
            inside -= 1

    gpu.on_product = enter
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: again(operands()), range(400)))
    assert most == 1
    assert any(taken)
    assert len(gpu.launches) == sum(taken)


def test_what_is_remembered_is_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas, "_MAX_REMEMBERED", 3)
    for stream in range(20):
        gpu.stream = stream
        remember()
        assert len(cublas.remembered) <= 3
    assert again(operands())


def test_a_launch_is_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[Any, ...]] = []
    core = SimpleNamespace(
        LaunchConfig=lambda **how: tuple(how.items()),
        Stream=SimpleNamespace(from_handle=lambda handle: ("stream", handle)),
        launch=lambda *args: launches.append(args),
        Device=lambda index: SimpleNamespace(set_current=lambda: made_current.append(index)),
    )
    made_current: list[int] = []
    monkeypatch.setattr(cuda_module, "_thread", threading.local())
    monkeypatch.setattr(cuda_module, "cuda_core", lambda: core)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8 + index, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    cuda_module.bound_launch.cache_clear()
    try:
        for device_index, dependent in ((0, True), (1, True), (1, False)):
            for _ in range(2):
                cuda_module.launch("kernel", device_index, 3, 128, dependent, 1, 2.5)
        assert cuda_module.bound_launch.cache_info().currsize == 3
    finally:
        cuda_module.bound_launch.cache_clear()
    assert made_current == [0], "once for a thread"
    assert launches[::2] == launches[1::2]
    for launch, device_index, dependent in zip(launches[::2], (0, 1, 1), (False, True, False), strict=True):
        config = (("grid", 3), ("block", 128), ("programmatic_stream_serialization", dependent))
        assert launch == (("stream", 70 + device_index), config, "kernel", 1, 2.5)


@pytest.mark.parametrize(("status", "address"), [("CUDA_SUCCESS", 4096), ("CUDA_ERROR_OUT_OF_MEMORY", None)])
def test_allocating(status: str, address: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    monkeypatch.setattr(cuda_module, "capture_allowed", nullcontext)
    monkeypatch.setattr(driver, "cuMemAlloc", lambda num_bytes: (getattr(driver.CUresult, status), address))
    assert cuda_module.allocate(100) == (address or 0)


def test_allocating_in_a_broken_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    monkeypatch.setattr(cuda_module, "capture_allowed", nullcontext)
    monkeypatch.setattr(driver, "cuMemAlloc", lambda num_bytes: (driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, None))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda_module.allocate(100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alignment_of_rows(dtype: torch.dtype) -> None:
    wide = torch.zeros(4, 72, dtype=dtype)
    assert arguments.row_stride(wide[:, :64]) == 72
    assert arguments.has_aligned_rows(wide[:, :64])
    assert not arguments.has_aligned_rows(wide[:, 1:65])
    odd = torch.zeros(4, 71, dtype=dtype)[:, :64]
    assert not arguments.has_aligned_rows(odd)
    lone = odd[:1]  # its stride is 71 all the same, and means nothing
    assert lone.stride(0) == 71
    assert arguments.row_stride(lone) == 64
    assert arguments.has_aligned_rows(lone)


def test_rows_of_operands() -> None:
    of = operands()
    of[0].copy_(torch.arange(N).view(N, 1))
    some = arguments.rows_of(of, slice(2, 4))
    assert some[0][:, 0].tolist() == [2, 3]
    assert some[1:5] == of[1:5]
    assert [some[i].data_ptr() for i in (5, 6)] == [of[i][2].data_ptr() for i in (5, 6)]  # type: ignore[index, union-attr]
