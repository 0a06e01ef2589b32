# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Samples of times: CUDA graph replays for the device; eager calls for both together, and for the host alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dsv4_router.timing import CALLS, REPLAYS, cold_weights, graph_times, raise_clocks

__all__ = ["CALLS", "EagerSample", "Sample", "cold_weights", "eager_samples", "graph_samples", "raise_clocks"]

EAGER_BATCHES = 15
EAGER_CALLS = 200  # calls in a batch: few enough that the launch queue never fills
# Up to so many tokens graphs of the same calls differ, and each time is that of several. Above it a replay takes
# milliseconds, and half as many of one graph are enough.
_FEW_TOKENS, _CAPTURES = 1024, 4


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: the median, and the extremes, of several measurements."""

    us: float
    us_min: float
    us_max: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Sample:
        return cls(statistics.median(times), min(times), max(times))


@dataclass(frozen=True)
class EagerSample:
    """Eager calls: ``whole`` from the first call to the end of the device's work, ``host`` until the calls returned."""

    whole: Sample
    host: Sample


def graph_samples(calls: Mapping[str, Sequence[Callable[[], object]]], num_tokens: int) -> dict[str, Sample]:
    """The time of one of each provider's calls when a graph of them all is replayed, the providers taking turns.

    Calls that use different weights, together larger than L2, give cold times; equal ones give warm times.
    """
    replays, captures = (REPLAYS, _CAPTURES) if num_tokens <= _FEW_TOKENS else (REPLAYS // 2, 1)
    return {name: Sample.of(times) for name, times in graph_times(calls, replays, captures).items()}


def eager_samples(calls: Mapping[str, Callable[[], object]]) -> dict[str, EagerSample]:
    """Times of eager calls, which do not wait for the device.

    The batches of all providers take turns, because the clock of a busy host drifts by tens of per cent.
    """
    whole: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(EAGER_CALLS):
            call()
    for _ in range(EAGER_BATCHES):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(EAGER_CALLS):
                call()
            returned = time.perf_counter()
            torch.cuda.synchronize()
            host[name].append((returned - start) / EAGER_CALLS * 1e6)
            whole[name].append((time.perf_counter() - start) / EAGER_CALLS * 1e6)
    return {name: EagerSample(Sample.of(whole[name]), Sample.of(host[name])) for name in calls}
