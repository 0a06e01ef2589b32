# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The command ``dsv4-router``: demo, route, compile, tune, bench, info and verify. Each imports torch when it runs."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__

if TYPE_CHECKING:
    import torch

    from .modules import Router

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)


class Backend(StrEnum):
    """``dispatch.BACKENDS``, without importing it."""

    auto = "auto"
    decode = "decode"
    cublas = "cublas"
    reference = "reference"


class IdsDtype(StrEnum):
    """What expert ids may be written as."""

    int32 = "int32"
    int64 = "int64"


class Preset(StrEnum):
    """The keys of ``config.PRESETS``, without importing it."""

    v4_flash = "v4-flash"
    v4_pro = "v4-pro"
    v4_1_flash = "v4.1-flash"
    v4_1_flash_draft = "v4.1-flash-draft"


class Architecture(StrEnum):
    """``decode_config.ARCHITECTURES``."""

    sm_90a = "sm_90a"
    sm_100a = "sm_100a"
    sm_103a = "sm_103a"
    sm_120a = "sm_120a"


DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: a CUDA GPU if torch sees one.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsv4-router {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The Mixture-of-Experts router of DeepSeek-V4: hidden states in, expert ids and weights out."""


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(f"dsv4-router: {text}", err=True)


def pick_device(name: str) -> torch.device:
    """The device of that name, usable on this machine; ``auto`` is a CUDA GPU if there is one."""
    import torch

    from . import dispatch
    from .errors import value_error

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = dispatch.check_device(name)
    if device.type not in ("cpu", "cuda"):
        raise value_error("--device", "auto, cpu, cuda or cuda:INDEX", name)
    if missing := dispatch.availability(device).missing_device:
        raise ValueError(f"--device: expected a usable device, got {name!r} ({missing})")
    return device


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to route.")] = 256,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Route random tokens through a dense layer of V4-Flash's shape, show the result and check it."""
    from . import cli_reports

    if not cli_reports.demo(pick_device(device), tokens, seed):
        raise typer.Exit(1)


class FileRows:
    """A tensor in a ``.safetensors`` or ``.npy`` file, of which only the rows that are asked for are read.

    Attributes:
        option: the command line's option, for messages. path: the file.
        shape: the tensor's. dtype: its name, such as ``"bfloat16"``.
    """

    def __init__(self, option: str, source: str, default_name: str) -> None:
        self.option = option
        file, separator, name = source.partition(".safetensors:")
        self.path = Path(file + ".safetensors" if separator else source)
        if self.path.suffix not in (".safetensors", ".npy"):
            raise ValueError(f"{option}: expected a .safetensors (or .safetensors:NAME) or .npy file, got {source!r}")
        if not self.path.is_file():
            raise FileNotFoundError(f"{option}: no such file: {self.path}")
        if self.path.suffix == ".npy":
            self._open_numpy()
        else:
            self._open_safetensors(name, default_name)

    def _open_numpy(self) -> None:
        from numpy.lib.format import open_memmap

        try:
            array = open_memmap(self.path, mode="r")
        except (ValueError, SyntaxError, EOFError, tokenize.TokenError) as error:  # of a header that NumPy parses
            raise ValueError(f"{self.option}: expected a .npy file, got {self.path} ({error})") from None
        self.shape = tuple(array.shape)
        self.dtype = str(array.dtype.name)

    def _open_safetensors(self, name: str, default_name: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.option}: expected a safetensors file, got {self.path} ({error})") from None
        names = sorted(file.keys())
        held = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "none"
        if not name:
            name = default_name if default_name in names or len(names) != 1 else names[0]
        if name not in names:
            hint = f"{self.path}:NAME chooses one of its tensors: {held}"
            raise ValueError(
                f"{self.option}: expected a tensor {name!r} in {self.path}, got none of that name ({hint})"
            )
        self._name = name
        rows = file.get_slice(name)
        self.shape = tuple(rows.get_shape())
        known = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}
        self.dtype = known.get(rows.get_dtype(), rows.get_dtype())

    def expect(self, dtypes: tuple[str, ...], shape: tuple[int | None, ...], what: str) -> None:
        """Raises unless the dtype is among ``dtypes`` and the shape is ``shape``, where None is any length."""
        got = f"got {self.dtype} {list(self.shape)} in {self.path}"
        if self.dtype not in dtypes:
            raise TypeError(f"{self.option}: expected {' or '.join(dtypes)} {what}, {got}")
        if len(shape) != len(self.shape) or any(n not in (None, m) for n, m in zip(shape, self.shape, strict=True)):
            sizes = ", ".join("N" if n is None else str(n) for n in shape)
            raise ValueError(f"{self.option}: expected {what} [{sizes}], {got}")

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop - 1``, as a new tensor on the CPU.

        The file is mapped anew each time: pages of one that stays mapped count as this process's memory once read.
        """
        import numpy
        import torch
        from numpy.lib.format import open_memmap
        from safetensors import safe_open

        if self.path.suffix == ".npy":
            array = open_memmap(self.path, mode="r")[start:stop]
            return torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        with safe_open(self.path, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(self._name)[start:stop].clone()
        return rows


class RouteJob:
    """One layer's router and its inputs, checked against each other before anything is routed.

    Attributes:
        notes: what the user should know of how the inputs are taken.
    """

    def __init__(
        self,
        router: Router,
        hidden: FileRows,
        tokens: FileRows | None,
        ids_dtype: torch.dtype,
        backend: str,
        batch_invariant: bool,
    ) -> None:
        from .modules import DenseRouter, HashRouter

        self.config, self.ids_dtype = router.config, ids_dtype
        self.backend, self.batch_invariant = backend, batch_invariant
        self.gate = router.weight.detach()
        self.table = router.tid2eid.detach() if isinstance(router, HashRouter) else None
        self.bias = router.e_score_correction_bias if isinstance(router, DenseRouter) else None
        self.hidden, self.tokens = hidden, tokens
        self.notes: list[str] = []
        hidden.expect(("bfloat16", "float32"), (None, self.gate.shape[1]), "hidden states")
        self._match_gate()
        if self.table is None:
            if tokens is not None:
                self.notes.append("--token-ids is not used: the layer is dense")
                self.tokens = None
            return
        if tokens is None:
            raise ValueError("--token-ids: expected a file, since the layer routes by token id, got none")
        tokens.expect(("int32", "int64"), (None,), "token ids")
        if tokens.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"--token-ids: expected one for each of the {hidden.shape[0]} hidden states, got {tokens.shape[0]}"
            )
        if backend != "auto":
            raise ValueError(f"--backend: expected 'auto' for a layer that routes by token id, got {backend!r}")

    def _match_gate(self) -> None:
        gate_dtype = str(self.gate.dtype).removeprefix("torch.")
        if self.hidden.dtype == gate_dtype:
            return
        if gate_dtype != "bfloat16":
            raise TypeError(
                f"--hidden-states: expected {gate_dtype}, which the layer's gate weight is, got {self.hidden.dtype}"
            )
        self.notes.append(
            "float32 hidden states: the gate weight is converted from bfloat16 to float32, which is exact"
        )
        self.gate = self.gate.float()

    def path(self, batch_sizes: set[int]) -> str:
        """The path or, where batches of these sizes take several, paths with ``+`` between; raises if there is none."""
        from . import dispatch
        from .errors import BackendUnavailableError

        if self.table is None:
            paths = {
                dispatch.explain(
                    self.config,
                    size,
                    self.gate.device,
                    backend=self.backend,
                    batch_invariant=self.batch_invariant,
                    dtype=self.gate.dtype,
                ).path
                for size in batch_sizes
            }
            return "+".join(sorted(paths))
        path = dispatch.hash_path(dispatch.availability(self.gate.device))
        if self.batch_invariant and path != "cuda":
            raise BackendUnavailableError(f"--batch-invariant: hash routing by the {path} path is not batch-invariant")
        return path

    def route(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids of rows ``start`` to ``stop - 1``, on the router's device."""
        from . import api

        device, config = self.gate.device, self.config
        hidden = self.hidden.read(start, stop).to(device)
        if self.tokens is None or self.table is None:
            return api.dense_route(
                hidden,
                self.gate,
                self.bias,
                config.top_k,
                config.routed_scaling_factor,
                ids_dtype=self.ids_dtype,
                backend=self.backend,
                batch_invariant=self.batch_invariant,
            )
        return api.hash_route(
            self.tokens.read(start, stop).to(device),
            self.table,
            config.top_k,
            ids_dtype=self.ids_dtype,
            hidden_states=hidden,
            gate_weight=self.gate,
            routed_scaling_factor=config.routed_scaling_factor,
        )


def _checked_output(output: Path, inputs: Iterable[Path]) -> Path:
    """The file itself, if ``output`` is a link to one; before minutes are spent on what could not be written."""
    output = output.resolve()
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: no such folder: {output.parent}")
    if output.exists() and not output.is_file():  # a file would take the place of a device as well
        raise ValueError(f"--output: expected a regular file, got {output}")
    if output.exists() and any(path.exists() and output.samefile(path) for path in inputs):
        raise ValueError(f"--output: expected a file of its own, got an input: {output}")
    with tempfile.TemporaryFile(dir=output.parent):
        return output


def _save(output: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes beside ``output`` and renames, so that ``output`` is whole or not there."""
    from safetensors.torch import save_file

    part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)


def _route_all(job: RouteJob, num_tokens: int, batch_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of all rows, on the CPU; a progress bar on stderr if there is more than one batch."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    weights = torch.empty(num_tokens, job.config.top_k, dtype=torch.float32)
    ids = torch.empty(num_tokens, job.config.top_k, dtype=job.ids_dtype)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=num_tokens <= batch_tokens) as progress:
        task = progress.add_task("tokens", total=num_tokens)
        for start in range(0, num_tokens, batch_tokens):
            stop = min(start + batch_tokens, num_tokens)
            batch_weights, batch_ids = job.route(start, stop)
            weights[start:stop] = batch_weights.cpu()
            ids[start:stop] = batch_ids.cpu()
            progress.update(task, completed=stop)
    return weights, ids


@app.command()
def route(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder or .safetensors file.")],
    layer: Annotated[str, typer.Option(metavar="N|PREFIX", help="Layer number, or the prefix of its tensors' names.")],
    hidden_states: Annotated[
        str, typer.Option(metavar="FILE", help="[N, H]: FILE.safetensors, FILE.safetensors:NAME or FILE.npy.")
    ],
    output: Annotated[Path, typer.Option(help="The safetensors file to write: weights and ids, [N, k].")],
    token_ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="[N], for layers that route by token id; as --hidden-states.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json; without it, the one in the checkpoint folder.")
    ] = None,
    device: DeviceOption = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Rows that are read and routed at a time.")] = 8192,
    ids_dtype: Annotated[IdsDtype, typer.Option(help="Type of the ids.")] = IdsDtype.int32,
    backend: Annotated[Backend, typer.Option(help="Path of a dense layer.")] = Backend.auto,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits for a token in batches of any size.")
    ] = False,
) -> None:
    """Route the hidden states in a file through one layer of a checkpoint."""
    import torch

    from .checkpoint import checkpoint_files, load_router
    from .config import CONFIG_FILE, RouterConfig

    chosen = pick_device(device)
    hidden = FileRows("--hidden-states", hidden_states, "hidden_states")
    tokens = None if token_ids is None else FileRows("--token-ids", token_ids, "token_ids")
    of_config = [] if config is None else [config, config / CONFIG_FILE]
    inputs = [*checkpoint_files(checkpoint), *of_config, hidden.path, *([] if tokens is None else [tokens.path])]
    file = _checked_output(output, inputs)
    given = None if config is None else RouterConfig.from_hf_config(config)
    which = int(layer) if layer.isascii() and layer.isdecimal() else layer
    router = load_router(checkpoint, which, config=given, device=chosen)
    job = RouteJob(router, hidden, tokens, getattr(torch, ids_dtype.value), backend.value, batch_invariant)
    num_tokens = hidden.shape[0]
    sizes = {min(num_tokens, batch_tokens), num_tokens % batch_tokens or min(num_tokens, batch_tokens)}
    path = job.path(sizes)
    for line in job.notes:
        note(line)
    started = time.perf_counter()
    weights, ids = _route_all(job, num_tokens, batch_tokens)
    seconds = time.perf_counter() - started
    metadata = {
        "layer": layer,
        "path": path,
        "top_k": str(job.config.top_k),
        "routed_scaling_factor": str(job.config.routed_scaling_factor),
    }
    _save(file, {"weights": weights, "ids": ids}, metadata)
    padding = int((ids[:, 0] == -1).sum())
    aside = f" ({padding} of them without experts: no such token id in the table)" if padding else ""
    kind = "dense" if job.table is None else "hash"
    typer.echo(
        f"routed {num_tokens} tokens{aside} through {kind} layer {layer} in {seconds:.3f} s, "
        f"path {path} on {chosen}: {output}"
    )


ModelConfig = Annotated[
    Path | None, typer.Option(help="Instead of --preset: a folder with the model's config.json, or that file.")
]


@app.command("compile")
def compile_kernels(
    preset: Annotated[Preset | None, typer.Option(help="A published model.")] = None,
    checkpoint: ModelConfig = None,
    arch: Annotated[
        list[Architecture] | None, typer.Option(help="Of the GPUs; may be repeated. Without it: all of these.")
    ] = None,
) -> None:
    """Compile the kernels of a model's dense calls into the kernel cache, also on a machine without a GPU."""
    from . import cli_reports
    from .config import PRESETS, RouterConfig

    if preset is not None and checkpoint is None:
        config = PRESETS[preset.value]
    elif checkpoint is not None and preset is None:
        config = RouterConfig.from_hf_config(checkpoint)
    else:
        raise ValueError(f"--preset: expected either --preset or --checkpoint, got {'both' if preset else 'neither'}")
    cli_reports.compile_ahead(config, [target.value for target in arch or Architecture])


@app.command()
def tune(
    preset: Annotated[list[Preset] | None, typer.Option(help="May be repeated. Without it: every model.")] = None,
    checkpoint: ModelConfig = None,
    device: DeviceOption = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer token counts and replays.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this file, as JSON lines.")] = None,
) -> None:
    """Measure for how many tokens the decode path is the faster one on this GPU, and keep that for later calls."""
    from . import tune as tuning
    from .config import CONFIG_FILE, PRESETS, RouterConfig

    if preset and checkpoint is not None:
        raise ValueError("--preset: expected either --preset or --checkpoint, got both")
    if output is not None:
        output = _checked_output(output, [] if checkpoint is None else [checkpoint, checkpoint / CONFIG_FILE])
    configs = {chosen.value: PRESETS[chosen.value] for chosen in preset or Preset}
    if checkpoint is not None:
        config = RouterConfig.from_hf_config(checkpoint)
        configs = {config.name: config}
    tuning.tune(configs, pick_device(device), tuning.QUICK if quick else tuning.Effort(), output)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Time every path on this GPU against other routers and the floors; its own --help lists the options."""
    from .profiling.bench import main as run_bench

    run_bench(context.args, "dsv4-router bench")


@app.command()
def info() -> None:
    """Show the GPUs, the versions, the kernel cache, and the path that calls of each model take."""
    from . import cli_reports

    cli_reports.info()


@app.command()
def verify(
    device: DeviceOption = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each call.")] = 64,
    seed: SeedOption = 0,
) -> None:
    """Compare every path of this machine with the float64 reference; exit 1 if one differs."""
    from . import cli_reports

    if not cli_reports.verify(pick_device(device), tokens, seed):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; an error of the inputs or the machine is one line on stderr and exit code 1."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dsv4-router")
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, ValueError | TypeError | OSError | RuntimeError | SafetensorError):
            raise
        note("error: " + (" ".join(str(error).split()) or type(error).__name__))
        sys.exit(1)


if __name__ == "__main__":
    main()
