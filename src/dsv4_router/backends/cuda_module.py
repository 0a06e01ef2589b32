# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiles the CUDA C++ kernels with NVRTC and launches them through cuda.core.

Compiling needs neither a GPU nor the CUDA toolkit. A kernel's shapes are macros: one (file, entry, macros) is one
specialisation, compiled at its first use, kept on disk (:mod:`dsv4_router.jit_cache`) and in memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import io
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import jit_cache
from ..dispatch import architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADERS = ("router_math.cuh",)
COMPILE_OPTIONS = {"std": "c++17", "lineinfo": True, "ptxas_options": "-v"}
C_TYPES = {torch.int32: "int", torch.int64: "long long"}


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation: a ``.cu`` file of ``dsv4_router.kernels``, an entry in it, and its macros."""

    file: str
    entry: str
    macros: tuple[tuple[str, str], ...]


def kernel_folder() -> Path:
    """The folder of the kernel sources, in a checkout or in an installed package."""
    return Path(str(importlib.resources.files("dsv4_router.kernels")))


@cache
def missing_requirement() -> str | None:
    """What compiling lacks on this machine, or None: cuda-core, cuda-bindings and NVRTC are needed."""
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-python is not installed ({error})"
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's errors share no narrower base class
        return f"NVRTC cannot be loaded ({error})"
    return None


@cache
def missing_architecture(compute_capability: tuple[int, int]) -> str | None:
    """Why the installed NVRTC cannot compile for a device, or None."""
    from cuda.bindings import nvrtc

    major, minor = compute_capability
    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, known = nvrtc.nvrtcGetSupportedArchs()
    if major * 10 + minor in list(known)[:count]:
        return None
    return f"NVRTC {_toolchain()['nvrtc']} does not compile for {architecture(compute_capability)}"


@cache
def _toolchain() -> dict[str, str]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    # The toolkit's own NVRTC is no distribution.
    return {"nvrtc": f"{major}.{minor}"} | jit_cache.versions_of(("cuda-core", "nvidia-cuda-nvrtc"))


def _compile(spec: KernelSpec, target: str, log: io.StringIO) -> bytes:
    from cuda.core import Program, ProgramOptions

    folder = kernel_folder()
    options = ProgramOptions(
        name=spec.file, arch=target, include_path=str(folder), define_macro=list(spec.macros), **COMPILE_OPTIONS
    )
    program = Program((folder / spec.file).read_text(), "c++", options)
    return bytes(program.compile("cubin", logs=log).code)


def compile_with_log(spec: KernelSpec, target: str) -> tuple[bytes, str]:
    """Compiles without the cache: the cubin, and what the assembler says of registers, stack and spills."""
    log = io.StringIO()
    return _compile(spec, target, log), log.getvalue()


def cubin(spec: KernelSpec, target: str) -> bytes:
    """The compiled specialisation for a target such as ``"sm_90a"``, from the disk cache if it is there."""
    folder = kernel_folder()
    parts = {name: (folder / name).read_text() for name in (spec.file, *HEADERS)}
    parts |= {"target": target, "macros": repr(spec.macros), "options": repr(COMPILE_OPTIONS), **_toolchain()}
    key = jit_cache.entry_key(parts)
    return jit_cache.load_or_build(key, ".cubin", lambda: _compile(spec, target, io.StringIO()))


def checked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of ``cuda.bindings`` returned, without its status; raises RuntimeError if that is an error."""
    from cuda.bindings import driver

    status, *values = results
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return tuple(values)


@contextmanager
def capture_allowed() -> Iterator[None]:
    """Lets this thread load modules and make memory while a stream is being captured: neither is a stream operation."""
    from cuda.bindings import driver

    _, previous = driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(previous)


def allocate(num_bytes: int) -> int:
    """The address of new memory of the current device, also while a stream is being captured; 0 if there is too little.

    Not from torch's allocator: what is kept must lie in no pool that the caller has chosen for a graph.
    """
    from cuda.bindings import driver

    with capture_allowed():
        status, memory = driver.cuMemAlloc(num_bytes)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return 0
    (memory,) = checked((status, memory))
    return int(memory)


_loaded: dict[tuple[KernelSpec, int], Any] = {}
_loading = threading.Lock()


def load(spec: KernelSpec, device_index: int) -> Any:
    """The kernel of ``spec``, compiled for the device and loaded on it: a ``cuda.core.Kernel``.

    A kernel that was handed out once is kept for good: launches in flight and captured graphs refer to it, and
    cuda.core unloads it with the last reference. Hence the lock, so that threads that come first together get one.
    """
    with _loading:
        if (spec, device_index) not in _loaded:
            _loaded[spec, device_index] = _load(spec, device_index)
        return _loaded[spec, device_index]


def _load(spec: KernelSpec, device_index: int) -> Any:
    from cuda.core import Device, ObjectCode

    code = cubin(spec, architecture(torch.cuda.get_device_capability(device_index)))
    with torch.cuda.device(device_index), capture_allowed():
        Device(device_index).set_current()
        kernel = ObjectCode.from_cubin(code, name=spec.file).get_kernel(spec.entry)
        _ = kernel.attributes.num_regs  # asking loads it now, not at a launch that may be captured
    return kernel


@cache
def cuda_core() -> Any:
    """The module ``cuda.core``: imported at the first launch, not with this package."""
    import cuda.core

    return cuda.core


_thread = threading.local()


@lru_cache(maxsize=4096)
def bound_launch(
    kernel: Any, device_index: int, stream: int, grid: int, block: int, dependent: bool
) -> Callable[..., None]:
    """Launches ``grid`` blocks of ``block`` threads on a stream, given by its handle; takes the kernel's arguments.

    Other parameters as in :func:`launch`; the device must be the current one when the result is called.
    """
    core = cuda_core()
    dependent = dependent and torch.cuda.get_device_capability(device_index) >= (9, 0)
    config = core.LaunchConfig(grid=grid, block=block, programmatic_stream_serialization=dependent)
    return partial(core.launch, core.Stream.from_handle(stream), config, kernel)


def padding_arguments(
    token_mask: torch.Tensor | None, num_valid_tokens: int | torch.Tensor | None, num_tokens: int
) -> tuple[int, int, int]:
    """The kernels' ``token_mask``, ``num_valid_tokens`` and ``num_valid_tokens_on_host``."""
    mask = 0 if token_mask is None else token_mask.data_ptr()
    if num_valid_tokens is None:
        return mask, 0, num_tokens
    if isinstance(num_valid_tokens, torch.Tensor):
        return mask, num_valid_tokens.data_ptr(), 0
    return mask, 0, num_valid_tokens


def launch(kernel: Any, device_index: int, grid: int, block: int, dependent: bool, *args: Any) -> None:
    """Launches on torch's current stream of the device, which must be the current device.

    Args:
        kernel: from :func:`load`.
        device_index: the device of every pointer in ``args``.
        grid: blocks. block: threads of a block.
        dependent: programmatic dependent launch, where the device has it (compute capability 9.0).
        args: addresses and integers (64 bits each) and floats (double), in the kernel's order.
    """
    if not hasattr(_thread, "has_context"):
        # torch makes the device's context current with a thread's first call that needs one, which may be this one.
        cuda_core().Device(device_index).set_current()
        _thread.has_context = True
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    bound_launch(kernel, device_index, stream, grid, block, dependent)(*args)
