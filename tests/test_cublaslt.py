# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What cuBLASLt is told, against a library that only takes notes: right products are shown on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dsv4_router import dispatch
from dsv4_router.backends import cublaslt, cuda_module

SIZES = cublaslt.Sizes(num_tokens=5, num_experts=12, hidden_size=128, hidden_stride=160, gate_stride=136, splits=8)


class Library:
    """Stands for libcublasLt: any function that is asked for notes its arguments and succeeds."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failing: set[str] = set()
        self.algorithms = 1
        self.tiles: dict[int, int] = {}  # of the algorithms in the order in which they are found
        self.functions: dict[str, Callable[..., Any]] = {}
        self._matmul = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 14, ctypes.c_size_t, ctypes.c_void_p)(
            self["cublasLtMatmul"]
        )
        # As in a library, its types are not known to ctypes, and what it gets has gone through a register or the stack.
        address = ctypes.cast(self._matmul, ctypes.c_void_p).value
        self.functions["cublasLtMatmul"] = ctypes.CFUNCTYPE(ctypes.c_int)(address or 0)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            if name == "cublasLtGetStatusName":
                return b"CUBLAS_STATUS_OF_THE_TEST"
            plain = tuple(getattr(getattr(a, "_obj", a), "value", a) for a in arguments)
            self.calls.append((name.removeprefix("cublasLt"), plain))
            if name.endswith("Create"):
                arguments[0]._obj.value = len(self.calls)
            if name.endswith("GetHeuristic"):
                arguments[-1]._obj.value = self.algorithms
                for i in range(self.algorithms):
                    arguments[-2][i].algorithm.data[0] = i
            if name.endswith("ConfigGetAttribute"):
                arguments[2]._obj.value = self.tiles[arguments[0]._obj.data[0]]
            return 15 if name in self.failing else 0

        return self.functions.setdefault(name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self[name]

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setattr(cublaslt, "_library", lambda: fake)
    monkeypatch.setattr(cublaslt, "missing_library", lambda: None)
    monkeypatch.setattr(cublaslt, "_products", {})
    monkeypatch.setattr(cublaslt, "_handles", {})
    monkeypatch.setattr(cuda_module, "capture_allowed", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return fake


def test_the_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(cublaslt.Algorithm) == 64
    assert ctypes.sizeof(cublaslt.Candidate) == 96


def test_matrices_are_described_column_by_column(library: Library) -> None:
    """The library computes out.T [E, N] = gate [E, piece] @ hidden.T [piece, N], 8 times."""
    problem = cublaslt.Problem(SIZES)
    layouts = [arguments[1:] for arguments in library.arguments("MatrixLayoutCreate")]
    assert layouts == [(14, 16, 12, 136), (14, 16, 5, 160), (0, 12, 5, 12)]  # dtype, rows, columns, stride
    assert library.arguments("MatmulDescCreate")[0][1:] == (68, 0)
    assert [arguments[1:] for arguments in library.arguments("MatmulDescSetAttribute")] == [(3, 1, 4)]
    batches = [arguments[1:] for arguments in library.arguments("MatrixLayoutSetAttribute")]
    assert batches == [(5, 8, 4), (6, 16, 8), (5, 8, 4), (6, 16, 8), (5, 8, 4), (6, 60, 8)]
    handles = [part.handle.value for part in (problem.product, problem.gate, problem.hidden, problem.out)]
    del problem
    destroyed = library.arguments("MatrixLayoutDestroy") + library.arguments("MatmulDescDestroy")
    assert sorted(handle for (handle,) in destroyed) == sorted(handles)


def test_algorithms_need_no_workspace_and_no_reduction(library: Library) -> None:
    assert cublaslt.product(0, SIZES) is not None
    wanted = [arguments[1:] for arguments in library.arguments("MatmulPreferenceSetAttribute")]
    assert wanted == [(1, 0, 8), (3, 0, 4), *((attribute, 16, 4) for attribute in (5, 6, 7, 8))]
    (question,) = library.arguments("MatmulAlgoGetHeuristic")
    assert question[0] == cublaslt.handle(0)
    assert question[4] == question[5]  # C is laid out as D
    assert question[7] == 1


MEASURED = cublaslt.Sizes(1024, 384, 7168, 7168, 7168, 8)


@pytest.mark.parametrize(
    ("change", "capability"),
    [
        ({"num_experts": 256}, (9, 0)),
        ({"hidden_size": 4096}, (9, 0)),
        ({"splits": 4}, (9, 0)),
        ({"num_tokens": 800}, (9, 0)),
        ({}, (8, 0)),
        ({}, (10, 0)),
    ],
)
def test_elsewhere_the_first_choice_is_taken(
    change: dict[str, int], capability: tuple[int, int], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert cublaslt.product(0, MEASURED._replace(**change)) is not None
    (question,) = library.arguments("MatmulAlgoGetHeuristic")
    assert question[7] == 1


def test_algorithms_whose_tiles_are_not_known_can_be_taken(library: Library) -> None:
    library.failing.add("cublasLtMatmulAlgoConfigGetAttribute")
    library.algorithms, library.tiles = 2, {0: 31, 1: 28}
    product = cublaslt.product(0, MEASURED)
    assert product is not None
    product(16, 32, *map(cublaslt.c_pointer, (48, 0)))
    (call,) = library.arguments("Matmul")
    assert cublaslt.Algorithm.from_address(call[12]).data[0] == 0


@pytest.mark.parametrize(
    ("num_tokens", "tiles", "chosen"),
    [(1024, (31, 20, 28, 28), 2), (896, (28, 31), 0), (1024, (31, 20), 0), (895, (31, 28), 0), (1025, (31, 28), 0)],
)
def test_a_tile_that_was_measured_to_be_faster(
    num_tokens: int, tiles: tuple[int, ...], chosen: int, library: Library
) -> None:
    """Where the library offers it, else its first choice, as for any other sizes."""
    sizes = MEASURED._replace(num_tokens=num_tokens)
    wanted = 8 if 896 <= num_tokens <= 1024 else 1
    library.algorithms, library.tiles = min(wanted, len(tiles)), dict(enumerate(tiles))
    product = cublaslt.product(0, sizes)
    assert product is not None
    (question,) = library.arguments("MatmulAlgoGetHeuristic")
    assert question[7] == wanted
    product(16, 32, *map(cublaslt.c_pointer, (48, 0)))
    (call,) = library.arguments("Matmul")
    assert cublaslt.Algorithm.from_address(call[12]).data[0] == chosen


def test_a_call_puts_addresses_in_their_places(library: Library) -> None:
    product = cublaslt.product(0, SIZES)
    assert product is not None
    (what,) = (arguments[0] for arguments in library.arguments("MatmulDescSetAttribute"))
    gate_layout, hidden_layout, out_layout = (
        arguments[0] for arguments in library.arguments("MatrixLayoutSetAttribute")[::2]
    )
    described = [what, gate_layout, hidden_layout, out_layout, out_layout]
    for hidden, gate, out, stream in ((1 << 40, 2 << 40, 3 << 40, 5 << 40), (16, 32, 48, 0)):
        library.calls.clear()
        product(hidden, gate, cublaslt.c_pointer(out), cublaslt.c_pointer(stream))
        ((name, arguments),) = library.calls
        assert name == "Matmul"
        assert [arguments[i] for i in (0, 3, 5, 8, 10)] == [cublaslt.handle(0), gate, hidden, out, out]
        assert [arguments[i] for i in (1, 4, 6, 9, 11)] == described
        assert [ctypes.c_float.from_address(arguments[i]).value for i in (2, 7)] == [1.0, 0.0]
        assert arguments[13:] == (None, 0, stream or None)
    library.failing.add("cublasLtMatmul")
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_OF_THE_TEST"):
        product(16, 32, *map(cublaslt.c_pointer, (48, 0)))


def test_a_product_is_planned_once(library: Library) -> None:
    first = cublaslt.product(0, SIZES)
    planned = len(library.calls)
    assert cublaslt.product(0, SIZES) is first
    assert len(library.calls) == planned
    assert cublaslt.product(0, SIZES._replace(num_tokens=6)) is not first
    assert cublaslt.product(1, SIZES) is not first
    assert len(library.arguments("Create")) == 2  # a handle for each device


@pytest.mark.parametrize(
    "failing", ["Create", "MatmulDescCreate", "MatrixLayoutSetAttribute", "MatmulAlgoGetHeuristic", ""]
)
def test_without_an_algorithm_there_is_no_product(failing: str, library: Library) -> None:
    library.failing.add(f"cublasLt{failing}")
    library.algorithms = 1 if failing else 0
    for _ in range(2):
        assert cublaslt.product(0, SIZES) is None
    library.failing.clear()
    library.algorithms = 1
    assert cublaslt.product(0, SIZES) is None  # asked once
    assert cublaslt.product(0, SIZES._replace(num_tokens=6)) is not None


def test_memory_of_products_is_bounded(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "_MAX_PRODUCTS", 3)
    first = cublaslt.product(0, SIZES)
    for num_tokens in range(6, 20):
        assert cublaslt.product(0, SIZES._replace(num_tokens=num_tokens)) is not None
        assert len(cublaslt._products) <= 3
    assert first is not None
    first(16, 32, *map(cublaslt.c_pointer, (48, 0)))  # one in use lives on


def test_a_torch_without_cuda_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    cublaslt._library.cache_clear()
    cublaslt.missing_library.cache_clear()
    try:
        why = cublaslt.missing_library()
        assert why is not None
        assert "torch was built without CUDA" in why
        assert cublaslt.product(0, SIZES._replace(num_tokens=7)) is None
    finally:
        cublaslt._library.cache_clear()
        cublaslt.missing_library.cache_clear()


def test_an_explanation_says_that_the_library_is_missing() -> None:
    request = dispatch.Request(4096, 256, 6, 1000)
    lacking = dispatch.Availability("cuda:0", (9, 0), missing_cublaslt="it is linked statically")
    plan = dispatch.plan(request, lacking)
    assert plan.path == "cublas"
    assert "torch.bmm" in str(plan)
    assert "it is linked statically" in str(plan)
    assert "torch.bmm" not in str(dispatch.plan(request, dispatch.Availability("cuda:0", (9, 0))))
