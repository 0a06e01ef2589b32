# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Makes the calls that a profiler looks at: of one provider, on seeded inputs, after a warm-up and a check of results.

A provider is one of this project's paths, "hash" (scored, from hidden states), PyTorch's operations, as they are or
compiled, or another router that is installed. With --chain a RMSNorm and a consumer of the ids run around every call of
a dense one. The calls lie between cudaProfilerStart and cudaProfilerStop, in NVTX ranges named like
"dsv4_router/decode/v4-pro/16 tokens". ncu.sh and nsys.sh run this; with --trace it is its own profiler and writes a
Chrome trace by torch.profiler.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import torch

import dsv4_router
from dsv4_router import decode_config, dispatch, logits_config, settings, timing
from dsv4_router.config import PRESETS, RouterConfig
from dsv4_router.testing import Comparison

from .peers import FINDERS
from .providers import COMPILED, EAGER, Chain, Dense, Hash, Route

OWN = {name: {"backend": name} for name in dispatch.PATHS}
PYTORCH = {"pytorch": EAGER, "torch-compile": COMPILED}
PROVIDERS = (*OWN, "batch_invariant", "hash", *PYTORCH, *FINDERS)
CALLS = 20
_WARMUP_ROUNDS = 3
_KERNEL_ROWS = 12  # of the table of kernels


class Subject(NamedTuple):
    """What a profiler looks at: a call by the number of its weight, how many there are, the comparison with float64."""

    call: Route
    num_weights: int
    compare: Callable[[torch.Tensor, torch.Tensor], Comparison]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (-h lists the options)\n")


def positive(text: str) -> int:
    """A count of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Counts of at least 1, with commas between."""
    return tuple(positive(part) for part in text.split(","))


def parser(program: str | None = None) -> Parser:
    """The command's options."""
    made = Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--provider", choices=PROVIDERS, required=True, help="whose calls")
    made.add_argument("--shape", choices=tuple(PRESETS), default="v4-pro", help="the model (v4-pro)")
    made.add_argument("--tokens", type=positive, default=16, help="of a call (16)")
    made.add_argument("--chain", action="store_true", help="between a RMSNorm and a consumer, dense calls only")
    made.add_argument("--cold", action="store_true", help="another weight for each call, together larger than L2")
    made.add_argument("--calls", type=positive, default=CALLS, help=f"how many ({CALLS})")
    made.add_argument("--graph", action="store_true", help="replay the calls as one CUDA graph, as servers do")
    made.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace by torch.profiler")
    made.add_argument(
        "--name", action="store_true", help="print a name for this run's files, then dump_sass.py's options, and stop"
    )
    return made


def make_subject(provider: str, config: RouterConfig, num_tokens: int, chain: bool, device: str) -> Subject:
    """The calls of a provider.

    Raises:
        ImportError: the provider is not installed.
    """
    if provider == "hash":
        layer = Hash(config, num_tokens, device)
        return Subject(layer.from_hidden, len(layer.gates), layer.compare)
    around = Chain(config, num_tokens, device) if chain else None
    dense = Dense.random(config, num_tokens, device) if around is None else around.dense
    if provider in OWN:
        route = dense.own(**OWN[provider])
    elif provider == "batch_invariant":
        route = dense.own(batch_invariant=True)
    elif provider in PYTORCH:
        route = dense.pytorch()[PYTORCH[provider]]
    else:
        (route,) = dense.peers([FINDERS[provider]()]).values()
    if around is None:
        return Subject(route, len(dense.gates), dense.compare)
    around.checked_around(route)(0)
    return Subject(around.around(route), len(dense.gates), dense.compare)


def num_multiprocessors() -> int:
    """Of the GPU that is there, or of an H100 in its SXM form."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def rows_of_a_launch(config: RouterConfig, target: str) -> int:
    """Rows that one launch of the decode kernel takes, on a GPU of so many multiprocessors; 0 if there is none."""
    sizes = config.hidden_size, config.num_experts, config.top_k
    return decode_config.max_tokens(*sizes, target, num_multiprocessors())


def own_kernel(provider: str, config: RouterConfig, num_tokens: int) -> str | None:
    """The kernel of a call that dump_sass.py can show, under its name there."""
    if provider not in ("decode", "batch_invariant"):
        return {"cublas": "activation_topk", "hash": "hash_router"}.get(provider)
    on_gpu = torch.cuda.is_available()
    target = dispatch.architecture(torch.cuda.get_device_capability()) if on_gpu else "sm_90a"
    has_more = target in logits_config.ARCHITECTURES and num_tokens > rows_of_a_launch(config, target)
    return "dense_logits" if has_more else "decode"


@contextmanager
def named(name: str) -> Iterator[None]:
    """A range of this name in Nsight's timelines, and in torch.profiler's."""
    with torch.cuda.nvtx.range(name), torch.profiler.record_function(name):
        yield


def run(call: Route, num_weights: int, num_calls: int, graph: bool, name: str, trace: Path | None) -> None:
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
    config, what = PRESETS[options.shape], f"{options.provider}{'-chain' if options.chain else ''}"
    name = f"{what}-{options.shape}-{options.tokens}-{cache}{'-graph' if options.graph else ''}"
    if options.chain and options.provider == "hash":
        made.error("argument --chain: expected a provider of dense calls, got 'hash'")
    if options.name:
        kernel = own_kernel(options.provider, config, options.tokens)
        print(name)
        print(f"--kernel {kernel} --shape {options.shape} --tokens {options.tokens}" if kernel else "")
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
        subject = make_subject(options.provider, config, options.tokens, options.chain, "cuda")
        comparison = subject.compare(*subject.call(0))
    except (ImportError, dsv4_router.BackendUnavailableError) as error:
        stop(" ".join(str(error).split()))
    print(f"{name} on {torch.cuda.get_device_name()}: {comparison}", flush=True)
    if not comparison.ok:
        raise SystemExit(1)
    title = f"dsv4_router/{what}/{options.shape}/{options.tokens} tokens"
    num_weights = subject.num_weights if options.cold else 1
    run(subject.call, num_weights, options.calls, options.graph, title, options.trace)


if __name__ == "__main__":
    main()
