# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Draws latency, and its ratio to the baseline, against tokens from the benchmark's JSON lines. Needs matplotlib.

Lines of phases make a figure of their own: a bar for each shape and token count.

python profiling/plots.py profiling/results/h200.jsonl --out profiling/plots
python profiling/plots.py profiling/results/h200-decode-phases.jsonl --out profiling/plots
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .providers import ALONE, COMPILED, EAGER, EMPTY, STREAM
from .report import Line, read_lines

# Of each provider: colour, line style, marker. Own paths stand out, floors are dashed.
STYLES = {
    "vllm": ("#555555", "-", "o"),
    "vllm GEMM + hash_from_logits": ("#555555", "-", "o"),
    "decode": ("#0b6e4f", "-", "o"),
    "cublas": ("#1f77b4", "-", "o"),
    "activation_topk": ("#0b6e4f", "-", "o"),
    "hash_from_hidden": ("#0b6e4f", "-", "o"),
    "batch_invariant": ("#0b6e4f", "-", "o"),
    EAGER: ("#c44e52", "-", "s"),
    COMPILED: ("#dd8452", "-", "s"),
    EMPTY: ("#999999", ":", ""),
    STREAM: ("#999999", "--", ""),
    ALONE: ("#999999", "--", ""),
}
PHASES = ("#999999", "#1f77b4", "#0b6e4f", "#dd8452", "#c44e52")  # launch, load, MMA, hand-off, select
OTHERS = ("#8172b3", "#937860", "#da8bc3")  # of further peers, in the order in which they come
CACHES = ("warm", "cold")
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "dsv4-router",  # the same file from the same lines
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
}


def _styles(providers: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    others = [provider for provider in providers if provider not in STYLES]
    return STYLES | {name: (OTHERS[i % len(OTHERS)], "-", "^") for i, name in enumerate(others)}


def _draw_panel(axes: Any, lines: Sequence[Line], field: str) -> None:
    providers = list(dict.fromkeys(line["provider"] for line in lines))
    styles = _styles(providers)
    for provider in providers:
        colour, style, marker = styles[provider]
        points = sorted((line["num_tokens"], line[field]) for line in lines if line["provider"] == provider)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, linestyle=style, marker=marker, color=colour, label=provider)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis that holds the values, with a tick at each power of two."""
    low, high = min(values) / 1.1, max(values) * 1.1
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _with_ratio(lines: Sequence[Line]) -> list[Line]:
    without = (EMPTY, STREAM, ALONE, EAGER, COMPILED)
    return [line for line in lines if line["provider"] not in (*without, line["baseline"])]


def figure(lines: Sequence[Line], field: str) -> Figure:
    """The figure of one bench and mode: a column of panels a shape, a row a cache.

    Args:
        lines: of that bench and mode.
        field: ``us``, or ``ratio``, which has a line at 1, and neither floors nor PyTorch, far off as they are.
    """
    if field == "ratio":
        lines = _with_ratio(lines)
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    caches = [cache for cache in CACHES if any(line["cache"] == cache for line in lines)]
    size = 1.2 + 3.6 * len(shapes), 1.4 + 2.6 * len(caches)
    made = Figure(figsize=size, layout="constrained")
    panels = made.subplots(len(caches), len(shapes), squeeze=False, sharex=True, sharey=True)
    for row, cache in zip(panels, caches, strict=True):
        row[0].set_ylabel("microseconds a call" if field == "us" else f"time / time of {lines[0]['baseline']}")
        for axes, shape in zip(row, shapes, strict=True):
            _draw_panel(axes, [line for line in lines if (line["shape"], line["cache"]) == (shape, cache)], field)
            _scale(axes.xaxis, [line["num_tokens"] for line in lines])
            if field == "us":
                _scale(axes.yaxis, [line["us"] for line in lines])
            else:
                axes.axhline(1, color="#555555", linewidth=1)
                axes.set_ylim(0, max(1.05, *(1.05 * line["ratio"] for line in lines)))
            axes.tick_params(axis="x", labelrotation=45)
            axes.set_title(f"{shape}, {cache}", loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    first = lines[0]
    made.suptitle(f"{first['bench']}, {first['mode']}: {first['gpu']}, {first['date']}", x=0.01, ha="left")
    entries: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    made.legend(entries.values(), entries, loc="outside lower center", ncols=min(5, len(entries)))
    return made


def phase_figure(lines: Sequence[Line]) -> Figure:
    """Bars of ``phases_us``, microseconds by the name of a phase, one for each line."""
    made = Figure(figsize=(7.2, 1.4 + 0.35 * len(lines)), layout="constrained")
    axes = made.subplots()
    names = ["{shape}, {num_tokens} tokens, {cache}".format(**line) for line in lines]
    ends = [0.0] * len(lines)
    for phase, colour in zip(lines[0]["phases_us"], PHASES, strict=True):
        lengths = [line["phases_us"][phase] for line in lines]
        axes.barh(names, lengths, left=ends, color=colour, label=phase)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set_xlabel("microseconds")
    made.suptitle(f"decode: {lines[0]['gpu']}, {lines[0]['date']}", x=0.01, ha="left")
    made.legend(loc="outside lower center", ncols=len(PHASES))
    return made


def _save(made: Figure, stem: Path) -> list[Path]:
    written = []
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
        path = stem.with_name(f"{stem.name}.{kind}")
        made.savefig(path, **options)
        written.append(path)
    return written


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Writes the figures of all benches with a token axis, as SVG and PNG; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["bench"], line["mode"]), []).append(line)
    written = []
    with matplotlib.rc_context(SETTINGS):
        for (bench, mode), of_group in groups.items():
            if len({line["num_tokens"] for line in of_group}) < 2:
                continue
            for field, name in (("us", "latency"), ("ratio", "ratio")):
                if field == "ratio" and not _with_ratio(of_group):
                    continue
                written += _save(figure(of_group, field), folder / f"{bench}-{mode}-{name}")
    return written


def draw_phases(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Writes the figure of phases as SVG and PNG; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):
        return _save(phase_figure(lines), folder / lines[0]["bench"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines of the benchmark")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the figures go")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    of_phases = bool(lines) and all("phases_us" in line for line in lines)
    written = draw_phases(lines, options.out) if of_phases else draw(read_lines(options.results), options.out)
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
