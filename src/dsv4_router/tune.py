# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""``dsv4-router tune``: up to how many tokens the decode path is the faster one on this machine's GPU.

Both paths are timed with warm and with cold caches, at a coarse range of token counts and then at every count around
the crossing. Neither time is smooth in the number of tokens, and caches move the crossing, so the threshold is the one
whose worst choice costs the least. :mod:`dsv4_router.thresholds` keeps it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import api, cli_reports, decode_config, dispatch, thresholds, timing
from .config import RouterConfig
from .errors import BackendUnavailableError

CACHES = ("warm", "cold")
COARSE = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 40, 48, 56, 64, 65, 72, 80, 88, 96, 104, 112, 120, 128)
BEYOND = (129, 160, 192, 256, 384, 512, 1024, 2048, 4096)  # where one launch of the decode kernel is not enough
_AROUND = 16  # counts on both sides of the crossing that are timed one by one


@dataclass(frozen=True)
class Effort:
    """How finely a shape is measured.

    Attributes:
        counts: of tokens, for the coarse range. step: between counts around the crossing.
        replays: of each graph.
    """

    counts: tuple[int, ...] = COARSE + BEYOND
    step: int = 1
    replays: int = timing.REPLAYS


QUICK = Effort((1, 16, 17, 32, 33, 48, 64, 65, 80, 96, 112, 128, 129, 256), step=4, replays=10)


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call on both paths; ``cache`` is one of :data:`CACHES`."""

    num_tokens: int
    cache: str
    decode: float
    cublas: float

    def regret(self, max_tokens: int) -> float:
        """How much longer the path that a threshold chooses takes, as a share of the better one's time."""
        chosen = self.decode if self.num_tokens <= max_tokens else self.cublas
        return chosen / min(self.decode, self.cublas) - 1


def worst(timings: Iterable[Timing], max_tokens: int) -> Timing:
    """The timing at which a threshold chooses worst."""
    return max(timings, key=lambda timing: timing.regret(max_tokens))


def best_threshold(timings: Sequence[Timing], most: int) -> int:
    """The threshold with the smallest worst regret; of equal ones that with the smallest sum, then the smallest.

    Args:
        timings: at least one.
        most: the largest threshold, rows of one launch.
    """
    candidates = {0, *(timing.num_tokens for timing in timings if timing.num_tokens <= most)}

    def cost(max_tokens: int) -> tuple[float, float, int]:
        regrets = [timing.regret(max_tokens) for timing in timings]
        return max(regrets), sum(regrets), max_tokens

    return min(candidates, key=cost)


def counts_around_crossing(timings: Sequence[Timing], most: int, step: int) -> list[int]:
    """Token counts to time next: from where the decode path is last the better one for sure to where it never is."""
    counts = sorted({timing.num_tokens for timing in timings})
    decode_wins = {count: [t.decode <= t.cublas for t in timings if t.num_tokens == count] for count in counts}
    lost = next((i for i, count in enumerate(counts) if not all(decode_wins[count])), len(counts))
    won = max((i for i, count in enumerate(counts) if any(decode_wins[count])), default=-1)
    low = counts[lost - 1] if lost else 1
    high = counts[won + 1] if won + 1 < len(counts) else most
    around = range(max(1, low - _AROUND), min(most + 1, high + _AROUND) + 1, step)
    return [count for count in around if count not in decode_wins]


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
    subject = Subject(config, max(effort.counts))
    timings: list[Timing] = []

    def take(counts: Sequence[int]) -> None:
        total = len(timings) // len(CACHES) + len(counts)
        for count in counts:
            timings.extend(subject.times(count, effort.replays))
            progress(len(timings) // len(CACHES), total)

    take(effort.counts)
    most = _rows_of_one_launch(config, torch.cuda.get_device_capability())
    take(counts_around_crossing(timings, most, effort.step))
    return sorted(timings, key=lambda taken: (taken.num_tokens, CACHES.index(taken.cache)))


def _rows_of_one_launch(config: RouterConfig, compute_capability: tuple[int, int]) -> int:
    sizes = config.hidden_size, config.num_experts, config.top_k
    return decode_config.max_tokens(*sizes, dispatch.architecture(compute_capability))


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
    max_tokens = best_threshold(timings, _rows_of_one_launch(config, compute_capability))
    return {
        "gpu": gpu,
        "compute_capability": list(compute_capability),
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "max_tokens": max_tokens,
        "worst_regret": {
            cache: _worst_of_cache(timings, cache, max_tokens) for cache in sorted({taken.cache for taken in timings})
        },
        "driver": driver_version(),
        "versions": cli_reports.versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "times": [list(astuple(taken)) for taken in timings],
    }


def _worst_of_cache(timings: Sequence[Timing], cache: str, max_tokens: int) -> dict[str, Any]:
    found = worst([taken for taken in timings if taken.cache == cache], max_tokens)
    return {"regret": round(found.regret(max_tokens), 4), "num_tokens": found.num_tokens}


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
        name: dispatch.decode_limit(config.hidden_size, config.num_experts, found).max_tokens
        for name, config in configs.items()
    }
    show(records, before, effort.counts, path)


def _show_progress(progress: Progress, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def show(
    records: Mapping[str, Mapping[str, Any]], before: Mapping[str, int], counts: Sequence[int], path: Path
) -> None:
    """Prints the thresholds and, for some counts, the times that they come from.

    Args:
        records: what was stored, by the shape's name.
        before: the thresholds that calls have followed so far.
        counts: the token counts whose times are printed, besides those on both sides of the threshold.
        path: where the records are.
    """
    console = cli_reports._console()
    summary = Table("model", "H", "E", "decode up to", "before", "worst choice, warm", "worst choice, cold")
    for name, record in records.items():
        sizes = (record["hidden_size"], record["num_experts"], record["max_tokens"], before[name])
        costs = (record["worst_regret"][cache] for cache in CACHES)
        summary.add_row(
            name,
            *map(str, sizes),
            *(f"{100 * cost['regret']:.1f} % slower, {cost['num_tokens']} tokens" for cost in costs),
        )
        times: dict[int, dict[str, tuple[float, float]]] = {}
        for num_tokens, cache, decode, cublas in record["times"]:
            times.setdefault(num_tokens, {})[cache] = (decode, cublas)
        limit = record["max_tokens"]
        table = Table(
            "tokens", *(f"{path}, {cache}" for cache in CACHES for path in ("decode", "cublas")), "taken", title=name
        )
        for num_tokens in sorted(times.keys() & {*counts, limit, limit + 1}):
            cells = (f"{time:.2f}" for cache in CACHES for time in times[num_tokens][cache])
            table.add_row(str(num_tokens), *cells, "decode" if num_tokens <= limit else "cublas")
        console.print(table)
    console.print(summary)
    console.print(f"Microseconds per call. Stored for new processes: {path}", soft_wrap=True)
