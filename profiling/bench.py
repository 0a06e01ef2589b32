# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Times the paths against other routers that are installed, PyTorch and the floors, on one GPU, in one run.

Every provider is checked against float64 before it is timed. Results are JSON lines, whose fields profiling/README.md
lists; the first provider of a group of lines is its baseline.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import peers, report, timing
from .cases import BENCHES, MODES, SHAPES, Case, Selection, Session, all_cases
from .profile_call import positives


def _names(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """The parser of an option that names some of ``choices``, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in choices]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {', '.join(unknown)!r}")
        return chosen

    return parse


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a share of at least 0, such as 0.05, got {text!r}")
    return value


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def some(option: str, choices: Sequence[str], text: str) -> None:
        made.add_argument(
            option, type=_names(choices), default=tuple(choices), metavar="A,B", help=f"{text}: {', '.join(choices)}"
        )

    some("--only", BENCHES, "benches to run, of")
    some("--shapes", tuple(SHAPES), "models, of")
    some("--modes", MODES, "modes, of")
    made.add_argument("--tokens", type=positives, metavar="N,N", help="token counts, instead of each bench's own")
    made.add_argument("--quick", action="store_true", help="dense routing of few tokens in graphs, against the peers")
    made.add_argument("--out", type=Path, help="file for the JSON lines, or a folder, where the GPU names the file")
    made.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw figures there; needs matplotlib")
    made.add_argument("--compare", type=Path, metavar="FILE", help="exit 1 if a ratio is worse than in that file")
    made.add_argument("--tolerance", type=_tolerance, default=0.05, help="share by which a ratio may grow (0.05)")
    return made


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run_cases(cases: Sequence[Case]) -> tuple[dict[str, float], list[Case]]:
    """Runs the cases under a progress bar.

    Returns:
        The seconds that each bench and mode took, and the cases that raised, whose errors have been printed: one wrong
        cell does not cost the others.
    """
    seconds: dict[str, float] = {}
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.bench} {case.mode} {case.shape} {case.num_tokens} tokens")
            start = time.monotonic()
            try:
                case.run()
            except Exception:
                failed.append(case)
                traceback.print_exc()
            name = f"{case.bench} {case.mode}"
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            progress.advance(task)
    return seconds, failed


def _say_once() -> Callable[[str], None]:
    """Prints each remark when it first comes up."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            _say(text)

    return say


def _draw(lines: Sequence[report.Line], folder: Path) -> None:
    try:
        from . import plots
    except ImportError as error:
        _say(f"no plots: {error}; profiling/plots.py draws them from the JSON lines elsewhere")
    else:
        plots.draw(lines, folder)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None means this process's.
        program: its name in messages.

    Raises:
        SystemExit: 2 if an argument is wrong; 1 if there is no GPU, one of this project's paths failed or differs from
            float64, or the comparison found something worse.
        OSError, ValueError: a file given cannot be read or written.
    """
    made = parser(program)
    options = made.parse_args(arguments)
    before = None if options.compare is None else report.read_lines(options.compare)
    if not torch.cuda.is_available():
        _say("needs a CUDA GPU; torch sees none")
        raise SystemExit(1)
    say = _say_once()
    found = peers.find_peers(say)
    versions = {peer.name: peer.version for peer in found if peer.version is not None}
    session = Session(report.Report(versions), found, say, options.quick)
    chosen = Selection(options.only, options.shapes, options.modes, options.tokens, options.quick)
    cases = all_cases(session, chosen)
    if not cases:
        made.error("these options leave no case to run")
    out = options.out
    if out is not None and out.is_dir():
        out = out / report.file_name(session.report.common["gpu"])
    with session.report.kept_in(out):
        timing.raise_clocks()
        seconds, failed = run_cases(cases)
    lines, console = session.report.lines, Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(f"{session.report.common['gpu']}, source {session.report.common['source_hash']}")
    report.show(lines, console)
    say("seconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items()))
    if options.plots is not None:
        _draw(lines, options.plots)
    ok = not failed
    for case in failed:
        say(f"failed: {case.bench} {case.mode} {case.shape} {case.num_tokens} tokens")
    if before is not None:
        changes = report.compare(before, lines, options.tolerance)
        report.show_changes(changes, options.tolerance, console)
        ok = ok and changes.ok
    if not ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
