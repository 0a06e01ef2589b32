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

from .config import RouterConfig, check_integer
from .errors import BackendUnavailableError, type_error, value_error

PATHS = ("decode", "cublas", "reference")
BACKENDS = ("auto", *PATHS)
MIN_COMPUTE_CAPABILITY = (8, 0)


class Request(NamedTuple):
    """What the choice of a path depends on in a call; sizes are those of valid arguments."""

    hidden_size: int
    num_experts: int
    top_k: int
    num_tokens: int
    batch_invariant: bool = False


@dataclass(frozen=True)
class Availability:
    """What a device and the installed packages offer.

    Attributes:
        device: as torch names it, such as ``"cuda:0"`` or ``"cpu"``.
        compute_capability: of a CUDA device, else None.
        missing_device: why the device cannot be used, or None.
        missing_cuda_python: why the CUDA C++ kernels cannot be compiled, or None.
        missing_cutlass_dsl: why CuTe DSL kernels cannot be compiled, or None.
    """

    device: str
    compute_capability: tuple[int, int] | None = None
    missing_device: str | None = None
    missing_cuda_python: str | None = None
    missing_cutlass_dsl: str | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")


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
    missing = "the one-launch kernel is not part of this version"
    return f"{missing}; {availability.missing_cutlass_dsl}" if availability.missing_cutlass_dsl else missing


def _refuse_cublas(request: Request, availability: Availability) -> str | None:
    if (why := _no_cuda_kernels(availability)) is not None:
        return why
    if request.batch_invariant:
        return "cuBLAS chooses its order of summation by the number of tokens: not batch-invariant"
    return availability.missing_cuda_python


def _refuse_reference(request: Request, availability: Availability) -> str | None:
    if request.batch_invariant and availability.is_cuda:
        return "batch_invariant=True on a GPU needs the one-launch kernel, which is not part of this version"
    return None


_RULES = {"decode": _refuse_decode, "cublas": _refuse_cublas, "reference": _refuse_reference}
_REASONS = {
    "decode": "one launch from hidden states to experts",
    "cublas": "cuBLAS for the logits, then one launch of the CUDA top-k",
    "reference": "plain PyTorch",
}


def choose(request: Request, availability: Availability, backend: str = "auto") -> str:
    """The path of a dense call, one of :data:`PATHS`.

    Raises:
        BackendUnavailableError: the backend that was asked for, or with ``"auto"`` every one, refuses the request.
    """
    for path in PATHS if backend == "auto" else (backend,):
        if _RULES[path](request, availability) is None:
            return path
    reasons = plan_refusals(request, availability, PATHS if backend == "auto" else (backend,))
    detail = "; ".join(f"{path}: {why}" for path, why in reasons)
    raise BackendUnavailableError(f"backend={backend!r} cannot serve this call ({detail})")


def plan_refusals(request: Request, availability: Availability, paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The paths among ``paths`` that cannot serve the request, each with its reason."""
    answers = ((path, _RULES[path](request, availability)) for path in paths)
    return tuple((path, why) for path, why in answers if why is not None)


def plan(request: Request, availability: Availability, backend: str = "auto") -> Plan:
    """What :func:`choose` chooses, with the reasons. Raises as it does."""
    path = choose(request, availability, backend)
    reason = _REASONS[path] + ("" if backend == "auto" else f" (asked for by backend={backend!r})")
    before = PATHS[: PATHS.index(path)] if backend == "auto" else ()
    return Plan(path, reason, plan_refusals(request, availability, before), request, availability)


@lru_cache(maxsize=4096)
def path_of_call(
    device: torch.device,
    backend: str,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    batch_invariant: bool,
) -> str:
    """:func:`choose` for a call on ``device``, remembered. Raises as it does."""
    request = Request(hidden_size, num_experts, top_k, num_tokens, batch_invariant)
    return choose(request, availability(device), backend)


def hash_path(availability: Availability) -> str:
    """``"cuda"`` where the CUDA kernels of hash routing can run, else ``"reference"``."""
    return "reference" if _no_cuda_kernels(availability) or availability.missing_cuda_python else "cuda"


@cache
def hash_path_of_call(device: torch.device) -> str:
    """:func:`hash_path` for a call on ``device``, remembered."""
    return hash_path(availability(device))


def warn_of_reference(device: torch.device, backend: str) -> None:
    """Says once that a call on a GPU takes plain PyTorch though nobody asked for it."""
    if device.type == "cuda" and backend == "auto":
        found = availability(device)
        why = _no_cuda_kernels(found) or found.missing_cuda_python
        warnings.warn(f"routing on {device} by plain PyTorch: {why}", RuntimeWarning, stacklevel=3)


def missing_cutlass_dsl() -> str | None:
    """Why CuTe DSL kernels cannot be compiled here, or None; imports nothing."""
    if importlib.util.find_spec("cutlass") is None:
        return "CUTLASS DSL is not installed (pip install nvidia-cutlass-dsl)"
    return None


@cache
def availability(device: torch.device) -> Availability:
    """What ``device`` and the installed packages offer; asked once for each device."""
    if device.type != "cuda":
        return Availability(str(device), missing_cutlass_dsl=missing_cutlass_dsl())
    from .backends import cuda_module

    capability, missing_device = None, None
    missing_cuda_python = cuda_module.missing_requirement()
    if not torch.cuda.is_available():
        missing_device = "torch sees no CUDA GPU"
    elif device.index is not None and device.index >= torch.cuda.device_count():
        missing_device = f"torch sees {torch.cuda.device_count()} CUDA GPUs, not number {device.index}"
    else:
        capability = torch.cuda.get_device_capability(device)
        missing_cuda_python = missing_cuda_python or cuda_module.missing_architecture(capability)
    return Availability(
        str(device),
        compute_capability=capability,
        missing_device=missing_device,
        missing_cuda_python=missing_cuda_python,
        missing_cutlass_dsl=missing_cutlass_dsl(),
    )


def explain(
    config: RouterConfig,
    num_tokens: int,
    device: torch.device | str,
    *,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Plan:
    """Which path a dense call takes, and why; launches nothing.

    Args:
        config: the router's sizes.
        num_tokens: N, rows of the call.
        device: where the tensors would be; it need not exist on this machine.
        backend, batch_invariant: as in :func:`dsv4_router.dense_router_dispatch`.

    Returns:
        A :class:`Plan`, which prints itself.

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendUnavailableError: no path, or not the one asked for, can serve the call.
    """
    if not isinstance(config, RouterConfig):
        raise type_error("config", "a RouterConfig", config)
    check_integer("num_tokens", num_tokens, 0, None)
    check_backend(backend)
    if type(batch_invariant) is not bool:
        raise type_error("batch_invariant", "a bool", batch_invariant)
    request = Request(config.hidden_size, config.num_experts, config.top_k, num_tokens, batch_invariant)
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
