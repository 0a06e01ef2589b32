# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Makes the calls that a profiler looks at: of one provider, on seeded inputs, after a warm-up and a check of results.

The calls lie between cudaProfilerStart and cudaProfilerStop, in NVTX ranges named like "dsv4_router/decode/v4-pro/16
tokens". ncu.sh and nsys.sh run this; with --trace it is its own profiler and writes a Chrome trace by torch.profiler.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and not __package__:  # run as a file: as the installed module
    from runpy import run_module

    run_module("dsv4_router.profiling.profile_call", run_name="__main__", alter_sys=True)
    raise SystemExit

import torch

import dsv4_router
from dsv4_router import settings, timing
from dsv4_router.config import PRESETS, RouterConfig
from dsv4_router.testing import (
    Comparison,
    DenseInputs,
    compare_dense,
    compare_hash,
    make_dense_inputs,
    make_hash_inputs,
)

PROVIDERS = ("decode", "cublas", "hash", "reference", "vllm")
CALLS = 20
_WARMUP_ROUNDS = 3
_SEED = 1
_KERNEL_ROWS = 12  # of the table of kernels

Call = Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # call number i, with weight number i: weights and ids


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (-h lists the options)\n")


def positive(text: str) -> int:
    """A count of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def parser(program: str | None = None) -> Parser:
    """The command's options."""
    made = Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--provider", choices=PROVIDERS, required=True, help="whose calls")
    made.add_argument("--shape", choices=tuple(PRESETS), default="v4-pro", help="the model (v4-pro)")
    made.add_argument("--tokens", type=positive, default=16, help="of a call (16)")
    made.add_argument("--cold", action="store_true", help="another weight for each call, together larger than L2")
    made.add_argument("--calls", type=positive, default=CALLS, help=f"how many ({CALLS})")
    made.add_argument("--graph", action="store_true", help="replay the calls as one CUDA graph, as servers do")
    made.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace by torch.profiler")
    made.add_argument("--name", action="store_true", help="print a name for files of this run, and stop")
    return made


def make_calls(
    provider: str, config: RouterConfig, num_tokens: int, cold: bool, device: str
) -> tuple[Call, int, Callable[[torch.Tensor, torch.Tensor], Comparison]]:
    """The provider's call, of how many weights, and the comparison of what call 0 returns with float64.

    Raises:
        ImportError: the provider is not installed.
    """
    scaling, top_k = config.routed_scaling_factor, config.top_k
    weights = torch.empty(num_tokens, top_k, device=device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    if provider == "hash":
        table = make_hash_inputs(config, num_tokens, seed=_SEED, device=device)
        gates = timing.cold_weights(table.gate_weight) if cold else [table.gate_weight]

        def hashed(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return dsv4_router.hash_router_dispatch(
                table.token_ids,
                table.hash_lut,
                top_k,
                weights,
                ids,
                hidden_states=table.hidden_states,
                gate_weight=gates[i],
                routed_scaling_factor=scaling,
            )

        return hashed, len(gates), lambda weights, ids: compare_hash(table, top_k, scaling, weights, ids)

    inputs = make_dense_inputs(config, num_tokens, seed=_SEED, device=device)
    gates = timing.cold_weights(inputs.gate_weight) if cold else [inputs.gate_weight]
    hidden_states, _, bias = inputs

    def dense(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return dsv4_router.dense_router_dispatch(
            hidden_states, gates[i], bias, top_k, scaling, weights, ids, backend=provider
        )

    call: Call = dense
    if provider == "vllm":
        from . import peers

        peer = peers.FINDERS[provider]()
        call = lambda i: peer.route(hidden_states, gates[i], bias, scaling)  # noqa: E731

    def compare(weights: torch.Tensor, ids: torch.Tensor) -> Comparison:
        return compare_dense(DenseInputs(hidden_states, gates[0], bias), top_k, scaling, weights, ids)

    return call, len(gates), compare


@contextmanager
def named(name: str) -> Iterator[None]:
    """A range of this name in Nsight's timelines, and in torch.profiler's."""
    with torch.cuda.nvtx.range(name), torch.profiler.record_function(name):
        yield


def run(call: Call, num_weights: int, num_calls: int, graph: bool, name: str, trace: Path | None) -> None:
    """Warms up, then makes the calls where profilers look."""
    indices = [i % num_weights for i in range(num_calls)]

    def calls() -> None:
        for number, i in enumerate(indices):
            with named(f"call {number}"):
                call(i)

    work = calls
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for i in indices:
                call(i)
        work = captured.replay
    timing.raise_clocks()
    for _ in range(_WARMUP_ROUNDS):
        work()
    for i in range(num_weights):  # of several, those that come next are then the longest unused
        call(i)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities) if trace is not None else None
    if profiler is not None:
        profiler.start()
    else:
        torch.cuda.profiler.start()
    with named(name):
        work()
        torch.cuda.synchronize()
    if profiler is None:
        torch.cuda.profiler.stop()
        return
    profiler.stop()
    profiler.export_chrome_trace(str(trace))
    kernels = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    kernels = [event for event in kernels if event.key != name and not event.key.startswith("call ")]
    print(f"{'calls':>6} {'us each':>8}  kernel")
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:_KERNEL_ROWS]:
        print(f"{event.count:>6} {event.device_time_total / event.count:>8.2f}  {event.key[:100]}")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs the command.

    Raises:
        SystemExit: 2 if an argument is wrong; 1 if there is no GPU or no such provider, or its results are wrong.
    """
    made = parser(program)
    options = made.parse_args(arguments)
    cache = "cold" if options.cold else "warm"
    name = f"{options.provider}-{options.shape}-{options.tokens}-{cache}{'-graph' if options.graph else ''}"
    if options.name:
        print(name)
        return

    def stop(text: str) -> NoReturn:
        print(f"{made.prog}: {text}", file=sys.stderr)
        raise SystemExit(1)

    if not torch.cuda.is_available():
        stop("needs a CUDA GPU; torch sees none")
    # Kernels with line info are others than those without, which are in the cache already.
    os.environ["CUTE_DSL_LINEINFO"] = "1"
    os.environ[settings.CACHE_DIR_VARIABLE] = str(settings.cache_dir() / "line-info")
    try:
        call, num_weights, compare = make_calls(
            options.provider, PRESETS[options.shape], options.tokens, options.cold, "cuda"
        )
        comparison = compare(*call(0))
    except (ImportError, dsv4_router.BackendUnavailableError) as error:
        stop(" ".join(str(error).split()))
    print(f"{name} on {torch.cuda.get_device_name()}: {comparison}", flush=True)
    if not comparison.ok:
        raise SystemExit(1)
    title = f"dsv4_router/{options.provider}/{options.shape}/{options.tokens} tokens"
    run(call, num_weights, options.calls, options.graph, title, options.trace)


if __name__ == "__main__":
    main()
