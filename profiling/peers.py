# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Other routers that are installed, each as a product for the logits and a top-k; what is missing is named."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_router.backends import cublas

TOP_K = 6  # of every published model
_LL_MAX_TOKENS = 16  # up to which vLLM takes its own GEMM


@dataclass(frozen=True)
class Peer:
    """A router, as a product and a top-k.

    Attributes:
        name: of the package.
        logits: of hidden states [N, H] and a gate weight [E, H], fp32 [N, E]; None for cuBLAS's.
        topk: weights and ids [N, k] of logits, correction bias and routed scaling factor; None for this project's.
        version: of a package that is not installed as one, if it says so.
    """

    name: str
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    topk: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]] | None
    version: str | None = None

    @property
    def provider(self) -> str:
        """The name in results."""
        return self.name if self.topk is not None else f"{self.name} + activation_topk"

    def route(
        self, hidden_states: torch.Tensor, gate_weight: torch.Tensor, bias: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [N, k]."""
        product, topk = self.logits or cublas_logits, self.topk or own_topk
        return topk(product(hidden_states, gate_weight), bias, scaling)


def cublas_logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
    """cuBLAS through PyTorch, as most stacks multiply."""
    return torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32)


def own_topk(values: torch.Tensor, bias: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """This project's, into new tensors."""
    weights = torch.empty(values.shape[0], TOP_K, dtype=torch.float32, device=values.device)
    ids = torch.empty(values.shape[0], TOP_K, dtype=torch.int32, device=values.device)
    cublas.activation_topk(values, bias, TOP_K, scaling, weights, ids)
    return weights, ids


def _vllm() -> Peer:
    """vLLM's router: from the module ``vllm_router_peer``, which may hold it without all of vLLM, or installed."""
    try:
        module: Any = importlib.import_module("vllm_router_peer")
        logits, topk, version = module.logits, module.dsv4_topk, getattr(module, "__version__", "not stated")
    except ModuleNotFoundError as error:
        if error.name != "vllm_router_peer":
            raise
        layers, version = "vllm.model_executor", None
        gemm = importlib.import_module(f"{layers}.kernels.linear.cute_dsl.ll_bf16").ll_bf16_gemm
        topk = importlib.import_module(f"{layers}.layers.fused_moe.router.dsv4_topk").dsv4_topk

        def logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
            few = hidden_states.shape[0] <= _LL_MAX_TOKENS
            return gemm(hidden_states, gate_weight) if few else cublas_logits(hidden_states, gate_weight)

    return Peer("vllm", logits, lambda values, bias, scaling: topk(values, bias, torch.int32, scaling), version)


def _sglang() -> Peer:
    try:
        gate = importlib.import_module("sglang.kernels.ops.moe.moe_fused_gate").moe_fused_gate
    except ModuleNotFoundError as error:
        if error.name in (None, "sglang"):
            raise
        gate = importlib.import_module("sglang.jit_kernel.moe_fused_gate").moe_fused_gate  # in earlier versions

    def topk(values: torch.Tensor, bias: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = gate(
            values,
            bias,
            TOP_K,
            scoring_func="sqrtsoftplus",
            renormalize=True,
            routed_scaling_factor=scaling,
            apply_routed_scaling_factor_on_output=True,
        )
        return weights, ids

    return Peer("sglang", None, topk)


def _flashinfer() -> Peer:
    importlib.import_module("flashinfer")
    raise ImportError(
        "it is installed, but has no routing with sqrt(softplus), github.com/flashinfer-ai/flashinfer#3346"
    )


def _tile_kernels() -> Peer:
    gate = importlib.import_module("tile_kernels.moe").top2_sum_gate

    def topk(values: torch.Tensor, bias: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        # No groups, no shared experts, one rank of experts and of tensor parallelism.
        ids, weights = gate(values, bias, TOP_K, 0, 0, False, 0, scaling, 0, 1, 0, 1, "sqrtsoftplus")
        return weights, ids

    return Peer("tile_kernels", None, topk)


def _deep_gemm() -> Peer:
    """A product only."""
    gemm = importlib.import_module("deep_gemm").bf16_gemm_nt

    def logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
        sizes = hidden_states.shape[0], gate_weight.shape[0]
        out = torch.empty(sizes, dtype=torch.float32, device=hidden_states.device)
        gemm(hidden_states, gate_weight, out)
        return out

    return Peer("deep_gemm", logits, None)


# In the order of the providers: the first that is there is the baseline.
FINDERS: dict[str, Callable[[], Peer]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "flashinfer": _flashinfer,
    "tile_kernels": _tile_kernels,
    "deep_gemm": _deep_gemm,
}


def find_peers(say: Callable[[str], None]) -> list[Peer]:
    """The peers that can be imported; ``say`` hears of each that cannot, and why."""
    found = []
    for name, finder in FINDERS.items():
        try:
            found.append(finder())
        except Exception as error:  # of foreign packages, whose imports may raise anything
            say(f"missing provider: {name} ({type(error).__name__}: {' '.join(str(error).split())})")
    return found
