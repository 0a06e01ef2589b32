# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The ``decode`` path: compiles, loads and launches the CuTe DSL kernels. Arguments have been checked.

Up to as many rows as the largest variant of ``dense_router_decode.py`` takes it is one launch. More rows take two where
``dense_logits.py`` compiles, logits and the CUDA top-k, at some counts a third for the last rows, and elsewhere one for
each as many. The bits are the same.

A compiled kernel is an object file: host code, which encodes the tensor maps and launches, with the cubin inside. It
is made by CuTe DSL on any machine, kept on disk (:mod:`dsv4_router.jit_cache`) and linked into the process by the
DSL's own loader, without a compiler. All its arguments are numbers, so a call converts no tensor.
"""

from __future__ import annotations

import os
import platform
import tempfile
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .. import dispatch, jit_cache
from ..arguments import ROW_ALIGNMENT, DenseOperands, Options, OrdinaryCall, pieces_of, row_stride, rows_of
from ..decode_config import DecodeConfig, max_tokens, token_tile, variant, variants
from ..logits_config import CLUSTER, LogitsConfig, Schedule, fastest, logits_configs
from . import cublas, cuda_module, workspaces

Config = DecodeConfig | LogitsConfig  # of one compiled kernel

# Looks at a row's packets before its owner computes the row alone: 0.7 us each, so about 50 us.
MAX_LOOKS = 64
SOURCES = (
    "dense_router_decode.py",
    "warp_product.py",
    "warpgroup_product.py",
    "row_selection.py",
    "dense_logits.py",
    "decode_ptx.py",
)
_ENTRY = "dense_router_decode"
_ROWS_AT_ONCE = 1 << 16  # bounds the partial logits of a long call to 256 MiB (E = 512)
# Held while a kernel is named and compiled. `set_name_prefix` changes the kernel's class, which the variants of all
# models share; the lock of `_Model._load` holds off only other threads with the same model.
_compiling = Lock()


def _sources() -> dict[str, str]:
    folder = cuda_module.kernel_folder()
    package = Path(__file__).parents[1]
    files = [folder / name for name in SOURCES] + [package / "decode_config.py", package / "logits_config.py"]
    files.append(Path(__file__))
    return {file.name: file.read_text() for file in files}


@cache
def _toolchain() -> dict[str, str]:
    return jit_cache.versions_of(("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "apache-tvm-ffi"))


@cache
def _host() -> dict[str, str]:
    """The processor, for which an object's host code is compiled: another one may lack its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    return {"machine": platform.machine(), "features": repr(sorted(features))}


def compile_object(
    config: Config, target: str, options: str = "", decode_kernel: type | None = None
) -> tuple[bytes, Any]:
    """Compiles one kernel, without a GPU and without the cache.

    Args:
        config: a variant of the decode kernel, or the kernel that makes logits of many rows.
        target: an architecture, such as ``"sm_90a"``.
        options: more of CuTe DSL's, such as ``"--keep-cubin"``.
        decode_kernel: a class in place of DenseRouterDecodeKernel, such as one with another epilogue, or None.

    Returns:
        The object file, and CuTe DSL's compiled function.

    Raises:
        ValueError: the kernel does not fit the architecture.
    """
    config.check(target)
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from ..kernels.dense_logits import DenseLogitsKernel
    from ..kernels.dense_router_decode import DenseRouterDecodeKernel

    kinds = {"int": Int32, "address": Int64, "float": Float32}
    kernel: Any
    sizes = f"H{config.hidden_size}_E{config.num_experts}"
    if isinstance(config, DecodeConfig):
        kernel, arguments = (decode_kernel or DenseRouterDecodeKernel)(config), _ARGUMENTS
        name = f"{_ENTRY}_{sizes}_k{config.top_k}_rows{config.token_tile}"
    else:
        kernel, arguments = DenseLogitsKernel(config), _LOGITS_ARGUMENTS
        name = f"dense_logits_{sizes}_tile{config.expert_tile}"
    with _compiling:
        # What profilers call it. Another thread's compilation would take the name too.
        type(kernel).kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
        compiled = cute.compile(
            kernel,
            *(kinds[kind](0) for kind in arguments),
            make_fake_stream(),
            options=f"--enable-tvm-ffi --gpu-arch {target} {options}",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.o")
        compiled.export_to_c(path, function_name=_ENTRY)
        return Path(path).read_bytes(), compiled


# The kinds of DenseRouterDecodeKernel.__call__'s arguments, in its order, without the stream.
_ARGUMENTS = (
    *["address"] * 8,  # hidden_states, hidden_stride, gate_weight, gate_stride, bias, workspace, weights, ids
    "int",  # ids_are_int64
    *["address"] * 3,  # logits_out, token_mask, num_valid_tokens
    *["int"] * 3,  # num_valid_tokens_on_host, first_row, num_tokens
    "address",  # padding_id
    "float",  # routed_scaling_factor
    *["int"] * 3,  # weights_are_constant, max_looks, launch_with_pdl
)
# Those of DenseLogitsKernel.__call__.
_LOGITS_ARGUMENTS = (
    *["address"] * 5,  # hidden_states, hidden_stride, gate_weight, gate_stride, partial_logits
    *["int"] * 6,  # num_tokens, num_parts, max_clusters, early_stages, dependents, launch_with_pdl
)


def kernels_of(hidden_size: int, num_experts: int, top_k: int, architecture: str) -> list[Config]:
    """All kernels of a model that fit an architecture, the fewest rows first; none if no variant does."""
    found: list[Config] = [*variants(hidden_size, num_experts, top_k, architecture)]
    return [*found, *logits_configs(hidden_size, num_experts, architecture)] if found else []


def object_code(config: Config, target: str) -> bytes:
    """The compiled kernel, from the disk cache if it is there."""
    parts = _sources() | _toolchain() | _host() | {"target": target, "config": repr(config)}
    return jit_cache.load_or_build(jit_cache.entry_key(parts), ".o", lambda: compile_object(config, target)[0])


def link(code: bytes) -> Any:
    """The function of an object file, as ``tvm_ffi.Function``."""
    import tvm_ffi
    from cutlass._mlir._mlir_libs._cutlass_ir._execution_engine import BinaryExecutionEngine
    from cutlass.base_dsl.env_manager import get_prefix_dsl_libs

    runtime = get_prefix_dsl_libs("CUTE_DSL") or ""
    engine = BinaryExecutionEngine(code, runtime.split(os.pathsep), True)
    return tvm_ffi.Function.__from_extern_c__(engine.lookup(f"__tvm_ffi_{_ENTRY}"), keep_alive_object=engine)


class _Model:
    """The kernels of one model's sizes on one device, loaded as token counts come up."""

    def __init__(self, device_index: int, hidden_size: int, num_experts: int, top_k: int) -> None:
        self._device_index, self._sizes = device_index, (hidden_size, num_experts, top_k)
        self.architecture = dispatch.architecture(torch.cuda.get_device_capability(device_index))
        self._loading = Lock()
        self._kernels: dict[int | LogitsConfig, tuple[Any, int]] = {}  # by token tile, or what makes many rows' logits
        self.max_rows = max_tokens(*self._sizes, self.architecture, self.num_multiprocessors)
        self.many_rows = logits_configs(hidden_size, num_experts, self.architecture)

    @cached_property
    def num_multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self._device_index).multi_processor_count

    @cached_property
    def max_clusters(self) -> int:
        """Clusters of ``dense_logits.py`` that the device holds at once: a block takes a multiprocessor."""
        return max(1, self.num_multiprocessors // CLUSTER)

    @cached_property
    def ordinary(self) -> frozenset[int]:
        """For how many rows ``"auto"`` takes this path in one launch, as :func:`dispatch.choose` says."""
        found = dispatch.availability(torch.device("cuda", self._device_index))
        limit = dispatch.decode_limit(*self._sizes[:2], found)
        return frozenset(filter(limit.includes, range(1, self.max_rows + 1)))

    def variant(self, num_rows: int) -> DecodeConfig:
        """What serves 1 to ``max_rows`` rows."""
        return variant(*self._sizes, token_tile(num_rows), self.architecture)

    def kernel(self, num_rows: int) -> tuple[Any, int]:
        """The function for 1 to ``max_rows`` rows, and the bytes of workspace that it needs."""
        tile = token_tile(num_rows)
        return self._kernels.get(tile) or self._load(tile, self.variant(num_rows))

    def schedule(self, num_tokens: int) -> Schedule:
        """How more rows than ``max_rows`` are served, where there are ``many_rows``."""
        return fastest(self.many_rows, num_tokens, self.num_multiprocessors, self.max_rows)

    def logits_kernel(self, config: LogitsConfig) -> Any:
        """The function of one of ``many_rows``."""
        return (self._kernels.get(config) or self._load(config, config))[0]

    def logits_options(
        self, schedule: Schedule, weights_are_constant: bool, launch_with_pdl: bool
    ) -> tuple[int, int, int, int, int, bool]:
        """What that function takes between the address of the logits and the stream."""
        config, parts, num_rows = schedule
        early_stages = config.early_stages(num_rows) if weights_are_constant else 0
        dependents = config.dependents(parts, num_rows, self.num_multiprocessors)
        return num_rows, parts, self.max_clusters, early_stages, dependents, launch_with_pdl

    def _load(self, key: int | LogitsConfig, config: Config) -> tuple[Any, int]:
        with self._loading:
            if key not in self._kernels:
                self.take(key, config, object_code(config, self.architecture))
            return self._kernels[key]

    def take(self, key: int | LogitsConfig, config: Config, code: bytes) -> None:
        """From now on, launches of these rows are of this object file."""
        workspace_bytes = config.workspace_bytes if isinstance(config, DecodeConfig) else 0
        self._kernels[key] = _FirstCall(link(code), self._kernels, key), workspace_bytes


class _FirstCall:
    """Calls a function that loads its cubin when it is first called, possibly within a capture; then steps aside."""

    def __init__(self, function: Any, kernels: dict[Any, tuple[Any, int]], key: Any) -> None:
        self._function, self._kernels, self._key = function, kernels, key

    def __call__(self, *args: Any) -> None:
        with cuda_module.capture_allowed():
            self._function(*args)
        self._kernels[self._key] = self._function, self._kernels[self._key][1]


_models: dict[tuple[int, int, int, int], _Model] = {}


def _model(device_index: int, hidden_size: int, num_experts: int, top_k: int) -> _Model:
    key = device_index, hidden_size, num_experts, top_k
    return _models.get(key) or _models.setdefault(key, _Model(*key))


def warmup(device_index: int, hidden_size: int, num_experts: int, top_k: int) -> None:
    """Compiles or loads a model's kernels of CuTe DSL, and makes the workspace of the current stream."""
    model = _model(device_index, hidden_size, num_experts, top_k)
    for config in variants(hidden_size, num_experts, top_k, model.architecture):
        model.kernel(config.token_tile)
    for many in model.many_rows if model.max_rows else ():
        model.logits_kernel(many)
    with torch.cuda.device(device_index):
        workspaces.of_stream(device_index, torch._C._cuda_getCurrentRawStream(device_index))


def replace_kernel(decode_kernel: type, device_index: int, sizes: tuple[int, int, int], num_rows: int) -> DecodeConfig:
    """Has later calls in this process launch a kernel of another class in place of a variant of the decode kernel.

    For tools, such as those that put time stamps into it: no cache is read or written, and nothing takes it back.

    Args:
        decode_kernel: the class, as :func:`compile_object` takes it.
        device_index: of the GPU whose calls launch it.
        sizes: of the model: hidden_size, num_experts and top_k.
        num_rows: of a launch that the variant serves, from 1 to what one launch takes.

    Returns:
        The variant.

    Raises:
        ValueError: the kernel does not fit the device's architecture.
    """
    model = _model(device_index, *sizes)
    config = model.variant(num_rows)
    code, _ = compile_object(config, model.architecture, decode_kernel=decode_kernel)
    model.take(config.token_tile, config, code)
    return config


def route_again(
    ordinary: OrdinaryCall, operands: DenseOperands, launch_with_pdl: bool, weights_are_constant: bool
) -> bool:
    """The short way of an eager call, or False, with nothing done, for calls that must go the long way.

    It takes calls that ``arguments.ordinary_dense_call`` accepted, of a model for which :func:`route` has been chosen
    before: every rule of that choice but those asked here depends on the model alone.
    """
    device_index, num_tokens, num_experts, hidden_size = ordinary
    hidden_states, gate_weight, _, top_k, _, _, _ = operands
    model = _models.get((device_index, hidden_size, num_experts, top_k))
    if model is None or num_tokens not in model.ordinary:
        return False
    hidden, gate = hidden_states.data_ptr(), gate_weight.data_ptr()
    if (
        not (hidden and gate)
        or (hidden | gate) % ROW_ALIGNMENT
        or hidden_states.dtype is not torch.bfloat16
        or torch._C._cuda_getDevice() != device_index
    ):
        return False
    strides = hidden_size, hidden_size
    _launch(model, device_index, num_tokens, hidden, gate, strides, operands, launch_with_pdl, weights_are_constant)
    return True


def route(
    operands: DenseOperands, logits_out: torch.Tensor | None, options: Options, max_looks: int = MAX_LOOKS
) -> None:
    """Routes N tokens, N at least 1, on the current stream; the current device must be the tensors'.

    Args:
        operands, logits_out, options: of the call, as in :func:`dsv4_router.dense_router_dispatch`.
        max_looks: at other blocks' sums before a row's owner computes the row alone, for tests. Rows whose logits
            ``dense_logits.py`` makes have no such looks.
    """
    hidden_states, gate_weight, top_k = operands[0], operands[1], operands[3]
    num_tokens, hidden_size = hidden_states.shape
    model = _model(hidden_states.get_device(), hidden_size, gate_weight.shape[0], top_k)
    if num_tokens > model.max_rows and model.many_rows:
        for part in pieces_of(operands, logits_out, options, _ROWS_AT_ONCE):
            _route_many(model, *part, max_looks)
    else:
        _route_from(0, model, operands, logits_out, options, max_looks)


def _route_from(
    start: int,
    model: _Model,
    operands: DenseOperands,
    logits_out: torch.Tensor | None,
    options: Options,
    max_looks: int,
) -> None:
    """A call's rows from ``start`` on, by the decode kernel, in as many launches as that takes."""
    hidden_states, gate_weight = operands[:2]
    num_tokens, num_experts = hidden_states.shape[0], gate_weight.shape[0]
    logits = 0 if logits_out is None else logits_out.data_ptr()
    mask, *counts = cuda_module.padding_arguments(options.token_mask, options.num_valid_tokens, num_tokens)
    strides = row_stride(hidden_states), row_stride(gate_weight)
    for first in range(start, num_tokens, model.max_rows):
        rows = slice(first, min(first + model.max_rows, num_tokens))
        piece = operands if rows == slice(0, num_tokens) else rows_of(operands, rows)
        _launch(
            model,
            hidden_states.get_device(),
            rows.stop - first,
            piece[0].data_ptr(),
            gate_weight.data_ptr(),
            strides,
            piece,
            options.launch_with_pdl,
            options.weights_are_constant,
            first,
            logits and logits + first * num_experts * 4,
            (mask and mask + first, *counts),
            options.padding_id,
            max_looks,
        )


def remember(choice: cublas.Choice, ordinary: OrdinaryCall) -> None:
    """Prepares :func:`cublas.route_again` for calls like one of more rows than one launch takes.

    :func:`route` has been chosen for that, an ordinary call of bf16 operands with aligned rows on the current stream.
    """
    device_index, num_tokens, num_experts, hidden_size = ordinary
    model = _model(device_index, hidden_size, num_experts, choice.top_k)
    if num_tokens <= model.max_rows or not model.many_rows:
        return
    config, parts, num_rows = schedule = model.schedule(num_tokens)

    def products() -> cublas.Products:
        kernel = model.logits_kernel(config)

        def launch(options: tuple[int, ...], hidden: int, gate: int, logits: int, stream: int) -> None:
            kernel(hidden, hidden_size, gate, hidden_size, logits, *options, stream)

        return [partial(launch, model.logits_options(schedule, *both)) for both in product((False, True), repeat=2)]

    def route_left(operands: DenseOperands, launch_with_pdl: bool, weights_are_constant: bool) -> None:
        options = Options(launch_with_pdl=launch_with_pdl, weights_are_constant=weights_are_constant)
        _route_from(num_rows, model, operands, None, options, MAX_LOOKS)

    cublas.remember_products(
        choice,
        ordinary,
        config.num_sums(parts),
        config.first_half(parts),
        products,
        by_address=True,
        num_rows=num_rows,
        route_left=route_left if num_rows < num_tokens else None,
    )


def _route_many(
    model: _Model, operands: DenseOperands, logits_out: torch.Tensor | None, options: Options, max_looks: int
) -> None:
    """Logits by one launch and all else by another; the rows that the schedule leaves, by one of the decode kernel."""
    hidden_states, gate_weight = operands[:2]
    num_tokens, device_index = hidden_states.shape[0], hidden_states.get_device()
    config, parts, num_rows = schedule = model.schedule(num_tokens)
    shape = config.num_sums(parts), num_rows, config.num_experts
    logits = hidden_states.new_empty(shape, dtype=torch.float32)
    model.logits_kernel(config)(
        hidden_states.data_ptr(),
        row_stride(hidden_states),
        gate_weight.data_ptr(),
        row_stride(gate_weight),
        logits.data_ptr(),
        *model.logits_options(schedule, options.weights_are_constant, options.launch_with_pdl),
        torch._C._cuda_getCurrentRawStream(device_index),
    )
    cublas.activation_topk(logits, *operands[2:], logits_out, options, first_half=config.first_half(parts))
    if num_rows < num_tokens:
        _route_from(num_rows, model, operands, logits_out, options, max_looks)


def _launch(
    model: _Model,
    device_index: int,
    num_rows: int,
    hidden: int,
    gate: int,
    strides: tuple[int, int],
    operands: DenseOperands,
    launch_with_pdl: bool,
    weights_are_constant: bool,
    first_row: int = 0,
    logits_out: int = 0,
    padding: tuple[int, ...] = (),
    padding_id: int = -1,
    max_looks: int = MAX_LOOKS,
) -> None:
    """One launch on the current stream, for at most ``model.max_rows`` rows.

    Args:
        num_rows: of this launch. hidden, gate: addresses. strides: of their rows.
        operands: for the other operands; outputs from the launch's first row on.
        first_row: what this is in the call, for the counts of ``padding``.
        logits_out: address of the first row's logits, or 0.
        padding: as :func:`cuda_module.padding_arguments` has it, the mask from the first row on; or nothing.
    """
    _, _, correction_bias, _, routed_scaling_factor, out_weights, out_ids = operands
    stream = torch._C._cuda_getCurrentRawStream(device_index)
    kernel, workspace_bytes = model.kernel(num_rows)
    token_mask, num_valid_tokens, num_valid_tokens_on_host = padding or (0, 0, num_rows)
    kernel(
        hidden,
        strides[0],
        gate,
        strides[1],
        0 if correction_bias is None else correction_bias.data_ptr(),
        workspaces.address(device_index, stream, workspace_bytes),
        out_weights.data_ptr(),
        out_ids.data_ptr(),
        out_ids.dtype is torch.int64,
        logits_out,
        token_mask,
        num_valid_tokens,
        num_valid_tokens_on_host,
        first_row,
        num_rows,
        padding_id,
        float(routed_scaling_factor),
        weights_are_constant,
        max_looks,
        launch_with_pdl,
        stream,
    )
