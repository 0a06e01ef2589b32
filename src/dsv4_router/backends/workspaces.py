# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Device memory that launches of the decode kernel exchange partial sums through.

Two launches that may overlap must not share a workspace. Launches of one stream do not overlap, so a stream has one,
of :data:`~dsv4_router.decode_config.MAX_WORKSPACE_BYTES`. A captured launch runs whenever its graph is replayed, on any
stream, so launches that are being captured get workspaces of their own: one for each capture and stream in it, as
large as the launches there need.

Workspaces are made and zeroed when they are first needed, also within a capture. A stream's is kept for good. A
capture's is used again once its graph is gone, which a CUDA user object that the graph holds tells; zeroed again, for
one of its launches may not have finished. (Else what a kernel finds in a workspace decides no result: packets that are
not of its own launch are not used.)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch

from ..decode_config import MAX_WORKSPACE_BYTES
from . import cuda_module

_SEM_T_BYTES = 32  # glibc's, on 64-bit machines


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _kept(buffer: Any) -> Any:
    """The object, whose memory is never given back."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer))
    return buffer


@dataclass
class _Workspace:
    """Memory of a capture.

    ``graph_gone`` is a semaphore that CUDA posts, from a thread without Python's lock. It is never freed, for graphs
    may outlive this module when the interpreter ends.
    """

    device_index: int
    address: int
    num_bytes: int
    key: tuple[int, int, int] = (-1, -1, -1)
    graph_gone: Any = field(default_factory=lambda: _kept(ctypes.create_string_buffer(_SEM_T_BYTES)))

    def belong_to(self, graph: Any) -> None:
        from cuda.bindings import driver

        _libc().sem_init(self.graph_gone, 0, 0)
        post = ctypes.cast(_libc().sem_post, ctypes.c_void_p).value
        (token,) = cuda_module.checked(
            driver.cuUserObjectCreate(
                ctypes.addressof(self.graph_gone),
                driver.CUhostFn(post),
                1,
                driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC,
            )
        )
        move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        cuda_module.checked(driver.cuGraphRetainUserObject(graph, token, 1, move))

    def is_free(self) -> bool:
        return int(_libc().sem_trywait(self.graph_gone)) == 0


_of_streams: dict[tuple[int, int], int] = {}
_of_captures: dict[tuple[int, int, int], _Workspace] = {}  # the latest of each device, capture and stream
_captured: list[_Workspace] = []  # all that captures ever got
_making = Lock()


def address(device_index: int, stream: int, num_bytes: int) -> int:
    """The workspace for a launch on a stream of the current device.

    Args:
        device_index: the current device.
        stream: the handle of torch's current stream.
        num_bytes: what the launch needs, at most ``MAX_WORKSPACE_BYTES``.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        return _of_capture(device_index, stream, num_bytes)
    found = _of_streams.get((device_index, stream))
    return found if found is not None else of_stream(device_index, stream)


def of_stream(device_index: int, stream: int) -> int:
    """The workspace for eager launches on a stream of the current device, whatever is captured now."""
    with _making:
        if (device_index, stream) not in _of_streams:
            memory = _allocate(MAX_WORKSPACE_BYTES)
            _zero(memory, MAX_WORKSPACE_BYTES)
            _of_streams[device_index, stream] = memory
        return _of_streams[device_index, stream]


def _of_capture(device_index: int, stream: int, num_bytes: int) -> int:
    from cuda.bindings import driver

    _, capture, graph, *_ = cuda_module.checked(driver.cuStreamGetCaptureInfo(stream))
    key = device_index, int(capture), stream
    with _making:
        known = _of_captures.get(key)
        if known is not None and known.num_bytes >= num_bytes:
            return known.address
        workspace = _reusable(device_index, num_bytes)
        if workspace is None:
            workspace = _Workspace(device_index, _allocate(num_bytes), num_bytes)
            _captured.append(workspace)
        _zero(workspace.address, workspace.num_bytes)
        workspace.belong_to(graph)
        workspace.key = key
        _of_captures[key] = workspace
        return workspace.address


def _reusable(device_index: int, num_bytes: int) -> _Workspace | None:
    """The smallest workspace on a device that is large enough and whose graph is gone."""
    for workspace in sorted(_captured, key=lambda known: known.num_bytes):
        fits = workspace.device_index == device_index and workspace.num_bytes >= num_bytes
        if fits and workspace.is_free():
            if _of_captures.get(workspace.key) is workspace:
                del _of_captures[workspace.key]
            return workspace
    return None


def _allocate(num_bytes: int) -> int:
    """New memory of the current device, outside of any capture, for good; not yet zeroed."""
    from cuda.bindings import driver

    with cuda_module.capture_allowed():
        (memory,) = cuda_module.checked(driver.cuMemAlloc(num_bytes))
    return int(memory)


def _zero(address: int, num_bytes: int) -> None:
    """Zeros memory of the current device that no launch uses now, outside of any capture."""
    from cuda.bindings import driver

    with cuda_module.capture_allowed():
        (side,) = cuda_module.checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        try:
            cuda_module.checked(driver.cuMemsetD8Async(address, 0, num_bytes, side))
            cuda_module.checked(driver.cuStreamSynchronize(side))
        finally:
            cuda_module.checked(driver.cuStreamDestroy(side))
