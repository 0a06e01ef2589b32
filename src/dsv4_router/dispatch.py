# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Which path a call takes: a pure function of the call and of what the machine has.

The paths, in the order of preference, are ``decode`` (one launch), ``cublas`` (cuBLAS and the CUDA top-k) and
``reference`` (plain PyTorch). Each has one rule, which says why it cannot serve a request, or None; dispatch and
:func:`explain` both ask these rules, so an explanation cannot differ from what happens.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from . import decode_config, logits_config, thresholds
from .arguments import OPERANDS, check_flag
from .config import RouterConfig, check_integer
from .errors import BackendUnavailableError, type_error, value_error

PATHS = ("decode", "cublas", "reference")
BACKENDS = ("auto", *PATHS)
MIN_COMPUTE_CAPABILITY = (8, 0)
MANY_TOKENS = thresholds.MOST_TOKENS + 1  # a number of tokens above every threshold
# Where the decode kernel's GPU suite has run; elsewhere it has only been compiled.
TESTED_ARCHITECTURES = ("sm_90a",)


class Request(NamedTuple):
    """What the choice of a path depends on in a call; sizes are those of valid arguments.

    ``aligned``: the rows of hidden states and gate weight begin at multiples of 16 bytes.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    num_tokens: int
    batch_invariant: bool = False
    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True


def architecture(compute_capability: tuple[int, int]) -> str:
    """The compiler's target for a compute capability, such as ``"sm_90a"``."""
    major, minor = compute_capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@dataclass(frozen=True)
class Availability:
    """What a device and the installed packages offer.

    Attributes:
        device: as torch names it, such as ``"cuda:0"`` or ``"cpu"``.
        compute_capability: of a CUDA device, else None.
        missing_device: why the device cannot be used, or None.
        missing_cuda_python: why the CUDA C++ kernels cannot be compiled, or None.
        missing_cutlass_dsl: why CuTe DSL kernels cannot be compiled, or None.
        missing_cublaslt: why cuBLASLt cannot be called without torch, or None.
        gpu: the name of a CUDA device's model, or None.
        num_multiprocessors: of a CUDA device; None, as for one that holds all blocks of a launch at once.
        tuned: the thresholds that this machine has measured for that model.
    """

    device: str
    compute_capability: tuple[int, int] | None = None
    missing_device: str | None = None
    missing_cuda_python: str | None = None
    missing_cutlass_dsl: str | None = None
    missing_cublaslt: str | None = None
    gpu: str | None = None
    num_multiprocessors: int | None = None
    tuned: tuple[thresholds.DecodeThreshold, ...] = ()

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def architecture(self) -> str | None:
        """The compiler's target for a CUDA device, such as ``"sm_90a"``."""
        return None if self.compute_capability is None else architecture(self.compute_capability)


@dataclass(frozen=True)
class Plan:
    """The path of a call, why it was taken, and why the paths before it were not."""

    path: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    request: Request
    availability: Availability

    def __str__(self) -> str:
        r, a = self.request, self.availability
        capability = "" if a.compute_capability is None else " (sm_{}{})".format(*a.compute_capability)
        lines = [
            f"{self.path}: {self.reason}",
            f"  for H={r.hidden_size} E={r.num_experts} k={r.top_k}, {r.num_tokens} tokens on {a.device}{capability}"
            + (", batch-invariant" if r.batch_invariant else ""),
        ]
        lines += [f"  not {path}: {why}" for path, why in self.rejected]
        return "\n".join(lines)


def _no_cuda_kernels(availability: Availability) -> str | None:
    if not availability.is_cuda:
        return f"needs a CUDA device, the tensors are on {availability.device}"
    if availability.missing_device:
        return availability.missing_device
    capability = availability.compute_capability
    if capability is None or capability < MIN_COMPUTE_CAPABILITY:
        return "needs compute capability {}.{} or later, the device has {}".format(
            *MIN_COMPUTE_CAPABILITY, "none" if capability is None else "{}.{}".format(*capability)
        )
    return None


def _refuse_decode(request: Request, availability: Availability) -> str | None:
    if (why := _no_cuda_kernels(availability)) is not None:
        return why
    if availability.architecture not in decode_config.ARCHITECTURES:
        known = ", ".join(decode_config.ARCHITECTURES)
        return f"the one-launch kernel is compiled for {known}; the device is {availability.architecture}"
    if missing := availability.missing_cutlass_dsl or availability.missing_cuda_python:
        return missing
    if request.dtype is not torch.bfloat16:
        return f"the one-launch kernel takes bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if not request.aligned:
        return "the one-launch kernel needs rows of hidden_states and gate_weight aligned to 16 bytes"
    sizes = request.hidden_size, request.num_experts, request.top_k
    return decode_config.unsupported_shape(*sizes) or decode_config.too_large(*sizes, availability.architecture)


def _refuse_cublas(request: Request, availability: Availability) -> str | None:
    if (why := _no_cuda_kernels(availability)) is not None:
        return why
    if request.batch_invariant:
        return "cuBLAS chooses its order of summation by the number of tokens: not batch-invariant"
    return availability.missing_cuda_python


def _refuse_reference(request: Request, availability: Availability) -> str | None:
    return None  # slow, but any shape on any device


def _better_elsewhere(path: str, request: Request, availability: Availability) -> str | None:
    """Why a path that could serve the request is not the one for it, or None."""
    if path != "decode" or request.batch_invariant:
        return None
    limit = decode_limit(request.hidden_size, request.num_experts, availability)
    if not limit.includes(request.num_tokens):
        return f"faster {limit} only ({limit.source})"
    most_of_shape, one_launch = most_tokens(request, availability), _rows_of_a_launch(request, availability)
    most = most_of_shape if limit.is_of_shape else one_launch
    if request.num_tokens <= most:
        return None
    if most == most_of_shape:
        return f"one launch takes up to {most} tokens"
    return f"one launch takes up to {most} tokens, and more of this very shape were not measured ({limit.source})"


def _rows_of_a_launch(request: Request, availability: Availability) -> int:
    sizes = request.hidden_size, request.num_experts, request.top_k
    return decode_config.max_tokens(*sizes, availability.architecture or "", availability.num_multiprocessors)


def most_tokens(request: Request, availability: Availability) -> int:
    """The most tokens for which the decode path may be preferred in calls of a request's other sizes.

    More than one launch takes only where ``dense_logits.py`` makes the logits of more rows: a launch of the decode
    kernel for each as many reads the gate weight each time.
    """
    rows = _rows_of_a_launch(request, availability)
    return thresholds.MOST_TOKENS if rows and availability.architecture in logits_config.ARCHITECTURES else rows


def decode_limit(hidden_size: int, num_experts: int, availability: Availability) -> thresholds.Limit:
    """Up to how many tokens the decode path is the faster one for a shape, and which measurement says so."""
    found = availability
    return thresholds.decode_limit(found.gpu, found.compute_capability, found.tuned, hidden_size, num_experts)


_RULES = {"decode": _refuse_decode, "cublas": _refuse_cublas, "reference": _refuse_reference}
_REASONS = {
    "cublas": "cuBLAS for the logits, then one launch of the CUDA top-k",
    "reference": "plain PyTorch",
}


def _reason_of_decode(request: Request, availability: Availability) -> str:
    rows = _rows_of_a_launch(request, availability)
    if request.num_tokens <= rows:
        return "one launch from hidden states to experts"
    if availability.architecture in logits_config.ARCHITECTURES:
        launches = "one launch for the logits, one for the CUDA top-k, at some counts one for the last rows"
        return f"more than {rows} tokens: {launches}"
    return f"one launch from hidden states to experts for each {rows} tokens"


def choose(request: Request, availability: Availability, backend: str = "auto") -> str:
    """The path of a dense call, one of :data:`PATHS`.

    Raises:
        BackendUnavailableError: the backend that was asked for refuses the request; ``"auto"`` always finds one.
    """
    if backend == "auto":
        return next(path for path in PATHS if _not_chosen(path, request, availability) is None)
    if (why := _RULES[backend](request, availability)) is not None:
        raise BackendUnavailableError(f"backend={backend!r} cannot serve this call ({why})")
    return backend


def _not_chosen(path: str, request: Request, availability: Availability) -> str | None:
    return _RULES[path](request, availability) or _better_elsewhere(path, request, availability)


def plan_refusals(request: Request, availability: Availability, paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The paths among ``paths`` that cannot serve the request, each with its reason."""
    answers = ((path, _RULES[path](request, availability)) for path in paths)
    return tuple((path, why) for path, why in answers if why is not None)


def plan(request: Request, availability: Availability, backend: str = "auto") -> Plan:
    """What :func:`choose` chooses, with the reasons. Raises as it does."""
    path = choose(request, availability, backend)
    reason = (_reason_of_decode(request, availability) if path == "decode" else _REASONS[path]) + (
        "" if backend == "auto" else f" (asked for by backend={backend!r})"
    )
    if path == "decode" and backend == "auto" and not request.batch_invariant:
        limit = decode_limit(request.hidden_size, request.num_experts, availability)
        reason += f", faster {limit} ({limit.source})"
    if path == "decode" and availability.architecture not in TESTED_ARCHITECTURES:
        reason += f"; compiled for {availability.architecture}, never run there"
    if path == "cublas" and availability.missing_cublaslt:
        reason += f"; its product by torch.bmm, which takes longer on the host: {availability.missing_cublaslt}"
    before = PATHS[: PATHS.index(path)] if backend == "auto" else ()
    answers = ((passed, _not_chosen(passed, request, availability)) for passed in before)
    return Plan(path, reason, tuple((p, why) for p, why in answers if why is not None), request, availability)


@lru_cache(maxsize=4096)
def path_of_call(device: torch.device, backend: str, request: Request) -> str:
    """:func:`choose` for a call on ``device``, remembered. Raises as it does.

    Above every threshold the number of tokens decides nothing: pass :data:`MANY_TOKENS`, so that long prefills of
    ever new lengths share one memory.
    """
    return choose(request, availability(device), backend)


def hash_path(availability: Availability) -> str:
    """``"cuda"`` where the CUDA kernels of hash routing can run, else ``"reference"``."""
    return "reference" if _no_cuda_kernels(availability) or availability.missing_cuda_python else "cuda"


@cache
def hash_path_of_call(device: torch.device) -> str:
    """:func:`hash_path` for a call on ``device``, remembered."""
    return hash_path(availability(device))


def warn_of_reference(device: torch.device, backend: str, request: Request | None = None) -> None:
    """Says once that a call on a GPU takes plain PyTorch though nobody asked for it; no request means hash routing."""
    if device.type != "cuda" or backend != "auto":
        return
    found = availability(device)
    if request is None:
        why = _no_cuda_kernels(found) or found.missing_cuda_python
    else:
        why = "; ".join(f"{path}: {reason}" for path, reason in plan_refusals(request, found, PATHS[:-1]))
    warnings.warn(f"routing on {device} by plain PyTorch: {why}", RuntimeWarning, stacklevel=3)


def missing_cutlass_dsl() -> str | None:
    """Why CuTe DSL kernels cannot be compiled or loaded here, or None; imports nothing."""
    for module, package in (("cutlass", "nvidia-cutlass-dsl"), ("tvm_ffi", "apache-tvm-ffi")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    return None


@cache
def availability(device: torch.device) -> Availability:
    """What ``device`` and the installed packages offer; asked once for each device."""
    if device.type != "cuda":
        return Availability(str(device), missing_cutlass_dsl=missing_cutlass_dsl())
    from .backends import cublaslt, cuda_module

    capability, missing_device, gpu, num_multiprocessors = None, None, None, None
    missing_cuda_python = cuda_module.missing_requirement()
    if not torch.cuda.is_available():
        missing_device = "torch sees no CUDA GPU"
    elif device.index is not None and device.index >= torch.cuda.device_count():
        missing_device = f"torch sees {torch.cuda.device_count()} CUDA GPUs, not number {device.index}"
    else:
        capability, gpu = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        missing_cuda_python = missing_cuda_python or cuda_module.missing_architecture(capability)
    return Availability(
        str(device),
        compute_capability=capability,
        missing_device=missing_device,
        missing_cuda_python=missing_cuda_python,
        missing_cutlass_dsl=missing_cutlass_dsl(),
        missing_cublaslt=cublaslt.missing_library(),
        gpu=gpu,
        num_multiprocessors=num_multiprocessors,
        tuned=() if gpu is None else thresholds.stored(gpu),
    )


def explain(
    config: RouterConfig,
    num_tokens: int,
    device: torch.device | str,
    *,
    backend: str = "auto",
    batch_invariant: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Which path a dense call takes, and why; launches nothing.

    Args:
        config: the router's sizes.
        num_tokens: N, rows of the call.
        device: where the tensors would be; it need not exist on this machine.
        backend, batch_invariant: as in :func:`dsv4_router.dense_router_dispatch`.
        dtype: of hidden states and gate weight, bfloat16 or float32; their rows are taken to be aligned to 16 bytes.

    Returns:
        A :class:`Plan`, which prints itself.

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendUnavailableError: the path asked for cannot serve the call.
    """
    if not isinstance(config, RouterConfig):
        raise type_error("config", "a RouterConfig", config)
    check_integer("num_tokens", num_tokens, 0, None)
    check_backend(backend)
    check_flag("batch_invariant", batch_invariant)
    if dtype not in OPERANDS:
        raise type_error("dtype", "torch.bfloat16 or torch.float32", dtype)
    request = Request(config.hidden_size, config.num_experts, config.top_k, num_tokens, batch_invariant, dtype)
    return plan(request, availability(check_device(device)), backend)


def check_backend(backend: object) -> None:
    """Raises unless ``backend`` is one of :data:`BACKENDS`."""
    if not isinstance(backend, str):
        raise type_error("backend", f"one of {BACKENDS}", backend)
    if backend not in BACKENDS:
        raise value_error("backend", f"one of {BACKENDS}", backend)


def check_device(device: object) -> torch.device:
    """The device as torch's object, a CUDA device with its index; raises if the name is none."""
    if not isinstance(device, torch.device | str):
        raise type_error("device", "a torch.device or its name", device)
    try:
        device = torch.device(device)
    except RuntimeError:
        raise value_error("device", "a torch.device or its name", device) from None
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
