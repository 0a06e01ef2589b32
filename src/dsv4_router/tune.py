# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""``dsv4-router tune``: up to how many tokens the decode path is the faster one on this machine's GPU.

Both paths are timed with warm and with cold caches, at a coarse range of token counts and then around the crossing: at
every count that one launch takes, and at some beyond, more closely where ranges begin and end in which that path is
faster again. Neither time is smooth in the number of tokens, and caches move the crossing, so the threshold is the one
whose worst choice costs the least. Of hundreds of times the worst is an extreme: where a choice seems to cost much,
both paths are timed again, and means count. :mod:`dsv4_router.thresholds` keeps the threshold.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import api, cli_reports, decode_config, dispatch, thresholds, timing
from .config import RouterConfig
from .errors import BackendUnavailableError
from .thresholds import TokenRanges

CACHES = ("warm", "cold")
COARSE = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 40, 48, 56, 64, 65, 72, 80, 88, 96, 104, 112, 120, 128)
# Where one launch of the decode kernel is not enough; 257, 385, ... are the first counts of one more tile of rows.
BEYOND = (
    129, 144, 160, 192, 224, 256, 257, 288, 320, 352, 384, 385, 448, 512, 513, 576, 640, 641, 704, 768, 769, 896, 897,
    1024, 1025, 1152, 1280, 1408, 1409, 1536, 1792, 2048, 2049, 2304, 2560, 2816, 3072, 3584, 4096, 8192,
)  # fmt: skip
_AROUND = 16  # counts on both sides of the crossing that are timed too
_COARSER = 16  # times as far apart are they beyond one launch: within a tile of rows times change little
WORTH = 0.03  # beyond the threshold the decode path is taken where the other one would take longer by more than this


@dataclass(frozen=True)
class Effort:
    """How finely a shape is measured.

    Attributes:
        counts: of tokens, for the coarse range.
        step: between counts around the crossing that one launch takes.
        replays: of each graph.
        halvings: how often the gaps are halved in which a range beyond the threshold begins or ends.
        checks: how often the counts are timed again at which the best choice costs more than :data:`WORTH`.
    """

    counts: tuple[int, ...] = COARSE + BEYOND
    step: int = 1
    replays: int = timing.REPLAYS
    halvings: int = 5
    checks: int = 3


QUICK = Effort(
    (
        1,
        16,
        17,
        32,
        33,
        48,
        64,
        65,
        80,
        96,
        112,
        128,
        129,
        192,
        256,
        257,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4096,
        8192,
    ),
    step=4,
    replays=10,
    halvings=2,
    checks=1,
)


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call on both paths; ``cache`` is one of :data:`CACHES`."""

    num_tokens: int
    cache: str
    decode: float
    cublas: float

    def regret(self, max_tokens: int, also: TokenRanges = ()) -> float:
        """How much longer the path takes that a threshold and ranges choose, as a share of the better one's time."""
        chosen = self.decode if thresholds.includes(self.num_tokens, max_tokens, also) else self.cublas
        return chosen / min(self.decode, self.cublas) - 1


def worst(timings: Iterable[Timing], max_tokens: int, also: TokenRanges = ()) -> Timing:
    """The timing at which a threshold, and ranges beyond it, choose worst."""
    return max(timings, key=lambda timing: timing.regret(max_tokens, also))


def best_threshold(timings: Sequence[Timing], most: int) -> int:
    """The threshold that, with its :func:`ranges_beyond`, has the smallest worst regret.

    What is below :data:`WORTH` counts for nothing. Of equal thresholds it is the one with the smallest sum of what
    exceeds that, then with the fewest ranges, then with the smallest sum of all, then the smallest.

    Args:
        timings: at least one.
        most: the largest threshold.
    """
    candidates = {0, *(timing.num_tokens for timing in timings if timing.num_tokens <= most)}

    def cost(max_tokens: int) -> tuple[float, float, int, float, int]:
        also = ranges_beyond(timings, max_tokens, most)
        regrets = [timing.regret(max_tokens, also) for timing in timings]
        excess = [max(regret - WORTH, 0.0) for regret in regrets]
        return max(excess), sum(excess), len(also), sum(regrets), max_tokens

    return min(candidates, key=cost)


def ranges_beyond(timings: Iterable[Timing], max_tokens: int, most: int) -> TokenRanges:
    """Ranges beyond a threshold in which the decode path is the faster one again, at every count that was timed.

    That is where ``cublas`` would take longer by more than :data:`WORTH` with warm or with cold caches, and the decode
    path by less: times of both change in steps.
    """
    of_count: dict[int, list[Timing]] = {}
    for taken in sorted(timings, key=lambda taken: taken.num_tokens):
        if max_tokens < taken.num_tokens <= most:
            of_count.setdefault(taken.num_tokens, []).append(taken)
    ranges: list[tuple[int, int]] = []
    goes_on = False
    for count, found in of_count.items():
        if_cublas, if_decode = (max(taken.regret(limit) for taken in found) for limit in (0, most))
        is_better = if_cublas > WORTH and if_decode < if_cublas
        if is_better:
            ranges = [*ranges[:-1], (ranges[-1][0], count)] if goes_on else [*ranges, (count, count)]
        goes_on = is_better
    return tuple(ranges)


def best_choice(timings: Sequence[Timing], most: int) -> tuple[int, TokenRanges]:
    """The :func:`best_threshold` and its :func:`ranges_beyond`."""
    max_tokens = best_threshold(timings, most)
    return max_tokens, ranges_beyond(timings, max_tokens, most)


def counts_at_edges(timings: Sequence[Timing], most: int) -> list[int]:
    """Token counts to time next: halfway between neighbours beyond the threshold, one in a range and one in none."""
    max_tokens, also = best_choice(timings, most)
    counts = sorted({taken.num_tokens for taken in timings if max_tokens < taken.num_tokens <= most})
    return [
        (count + following) // 2
        for count, following in pairwise(counts)
        if following - count > 1 and thresholds.includes(count, 0, also) != thresholds.includes(following, 0, also)
    ]


def counts_in_doubt(timings: Sequence[Timing], most: int) -> list[int]:
    """Token counts to time again: at which the best threshold and ranges cost more than :data:`WORTH`."""
    max_tokens, also = best_choice(timings, most)
    return sorted({taken.num_tokens for taken in timings if taken.regret(max_tokens, also) > WORTH})


def means(timings: Iterable[Timing]) -> list[Timing]:
    """One timing of each count and cache state, in order: the means of all that were taken."""
    of_case: dict[tuple[int, str], list[Timing]] = {}
    for taken in timings:
        of_case.setdefault((taken.num_tokens, taken.cache), []).append(taken)
    return [
        Timing(*case, round(fmean(t.decode for t in found), 3), round(fmean(t.cublas for t in found), 3))
        for case, found in sorted(of_case.items(), key=lambda item: (item[0][0], CACHES.index(item[0][1])))
    ]


def counts_around_crossing(timings: Sequence[Timing], one_launch: int, most: int, step: int) -> list[int]:
    """Token counts to time next: from where the decode path is last the better one for sure to where it never is.

    Args:
        timings: at least one.
        one_launch: up to so many tokens counts are ``step`` apart, beyond :data:`_COARSER` times as far.
        most: the largest threshold.
    """
    counts = sorted({timing.num_tokens for timing in timings})
    decode_wins = {count: [t.decode <= t.cublas for t in timings if t.num_tokens == count] for count in counts}
    lost = next((i for i, count in enumerate(counts) if not all(decode_wins[count])), len(counts))
    won = max((i for i, count in enumerate(counts) if any(decode_wins[count])), default=-1)
    low = counts[lost - 1] if lost else 1
    high = counts[won + 1] if won + 1 < len(counts) else most
    first, last = max(1, low - _AROUND), min(most + 1, high + _AROUND)
    beyond = _COARSER * step
    fine = range(first, min(last, one_launch + 1) + 1, step)
    coarse = range(-(-max(first, one_launch + 2) // beyond) * beyond, last + 1, beyond)
    return [count for count in (*fine, *coarse) if count not in decode_wins]


class Subject:
    """The tensors of one shape's calls, and their times."""

    def __init__(self, config: RouterConfig, most_tokens: int) -> None:
        """Makes them on the current device, for up to ``most_tokens`` tokens."""
        self._config = config
        self._hidden = torch.randn(most_tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
        gate = torch.randn(config.num_experts, config.hidden_size, device="cuda") * config.hidden_size**-0.5
        self._gates = timing.cold_weights(gate.bfloat16())
        self._bias = torch.randn(config.num_experts, device="cuda") * 0.1
        self._weights = torch.empty(most_tokens, config.top_k, device="cuda")
        self._ids = torch.empty(most_tokens, config.top_k, device="cuda", dtype=torch.int32)

    def _call(self, num_tokens: int, backend: str, gate: torch.Tensor) -> None:
        config = self._config
        api.dense_router_dispatch(
            self._hidden[:num_tokens],
            gate,
            self._bias,
            config.top_k,
            config.routed_scaling_factor,
            self._weights[:num_tokens],
            self._ids[:num_tokens],
            backend=backend,
        )

    def times(self, num_tokens: int, replays: int) -> list[Timing]:
        """Both paths with warm and with cold caches."""
        taken = []
        for cache, gates in zip(CACHES, (self._gates[:1] * timing.CALLS, self._gates), strict=True):
            calls: dict[str, list[Callable[[], object]]] = {
                backend: [partial(self._call, num_tokens, backend, gate) for gate in gates]
                for backend in ("decode", "cublas")
            }
            medians = timing.graph_medians(calls, replays)
            taken.append(Timing(num_tokens, cache, round(medians["decode"], 3), round(medians["cublas"], 3)))
        return taken


def check_device(device: torch.device, configs: Iterable[RouterConfig]) -> None:
    """Raises unless a device has both paths for every shape.

    Raises:
        BackendUnavailableError: with what is missing.
    """
    if device.type != "cuda":
        seen = "" if torch.cuda.is_available() else "; torch sees none"
        raise BackendUnavailableError(f"tune needs a CUDA GPU, got {device}{seen}")
    found = dispatch.availability(device)
    for config in configs:
        request = dispatch.Request(config.hidden_size, config.num_experts, config.top_k, 1)
        for path, why in dispatch.plan_refusals(request, found, ("decode", "cublas")):
            raise BackendUnavailableError(f"tune compares the decode path with the cublas path: no {path} path, {why}")


def measure(config: RouterConfig, effort: Effort, progress: Callable[[int, int], object]) -> list[Timing]:
    """Times a shape on the current device.

    Args:
        config: the shape.
        effort: how finely.
        progress: is told how many counts are done, and of how many.
    """
    one_launch, most = _largest_counts(config, torch.cuda.get_device_capability())
    subject = Subject(config, max(*effort.counts, most + 1))
    timings: list[Timing] = []

    def take(counts: Sequence[int]) -> None:
        total = len(timings) // len(CACHES) + len(counts)
        for count in counts:
            timings.extend(subject.times(count, effort.replays))
            progress(len(timings) // len(CACHES), total)

    take(effort.counts)
    take(counts_around_crossing(timings, one_launch, most, effort.step))
    for _ in range(effort.halvings):
        take(counts_at_edges(timings, most))
    for _ in range(effort.checks):
        take(counts_in_doubt(means(timings), most))
    return means(timings)


def _largest_counts(config: RouterConfig, compute_capability: tuple[int, int]) -> tuple[int, int]:
    """Of tokens in one launch, and of any threshold."""
    sizes = config.hidden_size, config.num_experts, config.top_k
    found = dispatch.Availability("cuda", compute_capability)
    one_launch = decode_config.max_tokens(*sizes, dispatch.architecture(compute_capability))
    return one_launch, dispatch.most_tokens(dispatch.Request(*sizes, 1), found)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA driver's version, or ``unknown``."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", file.read_text())
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"


def make_record(
    config: RouterConfig, gpu: str, compute_capability: tuple[int, int], timings: Sequence[Timing]
) -> dict[str, Any]:
    """What ``tune`` stores of a shape; ``times`` are rows of tokens, cache, and microseconds of decode and cublas."""
    _, most = _largest_counts(config, compute_capability)
    max_tokens, also = best_choice(timings, most)
    return {
        "gpu": gpu,
        "compute_capability": list(compute_capability),
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "max_tokens": max_tokens,
        "also": [list(each) for each in also],
        "worst_regret": {
            cache: _worst_of_cache(timings, cache, max_tokens, also)
            for cache in sorted({taken.cache for taken in timings})
        },
        "driver": driver_version(),
        "versions": cli_reports.versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "times": [list(astuple(taken)) for taken in timings],
    }


def _worst_of_cache(timings: Sequence[Timing], cache: str, max_tokens: int, also: TokenRanges) -> dict[str, Any]:
    found = worst([taken for taken in timings if taken.cache == cache], max_tokens, also)
    return {"regret": round(found.regret(max_tokens, also), 4), "num_tokens": found.num_tokens}


def tune(configs: Mapping[str, RouterConfig], device: torch.device, effort: Effort, output: Path | None) -> None:
    """Measures shapes on a GPU, prints and stores their thresholds.

    Args:
        configs: the shapes, by name.
        device: a CUDA device, with its index.
        effort: how finely.
        output: where to write the records of this run as well, or None.

    Raises:
        BackendUnavailableError: the device lacks one of the paths.
        OSError: the cache folder, or the output's, cannot be written.
    """
    check_device(device, configs.values())
    cli_reports.check_cache()  # before minutes are spent on what could not be stored
    found = dispatch.availability(device)
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    records: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} counts"))
    with (
        torch.cuda.device(device),
        Progress(*columns, TimeElapsedColumn(), console=cli_reports._console(stderr=True)) as progress,
    ):
        timing.raise_clocks()
        for name, config in configs.items():
            task = progress.add_task(name, total=None)
            told = partial(_show_progress, progress, task)
            records[name] = make_record(config, gpu, capability, measure(config, effort, told))
    path = thresholds.store(records.values(), gpu)
    if output is not None:
        thresholds.write(records.values(), output)
    before = {
        name: str(dispatch.decode_limit(config.hidden_size, config.num_experts, found))
        for name, config in configs.items()
    }
    show(records, before, effort.counts, path)


def _show_progress(progress: Progress, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def show(
    records: Mapping[str, Mapping[str, Any]], before: Mapping[str, str], counts: Sequence[int], path: Path
) -> None:
    """Prints the thresholds and, for some counts, the times that they come from.

    Args:
        records: what was stored, by the shape's name.
        before: the thresholds that calls have followed so far.
        counts: the token counts whose times are printed, besides those at the threshold and the ranges' ends.
        path: where the records are.
    """
    console = cli_reports._console()
    summary = Table("model", "H", "E", "decode", "before", "worst choice, warm", "worst choice, cold")
    for name, record in records.items():
        limit = thresholds.Limit(record["max_tokens"], "", tuple((first, last) for first, last in record["also"]))
        sizes = (record["hidden_size"], record["num_experts"], limit, before[name])
        costs = (record["worst_regret"][cache] for cache in CACHES)
        summary.add_row(
            name,
            *map(str, sizes),
            *(f"{100 * cost['regret']:.1f} % slower, {cost['num_tokens']} tokens" for cost in costs),
        )
        times: dict[int, dict[str, tuple[float, float]]] = {}
        for num_tokens, cache, decode, cublas in record["times"]:
            times.setdefault(num_tokens, {})[cache] = (decode, cublas)
        table = Table(
            "tokens", *(f"{path}, {cache}" for cache in CACHES for path in ("decode", "cublas")), "taken", title=name
        )
        ends = (0, limit.max_tokens), *limit.also
        edges = {count + i for first, last in ends for count in (first - 1, last) for i in (0, 1)}
        for num_tokens in sorted(times.keys() & {*counts, *edges}):
            cells = (f"{time:.2f}" for cache in CACHES for time in times[num_tokens][cache])
            table.add_row(str(num_tokens), *cells, "decode" if limit.includes(num_tokens) else "cublas")
        console.print(table)
    console.print(summary)
    console.print(f"Microseconds per call. Stored for new processes: {path}", soft_wrap=True)
