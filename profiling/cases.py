# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The benchmark's cases: which providers are timed on which shapes and token counts, in which mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import dsv4_router
import dsv4_router.ops  # registers the operators
from dsv4_router import thresholds
from dsv4_router.backends import cublas
from dsv4_router.config import RouterConfig
from dsv4_router.testing import (
    WEIGHT_TOLERANCE,
    Comparison,
    HashInputs,
    compare_dense,
    compare_hash,
    compare_selection,
    make_dense_inputs,
    make_hash_inputs,
)

from . import timing
from .peers import TOP_K, Peer, cublas_logits
from .providers import ALONE, Chain, Dense, Hash, Outputs, Route, Routes, checked, outputs
from .report import Report

SHAPES = {"v4-pro": dsv4_router.V4_PRO, "v4-flash": dsv4_router.V4_FLASH, "v4.1-flash": dsv4_router.V4_1_FLASH}
BENCHES = ("topk", "hash", "dense", "batch_invariant", "host", "import")
MODES = ("isolated", "chain", "eager")
DECODE_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DENSE_TOKENS = (*DECODE_TOKENS, 256, 512, 1024, 2048, 4096, 16384)
TOPK_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
HASH_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PYTORCH_TOKENS = (1, 8, 64, 1024)
INVARIANT_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
MAX_DECODE_TOKENS = thresholds.MOST_TOKENS  # past the dispatcher's thresholds, to show where they belong
HOST_SHAPE = "v4-flash"
MORE_TOKENS = 256  # of calls that take two launches on either path, in the bench of the host's time


@dataclass(frozen=True)
class Session:
    """What all cases of a run share: where results and remarks go, the peers, and the device."""

    report: Report
    peers: list[Peer]
    say: Callable[[str], None]
    quick: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Case:
    """A group of cells; ``run`` adds their lines to the session's report."""

    bench: str
    shape: str
    mode: str
    num_tokens: int
    run: Callable[[], None]


def time_warm_and_cold(
    session: Session,
    bench: str,
    shape: str,
    num_tokens: int,
    mode: str,
    calls: dict[str, Callable[[int], Any]],
    count: int,
) -> None:
    """``calls`` with equal and with ``count`` different weights, as CUDA graphs."""
    for cache, indices in (("warm", [0] * timing.CALLS), ("cold", list(range(count)))):
        graphs = {name: [partial(call, i) for i in indices] for name, call in calls.items()}
        session.report.add(bench, shape, num_tokens, cache, mode, timing.graph_samples(graphs, num_tokens))


def time_topk(session: Session, num_experts: int, num_tokens: int) -> None:
    """The top-k kernels alone, on ready logits."""
    scaling = 1.5
    logits = [torch.randn(num_tokens, num_experts, device=session.device) for _ in range(timing.CALLS)]
    bias = torch.randn(num_experts, device=session.device) * 0.1
    mine = outputs(num_tokens, TOP_K, session.device)

    def own(i: int) -> Outputs:
        cublas.activation_topk(logits[i], bias, TOP_K, scaling, *mine)
        return mine

    def foreign(topk: Callable[..., Outputs]) -> Route:
        return lambda i: topk(logits[i], bias, scaling)

    routes: Routes = {peer.name: foreign(peer.topk) for peer in session.peers if peer.topk is not None}
    routes["activation_topk"] = own
    compare = partial(compare_selection, logits[0], bias, TOP_K, scaling)
    good = checked(routes, compare, mine, session.say)
    time_warm_and_cold(session, "topk", f"E{num_experts}", num_tokens, "isolated", {**good}, len(logits))


def time_hash(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """Scored hash routing from hidden states, against peers' GEMMs and a hash top-k (this project's own)."""
    layer = Hash(config, num_tokens, session.device)
    routes: Routes = {
        f"{peer.name} GEMM + hash_from_logits": layer.from_logits_of(peer.logits)
        for peer in session.peers
        if peer.logits is not None
    }
    routes["hash_from_hidden"] = layer.from_hidden
    good = checked(routes, layer.compare, layer.mine, session.say)
    time_warm_and_cold(session, "hash", shape, num_tokens, "isolated", {**good}, len(layer.gates))


def dense_routes(session: Session, dense: Dense, peers: list[Peer], pytorch: bool) -> Routes:
    """The checked providers of a dense layer."""
    routes = dense.peers(peers)
    if dense.num_tokens <= MAX_DECODE_TOKENS:
        routes["decode"] = dense.own(backend="decode")
    if not session.quick:
        routes["cublas"] = dense.own(backend="cublas")
    if pytorch and not session.quick:
        routes |= dense.pytorch()
    return checked(routes, dense.compare, dense.mine, session.say)


def time_dense(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """The whole dense routing: both paths against the peers, PyTorch and the floors."""
    dense = Dense.random(config, num_tokens, session.device)
    routes = dense_routes(session, dense, session.peers, num_tokens in PYTORCH_TOKENS)
    calls = {**routes, **dense.floors()}
    time_warm_and_cold(session, "dense", shape, num_tokens, "isolated", calls, len(dense.gates))


def time_chain(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """The dense routing between a RMSNorm and a consumer, against the first peer in the same place."""
    chain = Chain(config, num_tokens, session.device)
    dense, first = chain.dense, session.peers[:1]
    routes = dense.peers(first)
    if num_tokens <= MAX_DECODE_TOKENS:
        routes["decode"] = dense.own(backend="decode")
    routes["cublas"] = dense.own(backend="cublas")
    whole = {name: chain.checked_around(route) for name, route in routes.items()}
    good = checked(whole, dense.compare, dense.mine, session.say)
    calls = {name: chain.around(routes[name]) for name in good} | {ALONE: chain.around(None)}
    time_warm_and_cold(session, "dense", shape, num_tokens, "chain", {**calls}, len(dense.gates))


def time_eager(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """The dense routing without a graph: until the device is done, and the host's part of it."""
    dense = Dense.random(config, num_tokens, session.device)
    routes = dense_routes(session, dense, session.peers, num_tokens in PYTORCH_TOKENS)
    samples = timing.eager_samples({name: partial(route, 0) for name, route in routes.items()})
    whole = {name: sample.whole for name, sample in samples.items()}
    host = {name: {"host_us": round(sample.host.us, 3)} for name, sample in samples.items()}
    session.report.add("dense", shape, num_tokens, "warm", "eager", whole, host)


def time_invariant(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """What the same bits in batches of any size cost, against the ``cublas`` path."""
    dense = Dense.random(config, num_tokens, session.device)
    routes = {"cublas": dense.own(backend="cublas"), "batch_invariant": dense.own(batch_invariant=True)}
    good = checked(routes, dense.compare, dense.mine, session.say)
    time_warm_and_cold(session, "batch_invariant", shape, num_tokens, "isolated", {**good}, len(dense.gates))


def _compare_plain_hash(inputs: HashInputs, top_k: int, weights: torch.Tensor, ids: torch.Tensor) -> Comparison:
    """Of hash routing without scores: the table's ids, each with weight 1 / k."""
    wrong = int((ids.long() != inputs.hash_lut[inputs.token_ids.long()].long()).sum())
    return Comparison(ids.shape[0], wrong, float((weights.double() * top_k - 1).abs().max()), WEIGHT_TOLERANCE)


def time_host(session: Session, shape: str, config: RouterConfig, num_tokens: int) -> None:
    """Host time of eager calls beside ``torch.add``, of the cublas path's parts, and of the registered operator."""
    dense = make_dense_inputs(config, num_tokens, seed=0, device=session.device)
    hashed = make_hash_inputs(config, num_tokens, seed=0, device=session.device)
    mine = outputs(num_tokens, config.top_k, session.device)
    logits = cublas_logits(dense.hidden_states, dense.gate_weight)
    hash_logits = cublas_logits(hashed.hidden_states, hashed.gate_weight)
    left, right = cublas.split_operands(dense.hidden_states, dense.gate_weight, 8)
    route = partial(dsv4_router.dense_router_dispatch, *dense, config.top_k, 1.5, *mine)
    hash_route = partial(dsv4_router.hash_router_dispatch, hashed.token_ids, hashed.hash_lut, config.top_k, *mine)
    operands: dict[str, Any] = {"hidden_states": hashed.hidden_states, "gate_weight": hashed.gate_weight}

    def allocating(hidden_states: torch.Tensor, gate_weight: torch.Tensor, correction_bias: torch.Tensor) -> object:
        return dsv4_router.dense_route(hidden_states, gate_weight, correction_bias, config.top_k, 1.5)

    def topk() -> Outputs:
        cublas.activation_topk(logits, dense.correction_bias, config.top_k, 1.5, *mine)
        return mine

    compiled, compiled_add = torch.compile(allocating, fullgraph=True), torch.compile(torch.add, fullgraph=True)
    of_more_tokens = cublas_more, decode_more = f"cublas, {MORE_TOKENS} tokens", f"decode, {MORE_TOKENS} tokens"
    more = make_dense_inputs(config, MORE_TOKENS, seed=0, device=session.device)
    of_more = outputs(MORE_TOKENS, config.top_k, session.device)
    route_more = partial(dsv4_router.dense_router_dispatch, *more, config.top_k, 1.5, *of_more)
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: torch.add(logits, logits),
        "cublas": lambda: route(backend="cublas"),
        "decode": lambda: route(backend="decode"),
        cublas_more: lambda: route_more(backend="cublas"),
        decode_more: lambda: route_more(backend="decode"),
        "dense_route": lambda: allocating(*dense),
        "registered op": lambda: torch.ops.dsv4_router.dense_router(*dense, config.top_k, 1.5),
        "registered op, torch.compile": lambda: compiled(*dense),
        "torch.add, torch.compile": lambda: compiled_add(logits, logits),
        "part: partial logits": lambda: cublas.partial_logits(dense.hidden_states, dense.gate_weight, 8),
        "part: torch.bmm alone": lambda: torch.bmm(left, right, out_dtype=torch.float32),
        "part: activation_topk": topk,
        "hash plain": hash_route,
        "hash from logits": lambda: hash_route(router_logits=hash_logits),
        "hash from hidden": lambda: hash_route(**operands),
    }
    of_dense = "cublas", "decode", "dense_route", "registered op", "registered op, torch.compile"
    selection = partial(compare_selection, logits, dense.correction_bias, config.top_k, 1.5)
    for names, compare, written in (
        (of_dense, partial(compare_dense, dense, config.top_k, 1.5), mine),
        (of_more_tokens, partial(compare_dense, more, config.top_k, 1.5), of_more),
        (("part: activation_topk",), selection, mine),
        (("hash plain",), partial(_compare_plain_hash, hashed, config.top_k), mine),
        (("hash from logits", "hash from hidden"), partial(compare_hash, hashed, config.top_k, 1.0), mine),
    ):
        routes = {name: lambda i, call=calls[name]: call()[:2] for name in names}
        checked(routes, compare, written, session.say, own=frozenset(names))
    samples = {name: sample.host for name, sample in timing.eager_samples(calls).items()}
    session.report.add("host", shape, num_tokens, "warm", "eager", samples)


IMPORT_SNIPPET = """
import time, torch
start = time.perf_counter()
import dsv4_router
from dsv4_router import dense_router_dispatch, hash_router_dispatch, explain, Router, RouterConfig
print((time.perf_counter() - start) * 1e6)
assert not torch.cuda.is_initialized()
"""


def time_import(session: Session) -> None:
    """Importing the package and every public name, beyond torch, in new processes."""
    times = [
        float(subprocess.run([sys.executable, "-c", IMPORT_SNIPPET], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    session.report.add("import", "-", 0, "warm", "eager", {"import dsv4_router": timing.Sample.of(times)})


@dataclass(frozen=True)
class Selection:
    """Which cases a run has.

    Attributes:
        benches: of :data:`BENCHES`. shapes: of :data:`SHAPES`. modes: of :data:`MODES`.
        tokens: instead of each bench's own counts.
        quick: only the dense routing of few tokens, in graphs, against the peers.
    """

    benches: tuple[str, ...] = BENCHES
    shapes: tuple[str, ...] = tuple(SHAPES)
    modes: tuple[str, ...] = MODES
    tokens: tuple[int, ...] | None = None
    quick: bool = False

    def counts(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        return usual if self.tokens is None else self.tokens


def _candidates(session: Session, chosen: Selection) -> Iterator[Case]:
    """The cases of the chosen shapes and counts, of any bench and mode."""
    configs = {shape: SHAPES[shape] for shape in chosen.shapes}
    for num_experts in sorted({config.num_experts for config in configs.values()}):
        for n in chosen.counts(TOPK_TOKENS):
            yield Case("topk", f"E{num_experts}", "isolated", n, partial(time_topk, session, num_experts, n))
    for shape, config in configs.items():
        benches = [
            ("hash", "isolated", HASH_TOKENS if config.num_hash_layers else (), time_hash),
            ("dense", "isolated", DECODE_TOKENS if chosen.quick else DENSE_TOKENS, time_dense),
            ("dense", "chain", DECODE_TOKENS, time_chain),
            ("dense", "eager", PYTORCH_TOKENS, time_eager),
            ("batch_invariant", "isolated", INVARIANT_TOKENS, time_invariant),
            ("host", "eager", (16,) if shape == HOST_SHAPE else (), time_host),
        ]
        for bench, mode, usual, timer in benches:
            for n in chosen.counts(usual) if usual else ():
                yield Case(bench, shape, mode, n, partial(timer, session, shape, config, n))
    yield Case("import", "-", "eager", 0, partial(time_import, session))


def all_cases(session: Session, chosen: Selection) -> list[Case]:
    """The cases of a run, in the order in which they run."""
    quick = {("dense", "isolated")}
    return [
        case
        for case in _candidates(session, chosen)
        if case.bench in chosen.benches
        and case.mode in chosen.modes
        and (not chosen.quick or (case.bench, case.mode) in quick)
    ]
