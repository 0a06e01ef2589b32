# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Times the paths against the best public stack on one GPU, in one run.

    python profiling/bench.py [--out profiling/results/h100.jsonl]

Every provider is checked against float64 before it is timed. The peer is vLLM's router (its GEMM and its top-k), taken
from the module ``vllm_router_peer`` if that can be imported; otherwise it is named as missing. Each result is a JSON
line; see profiling/README.md for its fields.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import CALLS, Sample, graph_time, host_times

import dsv4_router
from dsv4_router.backends import cublas, cuda_module
from dsv4_router.config import RouterConfig
from dsv4_router.testing import (
    DenseInputs,
    HashInputs,
    compare_dense,
    compare_hash,
    compare_selection,
    make_dense_inputs,
    make_hash_inputs,
)

SHAPES = {"v4-pro": dsv4_router.V4_PRO, "v4-flash": dsv4_router.V4_FLASH}
DENSE_SHAPES = {**SHAPES, "v4.1-flash": dsv4_router.V4_1_FLASH}
TOPK_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
HASH_TOKENS = (1, 2, 4, 8, 16, 32, 64)
DENSE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 1024, 4096)
MAX_DECODE_TOKENS = 256  # past the dispatcher's threshold, to show where it belongs
PEER = "vllm"
PACKAGES = ("torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton", "nvidia-cutlass-dsl")
Calls = dict[str, Callable[[int], Any]]  # provider -> call number i of a graph


def find_peer() -> Any:
    """The peer's module, or None with a word about it."""
    try:
        return importlib.import_module("vllm_router_peer")
    except ImportError as error:
        print(f"missing provider: {PEER} ({error})", file=sys.stderr)
        return None


def source_hash() -> str:
    """A short hash of the kernels and of the code that launches them."""
    backends = Path(cuda_module.__file__).parent
    folders = (cuda_module.kernel_folder(), backends)
    files = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".py"))
    files.append(backends.parent / "decode_config.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class Report:
    """Collects results, prints them as a table, and writes them as JSON lines."""

    def __init__(self) -> None:
        installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
        self.common = {
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: installed[name] for name in PACKAGES if name in installed},
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "source_hash": source_hash(),
        }
        self.lines: list[dict[str, Any]] = []

    def add(self, bench: str, shape: str, tokens: int, cache: str, mode: str, samples: dict[str, Sample]) -> None:
        """One line a provider; the ratio is to the first provider, the named baseline."""
        baseline = next(iter(samples))
        for provider, sample in samples.items():
            self.lines.append(
                {"bench": bench, "shape": shape, "num_tokens": tokens, "cache": cache, "mode": mode}
                | {"provider": provider, "us": round(sample.us, 3)}
                | {"us_min": round(sample.us_min, 3), "us_max": round(sample.us_max, 3)}
                | {"baseline": baseline, "ratio": round(sample.us / samples[baseline].us, 3)}
                | self.common
            )

    def show(self) -> None:
        table = Table(title=f"{self.common['gpu']}, microseconds per call")
        columns = ("bench", "shape", "num_tokens", "cache", "mode", "provider", "us", "us_min", "us_max", "ratio")
        for column in columns:
            table.add_column(column, justify="left" if column in ("bench", "shape", "provider") else "right")
        for line in self.lines:
            table.add_row(*(str(line[column]) for column in columns))
        Console(width=150).print(table)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))


def outputs(num_tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.full((num_tokens, top_k), 9e9, device="cuda")
    return weights, torch.full((num_tokens, top_k), -7, dtype=torch.int32, device="cuda")


def time_warm_and_cold(report: Report, bench: str, shape: str, num_tokens: int, calls: Calls) -> None:
    """``calls`` of equal and of different weights, as CUDA graphs."""
    for cache, indices in (("warm", [0] * CALLS), ("cold", list(range(CALLS)))):
        samples = {name: graph_time([partial(call, i) for i in indices]) for name, call in calls.items()}
        report.add(bench, shape, num_tokens, cache, "isolated", samples)


def require(result: Any, what: str) -> None:
    if not result.ok:
        raise SystemExit(f"{what}: {result}")


def time_topk(report: Report, peer: Any, num_experts: int, num_tokens: int) -> None:
    """The top-k kernels alone, on ready logits."""
    logits = [torch.randn(num_tokens, num_experts, device="cuda") for _ in range(CALLS)]
    bias = torch.randn(num_experts, device="cuda") * 0.1
    mine = outputs(num_tokens, 6)
    calls: Calls = {}
    if peer is not None:
        peer_topk = importlib.import_module("vllm.router_peer.dsv4_topk").dsv4_topk
        calls[PEER] = lambda i: peer_topk(logits[i], bias, torch.int32, 1.5)
        require(compare_selection(logits[0], bias, 6, 1.5, *calls[PEER](0)), PEER)
    calls["activation_topk"] = lambda i: cublas.activation_topk(logits[i], bias, 6, 1.5, *mine)
    calls["activation_topk"](0)
    require(compare_selection(logits[0], bias, 6, 1.5, *mine), "activation_topk")
    time_warm_and_cold(report, "topk", f"E{num_experts}", num_tokens, calls)


def gates(inputs: DenseInputs | HashInputs) -> list[torch.Tensor]:
    """As many gate weights as a model has layers; together they exceed L2."""
    return [inputs.gate_weight, *(torch.roll(inputs.gate_weight, i, 0) for i in range(1, CALLS))]


def time_hash(report: Report, peer: Any, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """Scored hash routing from hidden states, against the peer's GEMM and a hash top-k (this project's own)."""
    inputs = make_hash_inputs(config, num_tokens, seed=num_tokens, device="cuda")
    hidden_states, weights, scaling = inputs.hidden_states, gates(inputs), config.routed_scaling_factor
    mine = outputs(num_tokens, config.top_k)
    route = partial(
        dsv4_router.hash_router_dispatch,
        inputs.token_ids,
        inputs.hash_lut,
        config.top_k,
        *mine,
        routed_scaling_factor=scaling,
    )
    calls: Calls = {}
    if peer is not None:
        calls[f"{PEER} GEMM + hash_from_logits"] = lambda i: route(router_logits=peer.logits(hidden_states, weights[i]))
    calls["hash_from_hidden"] = lambda i: route(hidden_states=hidden_states, gate_weight=weights[i])
    for name, call in calls.items():
        mine[1].fill_(-7)
        call(0)
        require(compare_hash(inputs, config.top_k, scaling, *mine), name)
    time_warm_and_cold(report, "hash", shape, num_tokens, calls)


def time_dense(report: Report, peer: Any, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """The whole dense routing: both paths against the peer's two launches."""
    inputs = make_dense_inputs(config, num_tokens, seed=num_tokens, device="cuda")
    hidden_states, weights, bias = inputs.hidden_states, gates(inputs), inputs.correction_bias
    mine = outputs(num_tokens, config.top_k)
    top_k, scaling = config.top_k, config.routed_scaling_factor
    calls: Calls = {}
    if peer is not None:
        calls[PEER] = lambda i: peer.route(hidden_states, weights[i], bias, scaling)
        require(compare_dense(inputs, top_k, scaling, *calls[PEER](0)), PEER)
    for backend in ("decode", "cublas") if num_tokens <= MAX_DECODE_TOKENS else ("cublas",):

        def call(i: int, backend: str = backend) -> Any:
            return dsv4_router.dense_router_dispatch(
                hidden_states, weights[i], bias, top_k, scaling, *mine, backend=backend
            )

        mine[1].fill_(-7)
        call(0)
        require(compare_dense(inputs, top_k, scaling, *mine), backend)
        calls[backend] = call
    time_warm_and_cold(report, "dense", shape, num_tokens, calls)


def bench_host(report: Report) -> None:
    """Host time of eager calls beside ``torch.add``, and of the parts of the cublas path."""
    config, num_tokens = dsv4_router.V4_FLASH, 16
    dense = make_dense_inputs(config, num_tokens, seed=0, device="cuda")
    hashed = make_hash_inputs(config, num_tokens, seed=0, device="cuda")
    mine = outputs(num_tokens, config.top_k)
    logits = torch.mm(dense.hidden_states, dense.gate_weight.t(), out_dtype=torch.float32)
    left, right = cublas.split_operands(dense.hidden_states, dense.gate_weight, 8)
    calls: dict[str, Callable[[], object]] = {
        "torch.add": lambda: torch.add(logits, logits),
        "cublas": lambda: dsv4_router.dense_router_dispatch(*dense, config.top_k, 1.5, *mine, backend="cublas"),
        "decode": lambda: dsv4_router.dense_router_dispatch(*dense, config.top_k, 1.5, *mine, backend="decode"),
        "part: partial logits": lambda: cublas.partial_logits(dense.hidden_states, dense.gate_weight, 8),
        "part: torch.bmm alone": lambda: torch.bmm(left, right, out_dtype=torch.float32),
        "part: activation_topk": lambda: cublas.activation_topk(
            logits, dense.correction_bias, config.top_k, 1.5, *mine
        ),
        "hash plain": lambda: dsv4_router.hash_router_dispatch(hashed.token_ids, hashed.hash_lut, config.top_k, *mine),
        "hash from logits": lambda: dsv4_router.hash_router_dispatch(
            hashed.token_ids, hashed.hash_lut, config.top_k, *mine, router_logits=logits
        ),
        "hash from hidden": lambda: dsv4_router.hash_router_dispatch(
            hashed.token_ids,
            hashed.hash_lut,
            config.top_k,
            *mine,
            hidden_states=hashed.hidden_states,
            gate_weight=hashed.gate_weight,
        ),
    }
    report.add("host", "v4-flash", num_tokens, "warm", "eager", host_times(calls))


IMPORT_SNIPPET = """
import time, torch
start = time.perf_counter()
import dsv4_router
from dsv4_router import dense_router_dispatch, hash_router_dispatch, explain, Router, RouterConfig
print((time.perf_counter() - start) * 1e6)
assert not torch.cuda.is_initialized()
"""


def bench_import(report: Report) -> None:
    """Importing the package and every public name, beyond torch, in new processes."""
    times = [
        float(subprocess.run([sys.executable, "-c", IMPORT_SNIPPET], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    report.add("import", "-", 0, "warm", "eager", {"import dsv4_router": Sample.of(times)})


def warm_up(seconds: float = 1.0) -> None:
    """Brings an idle GPU to its clocks: without it the first case comes out up to twice too slow."""
    square = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(square, square)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="where the JSON lines go")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench: needs a CUDA GPU; torch sees none")
    report, peer = Report(), find_peer()
    warm_up()
    cases = [partial(time_topk, report, peer, experts, n) for experts in (256, 384) for n in TOPK_TOKENS]
    for shape, config in SHAPES.items():
        cases += [partial(time_hash, report, peer, shape, config, n) for n in HASH_TOKENS]
    for shape, config in DENSE_SHAPES.items():
        cases += [partial(time_dense, report, peer, shape, config, n) for n in DENSE_TOKENS]
    cases += [partial(bench_host, report), partial(bench_import, report)]
    for case in track(cases, console=Console(stderr=True), description="timing"):
        case()
    report.show()
    if options.out is not None:
        report.write(options.out)


if __name__ == "__main__":
    main()
