# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Results as JSON lines and as tables, and their comparison with those of another run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from dsv4_router.backends import cuda_module

from .providers import OWN
from .timing import Sample

PACKAGES = (
    "torch",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "triton",
    "nvidia-cutlass-dsl",
    "vllm",
    "sglang",
    "flashinfer-python",
    "tile-kernels",
    "deep-gemm",
)
Line = dict[str, Any]
Cell = tuple[str, str, int, str, str, str]
CELL_FIELDS = ("bench", "shape", "num_tokens", "cache", "mode", "provider")
LINE_FIELDS = (*CELL_FIELDS, "us", "us_min", "us_max", "baseline", "ratio", "gpu", "versions", "date", "source_hash")


def source_hash() -> str:
    """A short hash of the kernels and of the code that chooses their tiles and launches them.

    The same for the same sources in a checkout and in an installed package, whose folders lie at other places.
    """
    backends = Path(cuda_module.__file__).parent
    files = [backends.parent / name for name in ("decode_config.py", "logits_config.py", "thresholds.py")]
    for folder in (cuda_module.kernel_folder(), backends):
        sources = (path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".py"))
        files += sorted(sources, key=attrgetter("name"))
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def file_name(gpu: str) -> str:
    """The results file of a GPU model: ``h100.jsonl`` for "NVIDIA H100 80GB HBM3"."""
    model = re.sub(r"\b\d+ ?GB\b.*", "", re.sub(r"\b(NVIDIA|GeForce)\b", "", gpu))
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") + ".jsonl"


class Report:
    """Collects the lines of a run; in :meth:`kept_in`, in a file too."""

    def __init__(self, versions: Mapping[str, str] = MappingProxyType({})) -> None:
        """``versions`` are of what is used beside the installed :data:`PACKAGES`."""
        installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
        self.common: Line = {
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: installed[name] for name in PACKAGES if name in installed} | dict(versions),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "source_hash": source_hash(),
        }
        self.lines: list[Line] = []
        self._file: TextIO | None = None

    @contextmanager
    def kept_in(self, path: Path | None) -> Iterator[None]:
        """Writes each line as soon as it is added, if there is a path, to a file beside it, which takes it in the end.

        Until then the file's name ends with ``.part``. Where a run is cut off it stays, with the lines so far, and so
        does what was at the path.

        Raises:
            OSError: the file cannot be written.
        """
        if path is None:
            yield
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        with partial.open("w", encoding="utf-8") as self._file:
            try:
                yield
            finally:
                self._file = None
        partial.replace(path)

    def add(
        self,
        bench: str,
        shape: str,
        num_tokens: int,
        cache: str,
        mode: str,
        samples: Mapping[str, Sample],
        more: Mapping[str, Line] | None = None,
    ) -> None:
        """One line a provider; the ratio is to the first provider, the named baseline.

        Args:
            bench, shape, num_tokens, cache, mode: the fields of that name.
            samples: by provider.
            more: further fields, by provider.
        """
        baseline = next(iter(samples))
        for provider, sample in samples.items():
            line: Line = (
                {"bench": bench, "shape": shape, "num_tokens": num_tokens, "cache": cache, "mode": mode}
                | {"provider": provider, "us": round(sample.us, 3)}
                | {"us_min": round(sample.us_min, 3), "us_max": round(sample.us_max, 3)}
                | {"baseline": baseline, "ratio": round(sample.us / samples[baseline].us, 3)}
                | ({} if more is None else more[provider])
                | self.common
            )
            self.lines.append(line)
            if self._file is not None:
                print(json.dumps(line), file=self._file, flush=True)


def read_lines(path: Path) -> list[Line]:
    """The lines of a results file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not one of the benchmark's.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object ({error})") from None
        missing = set(LINE_FIELDS) - set(line) if isinstance(line, dict) else set(LINE_FIELDS)
        if missing:
            raise ValueError(
                f"{path}:{number}: expected a line of the benchmark, got none of {', '.join(sorted(missing))}"
            )
        lines.append(line)
    return lines


def show(lines: Sequence[Line], console: Console) -> None:
    """A table for each bench, shape, mode and cache: a row for each number of tokens, a column for each provider."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["bench"], line["shape"], line["mode"], line["cache"]), []).append(line)
    for group, of_group in groups.items():
        providers = list(dict.fromkeys(line["provider"] for line in of_group))
        table = Table(
            title=f"{', '.join(group)}: microseconds (ratio to {of_group[0]['baseline']})", title_justify="left"
        )
        table.add_column("tokens", justify="right")
        for provider in providers:
            table.add_column(provider, justify="right")
        for num_tokens in dict.fromkeys(line["num_tokens"] for line in of_group):
            cells = {line["provider"]: line for line in of_group if line["num_tokens"] == num_tokens}
            row = [f"{cells[p]['us']:.2f} ({cells[p]['ratio']:.2f})" if p in cells else "" for p in providers]
            table.add_row(str(num_tokens), *row)
        console.print(table)


@dataclass(frozen=True)
class Change:
    """A cell's ratio to the baseline of its own run, then and now; ``us`` is now's time."""

    cell: Cell
    before: float
    now: float
    us: float

    def __str__(self) -> str:
        bench, shape, num_tokens, cache, mode, provider = self.cell
        share = self.now / self.before - 1
        return (
            f"{bench} {shape} {num_tokens} tokens {cache} {mode} {provider}: "
            f"ratio {self.before:.3f} -> {self.now:.3f} ({share:+.1%}), {self.us:.2f} us"
        )


@dataclass(frozen=True)
class Changes:
    """What :func:`compare` found.

    Attributes:
        worse, better: by more than the tolerance. same: number of the other cells of both.
        only_before, only_now: cells of one side, or of both but with different baselines.
    """

    worse: list[Change]
    better: list[Change]
    same: int
    only_before: list[Cell]
    only_now: list[Cell]

    @property
    def ok(self) -> bool:
        return not self.worse and bool(self.better or self.same)


def _watched(lines: Iterable[Line]) -> dict[tuple[Cell, str], Line]:
    """The cells of this project's own providers that have a baseline, by cell and baseline."""
    found = {}
    for line in lines:
        if line["provider"] in OWN and line["provider"] != line["baseline"]:
            bench, shape, num_tokens, cache, mode, provider = (line[field] for field in CELL_FIELDS)
            found[(bench, shape, num_tokens, cache, mode, provider), line["baseline"]] = line
    return found


def compare(before: Iterable[Line], now: Iterable[Line], tolerance: float) -> Changes:
    """Compares ratios to the baseline of the same run, since absolute times move between machines.

    Args:
        before: lines of the run to compare with. now: lines of this one.
        tolerance: the share by which a ratio may grow.
    """
    old, new = _watched(before), _watched(now)
    changes = [Change(key[0], old[key]["ratio"], line["ratio"], line["us"]) for key, line in new.items() if key in old]
    worse = [change for change in changes if change.now > change.before * (1 + tolerance)]
    better = [change for change in changes if change.now < change.before / (1 + tolerance)]
    return Changes(
        worse,
        better,
        len(changes) - len(worse) - len(better),
        [cell for cell, baseline in old if (cell, baseline) not in new],
        [cell for cell, baseline in new if (cell, baseline) not in old],
    )


def _grouped(cells: Iterable[Cell]) -> list[str]:
    """Cells in few lines: those that differ in the number of tokens alone, together."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for bench, shape, num_tokens, cache, mode, provider in cells:
        groups.setdefault((bench, shape, cache, mode, provider), []).append(num_tokens)
    return [f"{' '.join(group)}: {', '.join(map(str, tokens))} tokens" for group, tokens in groups.items()]


def show_changes(changes: Changes, tolerance: float, console: Console) -> None:
    """Prints what :func:`compare` found."""
    for title, found in (("worse", changes.worse), ("better", changes.better)):
        for change in found:
            console.print(f"{title}: {change}", soft_wrap=True)
    for title, cells in (("not in this run", changes.only_before), ("only in this run", changes.only_now)):
        for text in _grouped(cells):
            console.print(f"{title}: {text}", soft_wrap=True)
    compared = len(changes.worse) + len(changes.better) + changes.same
    console.print(
        f"compared {compared} cells, tolerance {tolerance:.0%}: "
        f"{len(changes.worse)} worse, {len(changes.better)} better, {changes.same} the same"
    )
