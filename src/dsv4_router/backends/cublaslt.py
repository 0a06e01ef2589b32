# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Batched bf16 products with fp32 results by cuBLASLt, called through ctypes.

``torch.bmm`` dispatches, allocates and asks cuBLAS for an algorithm in every call, which takes twice the host time of a
whole ``torch.add``. A router multiplies the same sizes again and again: here everything but four addresses is decided
once for each, and a call is one call of the library that torch itself has loaded.

Only algorithms are taken that need no workspace and do not split a sum, so that calls on several streams, and launches
in captured graphs, share nothing. The choice depends on the sizes alone, hence so do the bits of a result.
Numbers and layouts below are those of ``cublasLt.h``, ``cublas_api.h`` and ``library_types.h`` (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import torch

from .. import thresholds
from ..arguments import ROW_ALIGNMENT
from . import cuda_module

_BF16, _FP32 = 14, 0  # cudaDataType: CUDA_R_16BF, CUDA_R_32F
_COMPUTE_FP32 = 68  # cublasComputeType_t: CUBLAS_COMPUTE_32F
_TRANSPOSED = 1  # cublasOperation_t: CUBLAS_OP_T
_BATCH_COUNT, _BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t: BATCH_COUNT, STRIDED_BATCH_OFFSET
_TRANSPOSE_A = 3  # cublasLtMatmulDescAttributes_t: TRANSA
_MAX_WORKSPACE, _REDUCTION_SCHEMES = 1, 3  # cublasLtMatmulPreferenceAttributes_t: MAX_WORKSPACE_BYTES, REDUCTION_...
_MIN_ALIGNMENTS = (5, 6, 7, 8)  # likewise: MIN_ALIGNMENT_A_BYTES to MIN_ALIGNMENT_D_BYTES
_TILE_ID = 1  # cublasLtMatmulAlgoConfigAttributes_t: TILE_ID
_CANDIDATES = 8  # among which a certain tile is looked for
_MAX_PRODUCTS = 4096  # remembered; about 2 KB each
# Of the addresses of hidden states and gate weight, and of output and stream as c_pointer() makes them.
Product = Callable[[int, int, Any, Any], None]
# A number as an argument for a function whose types ctypes has not been told: a call has nothing left to convert.
c_pointer: Callable[[int], Any] = ctypes.c_void_p.from_param


class Algorithm(ctypes.Structure):
    """``cublasLtMatmulAlgo_t``."""

    _fields_ = (("data", ctypes.c_uint64 * 8),)


class Candidate(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Sizes(NamedTuple):
    """Of ``out[s] = hidden[:, piece s] @ gate[:, piece s].T``: H is cut into ``splits`` pieces; strides are of rows."""

    num_tokens: int
    num_experts: int
    hidden_size: int
    hidden_stride: int
    gate_stride: int
    splits: int


@cache
def _library() -> Any:
    """The library that torch has loaded: never another one, and never a second copy."""
    if torch.version.cuda is None:
        raise OSError("torch was built without CUDA")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}", mode=os.RTLD_NOLOAD)


@cache
def missing_library() -> str | None:
    """Why cuBLASLt cannot be called, or None."""
    try:
        _library()
    except (AttributeError, OSError) as error:  # AttributeError: a platform without RTLD_NOLOAD
        return f"torch has not loaded cuBLASLt as a shared library ({error})"
    return None


def _check(status: int) -> None:
    if status != 0:
        name = _library().cublasLtGetStatusName
        name.restype = ctypes.c_char_p
        raise RuntimeError(f"cuBLASLt: {name(status).decode()}")


class _Descriptor:
    """One of the library's descriptors, destroyed with this object."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        library, self.handle = _library(), ctypes.c_void_p()
        self._set = library[f"cublasLt{kind}SetAttribute"]
        self._destroy = library[f"cublasLt{kind}Destroy"]
        _check(library[f"cublasLt{kind}Create"](ctypes.byref(self.handle), *arguments))

    def set(self, attribute: int, value: Any) -> None:
        """``value``: a ctypes number of the attribute's own type."""
        _check(self._set(self.handle, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))))

    def __del__(self) -> None:
        if self.handle:
            self._destroy(self.handle)


def _layout(dtype: int, rows: int, columns: int, stride: int, batches: int, batch_stride: int) -> _Descriptor:
    """A batch of column-major matrices, whose columns begin ``stride`` elements apart."""
    layout = _Descriptor("MatrixLayout", dtype, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
    layout.set(_BATCH_COUNT, ctypes.c_int32(batches))
    layout.set(_BATCH_STRIDE, ctypes.c_int64(batch_stride))
    return layout


class Problem:
    """What cuBLASLt is told of a product.

    To the library all matrices are column-major, so it computes ``out.T = gate @ hidden.T``: its A is the gate weight,
    [piece, E] and to be transposed, its B the hidden states, [piece, N], and its D the result, [E, N].
    """

    def __init__(self, sizes: Sizes) -> None:
        num_tokens, num_experts, hidden_size, hidden_stride, gate_stride, splits = sizes
        piece = hidden_size // splits
        self.product = _Descriptor("MatmulDesc", _COMPUTE_FP32, _FP32)
        self.product.set(_TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self.gate = _layout(_BF16, piece, num_experts, gate_stride, splits, piece)
        self.hidden = _layout(_BF16, piece, num_tokens, hidden_stride, splits, piece)
        self.out = _layout(_FP32, num_experts, num_tokens, num_experts, splits, num_tokens * num_experts)

    def candidates(self, library_handle: int, wanted: int = 1, max_workspace: int = 0) -> list[Candidate]:
        """Algorithms in the order of their estimated time, without reductions behind the sums."""
        preference = _Descriptor("MatmulPreference")
        preference.set(_MAX_WORKSPACE, ctypes.c_uint64(max_workspace))
        preference.set(_REDUCTION_SCHEMES, ctypes.c_uint32(0))
        for attribute in _MIN_ALIGNMENTS:
            preference.set(attribute, ctypes.c_uint32(ROW_ALIGNMENT))
        found, results = ctypes.c_int(0), (Candidate * wanted)()
        ask = _library().cublasLtMatmulAlgoGetHeuristic
        status = ask(
            ctypes.c_void_p(library_handle),
            self.product.handle,
            *(layout.handle for layout in (self.gate, self.hidden, self.out, self.out)),
            preference.handle,
            wanted,
            results,
            ctypes.byref(found),
        )
        return [results[i] for i in range(found.value) if results[i].status == 0] if status == 0 else []


def tile_of(algorithm: Algorithm) -> int:
    """``cublasLtMatmulTile_t``."""
    tile, written = ctypes.c_uint32(0), ctypes.c_size_t(0)
    ask = _library().cublasLtMatmulAlgoConfigGetAttribute
    _check(ask(ctypes.byref(algorithm), _TILE_ID, ctypes.byref(tile), ctypes.c_size_t(4), ctypes.byref(written)))
    return tile.value


def bind(problem: Problem, algorithm: Algorithm, library_handle: int) -> Product:
    """The product with everything converted that stays: a call converts two numbers and calls the library.

    It holds no lock. The library takes calls from several threads with one handle, nothing here changes between calls,
    and ctypes gives Python's lock away meanwhile, so that a full launch queue stops the calling thread only.
    """
    matmul = _library().cublasLtMatmul
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    kept = problem, algorithm, one, zero  # whose addresses these are
    alpha, beta, chosen = (c_pointer(ctypes.addressof(part)) for part in (one, zero, algorithm))
    parts = problem.product, problem.gate, problem.hidden, problem.out
    what, a, b, d = (c_pointer(part.handle.value or 0) for part in parts)
    library, workspace, workspace_bytes = c_pointer(library_handle), c_pointer(0), ctypes.c_size_t.from_param(0)

    def run(hidden: int, gate: int, out: Any, stream: Any, _kept: Any = kept) -> None:
        # C is the output too: it is not read, being multiplied by zero.
        status = matmul(
            library,
            what,
            alpha,
            c_pointer(gate),
            a,
            c_pointer(hidden),
            b,
            beta,
            out,
            d,
            out,
            d,
            chosen,
            workspace,
            workspace_bytes,
            stream,
        )
        if status:
            _check(status)

    return run


_handles: dict[int, int] = {}
_products: dict[tuple[int, Sizes], Product | None] = {}
_planning = Lock()


def handle(device_index: int) -> int:
    """The library's handle for the current device; the first time not within a capture, as it may allocate."""
    if device_index not in _handles:
        new = ctypes.c_void_p()
        _check(_library().cublasLtCreate(ctypes.byref(new)))
        _handles[device_index] = new.value or 0
    return _handles[device_index]


def product(device_index: int, sizes: Sizes) -> Product | None:
    """The product of given sizes on the current device; None where the library, or an algorithm for it, is missing."""
    key = device_index, sizes
    found = _products.get(key)
    if found is not None or key in _products or missing_library():
        return found
    with _planning:
        if len(_products) >= _MAX_PRODUCTS:
            _products.clear()  # those in use live on
        if key not in _products:
            _products[key] = _plan(device_index, sizes)
        return _products[key]


def _plan(device_index: int, sizes: Sizes) -> Product | None:
    try:
        with cuda_module.capture_allowed():
            problem, library_handle = Problem(sizes), handle(device_index)
            capability = torch.cuda.get_device_capability(device_index)
            tile = thresholds.gemm_tile(
                capability, sizes.num_tokens, sizes.hidden_size, sizes.num_experts, sizes.splits
            )
            found = problem.candidates(library_handle, 1 if tile is None else _CANDIDATES)
    except RuntimeError:  # nothing has been launched, and torch.bmm asks the library in its own way
        return None
    wanted = [each for each in found if tile is not None and _has_tile(each.algorithm, tile)]
    best = [*wanted, *found]
    return bind(problem, best[0].algorithm, library_handle) if best else None


def _has_tile(algorithm: Algorithm, tile: int) -> bool:
    try:
        return tile_of(algorithm) == tile
    except RuntimeError:  # the algorithm can be taken all the same
        return False
