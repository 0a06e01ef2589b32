# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""How times are taken: CUDA graph replays for the device, a clock around eager calls for the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS = 40  # calls in a graph: as many as a model has layers
REPLAYS = 20
HOST_BATCHES = 15
HOST_CALLS = 200  # calls in a batch: few enough that the launch queue never fills


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: the median, and the extremes, of several measurements."""

    us: float
    us_min: float
    us_max: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Sample:
        return cls(statistics.median(times), min(times), max(times))


def graph_time(calls: Sequence[Callable[[], object]]) -> Sample:
    """Time of one of ``calls`` when a graph of them all is replayed.

    Calls that use different weights, together larger than L2, give cold times; equal ones give warm times.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return Sample.of(times[3:])


def host_times(calls: dict[str, Callable[[], object]]) -> dict[str, Sample]:
    """Host time of eager calls, which do not wait for the device.

    The batches of all providers take turns, because the clock of a busy host drifts by tens of per cent.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(HOST_CALLS):
            call()
    for _ in range(HOST_BATCHES):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize()
    return {name: Sample.of(values) for name, values in times.items()}
