# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""How ``dsv4-router`` takes times on a GPU: CUDA graphs of as many dependent calls as a model has layers, replayed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

CALLS = 40  # in a graph
REPLAYS = 28
_LARGEST_PRODUCT = 2048  # rows of the products before replays, and both other sizes of all of them
_L2_SHARES = 1.5  # how much larger than L2 the weights of calls with cold caches are together


def cold_weights(weight: torch.Tensor) -> list[torch.Tensor]:
    """At least :data:`CALLS` weights, together larger than the device's L2: ``weight`` [E, H] with its rows rolled.

    Calls that take them in turn find none of them in L2.
    """
    l2_bytes = torch.cuda.get_device_properties(weight.device).L2_cache_size
    count = max(CALLS, -(-int(_L2_SHARES * l2_bytes) // weight.nbytes))
    return [weight, *(torch.roll(weight, shift, 0) for shift in range(1, count))]


def graph_times(
    calls: Mapping[str, Sequence[Callable[[], object]]], replays: int = REPLAYS, captures: int = 1
) -> dict[str, list[float]]:
    """Microseconds per call in each replay of a graph, for several graphs that take turns.

    In turns, because the clocks of a GPU drift. Short calls that follow each other take up to a tenth more or less by
    what ran before them, and go on so in every replay of the same graphs. In a model other kernels run in between, and
    so they do here: before each timed replay comes a product of random size. Next comes a replay that is not timed. It
    brings back to the caches what others took their place of, and meanwhile the host has the timed one launched, so
    that no time of the host counts.

    Graphs of the same calls, too, may differ by where in memory they put things. So all graphs exist at the same time,
    and none gets the memory of one that is gone.

    Args:
        calls: the calls of each graph, by any name; they run one after the other, on the current device.
        replays: how often the graphs of a name are timed, together; rounded up to a multiple of ``captures``.
        captures: how many graphs there are of the same calls.
    """
    side = torch.cuda.Stream()
    for of_graph in calls.values():
        with torch.cuda.stream(side):
            for call in of_graph[:3]:
                call()
    torch.cuda.synchronize()
    graphs = [(name, torch.cuda.CUDAGraph()) for _ in range(captures) for name in calls]
    for name, graph in graphs:
        with torch.cuda.graph(graph):
            for call in calls[name]:
                call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    square = torch.randn(_LARGEST_PRODUCT, _LARGEST_PRODUCT, device="cuda")
    product = torch.empty_like(square)
    choose = random.Random(0)
    for _ in range(-(-replays // captures)):
        for name, graph in graphs:
            rows = choose.randrange(64, _LARGEST_PRODUCT + 1, 64)
            torch.mm(square[:rows], square, out=product[:rows])
            graph.replay()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(calls[name]))
    return times


def graph_medians(calls: Mapping[str, Sequence[Callable[[], object]]], replays: int = REPLAYS) -> dict[str, float]:
    """The medians of :func:`graph_times`."""
    return {name: statistics.median(times) for name, times in graph_times(calls, replays).items()}


def raise_clocks(seconds: float = 1.0) -> None:
    """Keeps the current device busy until an idle GPU has come to its clocks: the first times double without that."""
    square = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(square, square)
        torch.cuda.synchronize()
