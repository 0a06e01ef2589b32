# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What ``dsv4-router demo``, ``compile``, ``info`` and ``verify`` compute and print."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from . import __version__, api, decode_config, dispatch, jit_cache, settings, testing
from .config import PRESETS, V4_FLASH, RouterConfig
from .logits_config import LogitsConfig

_SHOWN_TOKENS = 4
_EXPERTS_PER_BIN = 16
_BAR_WIDTH = 40
_REPEATS = 20
_TOKENS_ALONE = 8  # tokens that the check of batch invariance routes on their own
_PACKAGES = (
    "torch",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "safetensors",
)


def _console(stderr: bool = False) -> Console:
    """Plain text, wide enough for the tables where no terminal sets the width."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    return console


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, from before it to the end of its work on the device; the first call is not counted."""
    taken = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _token_table(weights: torch.Tensor, ids: torch.Tensor) -> Table:
    table = Table("token", *(f"rank {rank}" for rank in range(ids.shape[1])), "sum of weights")
    for token, (row, experts) in enumerate(zip(weights.tolist(), ids.tolist(), strict=True)):
        cells = (f"{expert}: {weight:.4f}" for expert, weight in zip(experts, row, strict=True))
        table.add_row(str(token), *cells, f"{sum(row):.4f}")
    return table


def _load_table(load: torch.Tensor, bar: str) -> Table:
    """The expert load in bins of consecutive experts."""
    table = Table("experts", "tokens", "")
    table.columns[1].justify = "right"
    counts = [int(part.sum()) for part in torch.split(load, _EXPERTS_PER_BIN)]
    for index, count in enumerate(counts):
        first = index * _EXPERTS_PER_BIN
        last = min(first + _EXPERTS_PER_BIN, load.numel()) - 1
        table.add_row(f"{first}-{last}", str(count), bar * round(count / max(counts) * _BAR_WIDTH))
    return table


def demo(device: torch.device, num_tokens: int, seed: int) -> bool:
    """Routes random tokens through a dense layer of V4-Flash's shape; whether the result is right."""
    console, config = _console(), V4_FLASH
    inputs = testing.make_dense_inputs(config, num_tokens, seed=seed, device=device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return api.dense_route(*inputs, config.top_k, config.routed_scaling_factor)

    weights, ids = call()
    console.print(f"{config}\n{num_tokens} random tokens, seed {seed}\n")
    console.print("Expert ids and weights, best first")
    console.print(_token_table(weights[:_SHOWN_TOKENS].cpu(), ids[:_SHOWN_TOKENS].cpu()))
    load = torch.bincount(ids.flatten().long().cpu(), minlength=config.num_experts)
    console.print(
        f"\nExpert load: {int(load.min())} / {float(load.double().mean()):.2f} / {int(load.max())} "
        f"(least, mean, most) of {num_tokens * config.top_k} choices"
    )
    console.print(_load_table(load, "#" if console.options.ascii_only else "█"))
    console.print(f"\nPath: {dispatch.explain(config, num_tokens, device)}")
    seconds = median_seconds(call, device, _REPEATS)
    console.print(
        f"Time: {seconds * 1e6:.1f} us a call, median of {_REPEATS}, from the call to its end on {device_name(device)}"
    )
    comparison = testing.compare_dense(inputs, config.top_k, config.routed_scaling_factor, weights, ids)
    console.print(f"Against the float64 reference: {comparison}")
    return comparison.ok


def compile_ahead(config: RouterConfig, architectures: Sequence[str]) -> None:
    """Compiles a model's kernels into the cache, as :func:`startup.compile_ahead` does, and prints them.

    Raises:
        ValueError: the kernel serves these sizes on none of the architectures.
        BackendUnavailableError: CUTLASS DSL or NVRTC is not installed.
        OSError: the cache cannot be written.
    """
    from . import startup

    jobs = {architecture: startup.jobs(config, architecture) for architecture in architectures}
    reasons = [startup.why_not(config, architecture) for architecture in jobs]
    if all(reasons):
        raise ValueError(f"{config.name}: {reasons[0]}")
    startup.check_compilers()
    folder = check_cache()
    table = Table("architecture", "token tile", "blocks", "threads", "shared memory", "object file", "time")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_console(stderr=True)) as progress:
        task = progress.add_task("kernels", total=sum(map(len, jobs.values())))
        for (architecture, of_architecture), reason in zip(jobs.items(), reasons, strict=True):
            for job in of_architecture:
                started = time.perf_counter()
                size = len(job.object_code())
                seconds = time.perf_counter() - started
                taken = f"{size / 1024:.1f} KiB", f"{seconds:.2f} s"
                table.add_row(architecture, *_described(job.kernel), *taken)
                progress.advance(task)
            if reason is not None:
                table.add_row(architecture, "none fits")
    console = _console()
    console.print(str(config))
    console.print(table)
    console.print(f"Kernel cache: {folder}", soft_wrap=True)


def _described(kernel: object) -> tuple[str, str, str, str]:
    """Token tile, blocks, threads and shared memory, as far as a kernel has them."""
    if isinstance(kernel, decode_config.DecodeConfig):
        rows, blocks = str(kernel.token_tile), str(kernel.num_blocks)
    elif isinstance(kernel, LogitsConfig):
        rows, blocks = "more rows", ""
    else:
        return "top-k", "", "", ""
    return rows, blocks, str(kernel.num_threads), f"{kernel.shared_bytes / 1024:.1f} KiB"


def check_cache() -> Path:
    """The cache folder, made if it is missing; a call does without one that cannot be written, some commands do not.

    Raises:
        OSError: it cannot be written.
    """
    folder = settings.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def _nvrtc_version() -> str:
    from .backends import cuda_module

    if (missing := cuda_module.missing_requirement()) is not None:
        return f"missing: {missing}"
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def versions() -> dict[str, str]:
    """Versions of this package and of what it needs, by name; ``missing`` where it is not installed."""
    found = {"dsv4-router": __version__, "python": platform.python_version()}
    found |= jit_cache.versions_of(_PACKAGES, "missing")
    return found | {"CUDA of torch": torch.version.cuda or "none", "NVRTC as loaded": _nvrtc_version()}


def info() -> None:
    """Prints the GPUs, the versions, the kernel cache folder, and the path of some calls of each preset."""
    console = _console()
    gpus = Table("GPU", "name", "compute capability", "memory")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        gpus.add_row(str(index), gpu.name, f"{gpu.major}.{gpu.minor}", f"{gpu.total_memory / 2**30:.1f} GiB")
    if not count:
        gpus.add_row("none", "", "", "")
    console.print(gpus)
    table = Table("package", "version")
    for name, version in versions().items():
        table.add_row(name, version)
    console.print(table)
    console.print(f"Kernel cache: {settings.cache_dir()}", soft_wrap=True)
    device = dispatch.check_device("cuda" if count else "cpu")
    paths = Table("model", "layers", "tokens", "path", "remarks, and why not a better one", title=f"Paths on {device}")
    for name, config in PRESETS.items():
        for num_tokens in (1, 64, 4096):
            plan = dispatch.explain(config, num_tokens, device)
            rejected = "\n".join(f"{path}: {why}" for path, why in plan.rejected)
            _, _, remark = plan.reason.partition("; ")
            paths.add_row(name, "dense", str(num_tokens), plan.path, "\n".join(filter(None, (remark, rejected))))
        if config.num_hash_layers:
            found = dispatch.availability(device)
            why = "" if dispatch.hash_path(found) == "cuda" else _why_no_cuda_hash(found)
            paths.add_row(name, "hash", "any", dispatch.hash_path(found), why)
    console.print(paths)


def _why_no_cuda_hash(found: dispatch.Availability) -> str:
    """The CUDA hash kernels need what the ``cublas`` path needs."""
    request = dispatch.Request(1, 1, 1, 1)
    return "; ".join(f"cuda: {why}" for _, why in dispatch.plan_refusals(request, found, ("cublas",)))


@dataclass(frozen=True)
class Check:
    """One row of :func:`verify`.

    Attributes:
        model: a key of ``PRESETS``. path: what was called.
        comparison: with float64, or None if there is none.
        problem: what is wrong beyond that comparison, or empty.
        skipped: why nothing was compared, or empty.
    """

    model: str
    path: str
    comparison: testing.Comparison | None = None
    problem: str = ""
    skipped: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.problem) or (self.comparison is not None and not self.comparison.ok)

    @property
    def result(self) -> str:
        return f"WRONG {self.problem}".rstrip() if self.failed else self.skipped or "ok"


def _compared(model: str, path: str, compare: Callable[[], tuple[testing.Comparison, str]]) -> Check:
    """The check of ``compare()``, a comparison and a problem; a path that raises has failed, the others go on."""
    try:
        return Check(model, path, *compare())
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        return Check(model, path, problem=" ".join(str(error).split()) or type(error).__name__)


def _dense_checks(model: str, config: RouterConfig, inputs: testing.DenseInputs) -> Iterator[Check]:
    device, num_tokens = inputs.hidden_states.device, inputs.hidden_states.shape[0]
    found, sizes = dispatch.availability(device), (config.hidden_size, config.num_experts, config.top_k, num_tokens)
    factor = config.routed_scaling_factor

    def compare(backend: str, batch_invariant: bool) -> tuple[testing.Comparison, str]:
        def call(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return api.dense_route(
                hidden_states, *inputs[1:], config.top_k, factor, backend=backend, batch_invariant=batch_invariant
            )

        weights, ids = call(inputs.hidden_states)
        differ = 0
        for row in range(min(num_tokens, _TOKENS_ALONE) if batch_invariant else 0):
            alone = call(inputs.hidden_states[row : row + 1])
            differ += not (torch.equal(alone[0][0], weights[row]) and torch.equal(alone[1][0], ids[row]))
        problem = f"{differ} tokens differ when routed alone" if differ else ""
        return testing.compare_dense(inputs, config.top_k, factor, weights, ids), problem

    for path in dispatch.PATHS:
        label = f"dense, {path}"
        if refusals := dispatch.plan_refusals(dispatch.Request(*sizes), found, (path,)):
            yield Check(model, label, skipped=f"not available: {refusals[0][1]}")
        else:
            yield _compared(model, label, partial(compare, path, False))
    path = dispatch.choose(dispatch.Request(*sizes, batch_invariant=True), found)
    yield _compared(model, f"dense, batch-invariant ({path})", partial(compare, "auto", True))


def _compare_plain(
    inputs: testing.HashInputs, top_k: int, weights: torch.Tensor, ids: torch.Tensor
) -> testing.Comparison:
    """The plain form has nothing to round: the table's ids and 1/k, exactly."""
    wrong = int((ids.long() != inputs.hash_lut[inputs.token_ids.long()].long()).sum())
    uniform = torch.ones(1, device=weights.device) / top_k
    error = float(((weights - uniform).abs() / uniform).max())
    return testing.Comparison(ids.shape[0], wrong, error, 0.0)


def _hash_checks(model: str, config: RouterConfig, inputs: testing.HashInputs) -> Iterator[Check]:
    found = dispatch.availability(inputs.token_ids.device)
    path, top_k, factor = dispatch.hash_path(found), config.top_k, config.routed_scaling_factor
    if why := _why_no_cuda_hash(found):
        yield Check(model, "hash, cuda", skipped=f"not available: {why.removeprefix('cuda: ')}")

    def plain() -> tuple[testing.Comparison, str]:
        weights, ids = api.hash_route(inputs.token_ids, inputs.hash_lut, top_k)
        return _compare_plain(inputs, top_k, weights, ids), ""

    def scored(**source: Any) -> tuple[testing.Comparison, str]:
        weights, ids = api.hash_route(inputs.token_ids, inputs.hash_lut, top_k, routed_scaling_factor=factor, **source)
        return testing.compare_hash(inputs, top_k, factor, weights, ids), ""

    logits = testing.float64_logits(inputs.hidden_states, inputs.gate_weight).float()
    operands = {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight}
    yield _compared(model, f"hash, plain ({path})", plain)
    yield _compared(model, f"hash, from logits ({path})", partial(scored, router_logits=logits))
    yield _compared(model, f"hash, from hidden states ({path})", partial(scored, **operands))


def checks(device: torch.device, num_tokens: int, seed: int) -> Iterator[Check]:
    """Every path of every preset, compared with float64."""
    for model, config in PRESETS.items():
        yield from _dense_checks(model, config, testing.make_dense_inputs(config, num_tokens, seed=seed, device=device))
        if config.num_hash_layers:
            yield from _hash_checks(
                model, config, testing.make_hash_inputs(config, num_tokens, seed=seed, device=device)
            )
        else:
            yield Check(model, "hash", skipped="skipped: this model has no hash layers")


def verify(device: torch.device, num_tokens: int, seed: int) -> bool:
    """Prints every check; whether none failed."""
    table = Table("model", "path", "tokens", "wrong ids", "weight error", "tolerance", "result")
    done = []
    with _console(stderr=True).status("comparing") as status:
        for check in checks(device, num_tokens, seed):
            status.update(f"compared {check.model}: {check.path}")
            done.append(check)
            found = check.comparison
            numbers = ("", "", "", "")
            if found is not None:
                tolerance = f"{found.weight_tolerance:.1e}" if found.weight_tolerance else "exact"
                numbers = (str(found.num_tokens), str(found.wrong_ids), f"{found.weight_error:.1e}", tolerance)
            table.add_row(check.model, check.path, *numbers, check.result)
    console = _console()
    console.print(table)
    compared, failed = sum(check.comparison is not None for check in done), sum(check.failed for check in done)
    console.print(f"{compared} paths compared with float64 on {device_name(device)}, {failed} wrong")
    return failed == 0
