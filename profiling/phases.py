# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""How long the phases of the decode kernel take, warm and cold: by time stamps of the block that owns row 0.

  python profiling/phases.py --out profiling/results/h200-decode-phases.jsonl [--shape v4-pro] [--tokens 1,8]

Launches follow each other as in a model's graph. "launch" is the time of a call less all others: from the outputs until
the next launch has waited for them. "load" ends when the gate tile and the hidden states have come (of many rows: the
first chunk), "MMA" when the block has its sums, "hand-off" when all warps have all of the row's packets, "select" with
the outputs. plots.py draws the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import torch

from dsv4_router import decode_config, timing
from dsv4_router.backends import decode
from dsv4_router.config import PRESETS, RouterConfig

from . import report
from .profile_call import Parser, positives
from .providers import Dense, checked

SHAPES, TOKENS = ("v4-pro", "v4-flash"), (1, 8, 16, 64)
PHASES = ("load", "MMA", "hand-off", "select")
_REPLAYS = 40
_SPARE_ROWS = 4  # of logits, for stamps: 16 warps' in the fewest experts


def counts(text: str) -> tuple[int, ...]:
    """Numbers of tokens that one launch takes, with commas between."""
    found = positives(text)
    if max(found) > decode_config.TOKEN_TILES[-1]:
        raise argparse.ArgumentTypeError(f"expected numbers up to {decode_config.TOKEN_TILES[-1]}, got {text!r}")
    return found


def parser(program: str | None = None) -> Parser:
    """The command's options."""
    made = Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=tuple(PRESETS), action="append", help="may be repeated; without it, two")
    made.add_argument("--tokens", type=counts, default=TOKENS, help=f"of one launch ({','.join(map(str, TOKENS))})")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    return made


class Calls:
    """Calls of the decode path for some rows of a model, each with logits of its own; right ones, or there are none."""

    def __init__(self, config: RouterConfig, num_tokens: int, cold: bool) -> None:
        self._dense = Dense.random(config, num_tokens, "cuda")
        weights = range(len(self._dense.gates)) if cold else [0] * timing.CALLS
        self._logits = torch.zeros(len(weights), num_tokens + _SPARE_ROWS, config.num_experts, device="cuda")
        self._calls = [
            partial(self._dense.own(backend="decode", logits_out=logits), i)
            for i, logits in zip(weights, self._logits[:, :num_tokens], strict=True)
        ]
        self.check()

    def us(self) -> float:
        """Microseconds of a call."""
        return timing.graph_medians({"calls": self._calls})["calls"]

    def take_stamps(self) -> int:
        """From now on the kernel has stamps, of as many warps, in all calls of these sizes."""
        from .stamped_kernel import StampedDecodeKernel

        config = self._dense.config
        sizes = config.hidden_size, config.num_experts, config.top_k
        variant = decode.replace_kernel(StampedDecodeKernel, torch.cuda.current_device(), sizes, self._dense.num_tokens)
        return variant.num_warps

    def check(self) -> None:
        """Compares a call's results with float64."""
        checked({"decode": lambda i: self._calls[i]()}, self._dense.compare, self._dense.mine, print)

    def stamps(self, num_warps: int) -> torch.Tensor:
        """Of each launch that follows another one, and each warp: [launches, warps, words]."""
        from .stamped_kernel import WORDS

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in self._calls:
                call()
        taken = []
        for _ in range(_REPLAYS):
            self._logits.zero_()
            graph.replay()
            words = self._logits[1:, self._dense.num_tokens :].flatten(1).view(torch.int32)
            taken.append(words[:, : num_warps * WORDS].long().cpu() & 0xFFFFFFFF)
        return torch.cat(taken).view(-1, num_warps, WORDS)


def phases(stamps: torch.Tensor) -> tuple[dict[str, float], float]:
    """Median cycles of each phase, and the clock in GHz.

    Args:
        stamps: as :meth:`Calls.stamps` returns them; 0 where a warp leaves none.
    """
    from . import stamped_kernel as of

    start = stamps[:, : decode_config.MMA_WARPS, of.WAITED].amin(1)  # the last warp may wait later than it is stamped
    since = (stamps - start[:, None, None]) & 0xFFFFFFFF
    since[stamps == 0] = 0  # of phases that not all warps take part in
    cycles, last = {}, torch.zeros_like(start)
    for name, which in zip(PHASES, (of.LOADED, of.SUMMED, of.COLLECTED, of.STORED), strict=True):
        end = since[:, :, which].amax(1)
        cycles[name] = statistics.median((end - last).tolist())
        last = end
    whole = ((stamps[:, 0, of.STORED] - stamps[:, 0, of.WAITED]) & 0xFFFFFFFF).double().mean()
    nanoseconds = ((stamps[:, 0, of.LAST_NS] - stamps[:, 0, of.FIRST_NS]) & 0xFFFFFFFF).double().mean()
    return cycles, float(whole / nanoseconds)  # means, for %globaltimer counts in steps of many nanoseconds


def measure(shapes: Sequence[str], tokens: Sequence[int]) -> Iterator[report.Line]:
    """A line of results for each shape and number of tokens, warm and cold."""
    common = report.Report().common
    for shape, num_tokens in product(shapes, tokens):
        both = {"warm": Calls(PRESETS[shape], num_tokens, False), "cold": Calls(PRESETS[shape], num_tokens, True)}
        without = {cache: calls.us() for cache, calls in both.items()}
        num_warps = both["warm"].take_stamps()
        for cache, calls in both.items():
            calls.check()
            us = calls.us()
            cycles, ghz = phases(calls.stamps(num_warps))
            of_phases = {name: round(count / ghz / 1e3, 3) for name, count in cycles.items()}
            launch = {"launch": round(us - sum(of_phases.values()), 3)}
            cell = {"bench": "decode-phases", "shape": shape, "num_tokens": num_tokens, "cache": cache}
            yield cell | {
                "mode": "stamps",
                "provider": "as shipped, with time stamps",
                "us": round(us, 3),
                "us_without_stamps": round(without[cache], 3),
                "sm_ghz": round(ghz, 3),
                "cycles": cycles,
                "phases_us": launch | of_phases,
                **common,
            }


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs the command.

    Raises:
        SystemExit: 2 if an argument is wrong; 1 if there is no GPU.
        RuntimeError: results are wrong.
    """
    made = parser(program)
    options = made.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"{made.prog}: needs a CUDA GPU; torch sees none", file=sys.stderr)
        raise SystemExit(1)
    timing.raise_clocks()
    columns = "".join(f"{name:>10}" for name in ("launch", *PHASES, "in all", "without"))
    print(f"{'shape':<16}{'tokens':>6}{'cache':>6}{columns}")
    with options.out.open("w", encoding="utf-8") as file:
        for line in measure(options.shape or SHAPES, options.tokens):
            times = *line["phases_us"].values(), line["us"], line["us_without_stamps"]
            row = "".join(f"{time:>10.2f}" for time in times)
            print(f"{line['shape']:<16}{line['num_tokens']:>6}{line['cache']:>6}{row}", flush=True)
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
