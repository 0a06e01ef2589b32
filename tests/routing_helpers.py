# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What tests share: inputs, calls and plain float64 loops of the reference's tests, and the cases of the GPU's."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_router import dense_router_dispatch, hash_router_dispatch
from dsv4_router.backends import cuda_module
from dsv4_router.config import PRESETS, RouterConfig
from dsv4_router.testing import DenseInputs

POISON_WEIGHT, POISON_ID = 9e9, -7
SCALING = 1.5
Outputs = tuple[torch.Tensor, torch.Tensor]


# What the GPU tests of the cublas path and of hash routing go through.
CONFIGS = {f"{name}-E{c.num_experts}": c for name, c in PRESETS.items()} | {
    f"E{experts}": RouterConfig(2048, experts, 1, 1.5) for experts in (132, 144, 255, 512)
}
TOP_KS = (1, 3, 4, 6, 8, 16)
TOKENS = (0, 1, 2, 3, 7, 16, 33, 128, 1000, 65536)


PADDING = ("mask", "int", "device", "device scalar", "both", "below", "above")


def padding_options(num_tokens: int, how: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Options that make padding rows, and which rows remain."""
    rows = torch.arange(num_tokens, device="cuda")
    mask, limit = rows % 3 != 1, num_tokens * 2 // 3
    count = torch.tensor([limit], dtype=torch.int32, device="cuda")
    return {
        "mask": ({"token_mask": mask}, mask),
        "int": ({"num_valid_tokens": limit}, rows < limit),
        "device": ({"num_valid_tokens": count}, rows < limit),
        "device scalar": ({"num_valid_tokens": count[0]}, rows < limit),
        "both": ({"token_mask": mask, "num_valid_tokens": count}, mask & (rows < limit)),
        "below": ({"num_valid_tokens": count - 10 * num_tokens}, rows < 0),
        "above": ({"num_valid_tokens": count + 10 * num_tokens}, rows >= 0),
    }[how]


def poisoned(num_tokens: int, top_k: int, ids_dtype: torch.dtype = torch.int32, device: str = "cpu") -> Outputs:
    weights = torch.full((num_tokens, top_k), POISON_WEIGHT, device=device)
    return weights, torch.full((num_tokens, top_k), POISON_ID, dtype=ids_dtype, device=device)


def poisoned_on_gpu(num_tokens: int, top_k: int = 6, ids_dtype: torch.dtype = torch.int32) -> Outputs:
    return poisoned(num_tokens, top_k, ids_dtype, "cuda")


class Result(NamedTuple):
    """Everything that a dense call can write."""

    weights: torch.Tensor
    ids: torch.Tensor
    logits: torch.Tensor

    def rows(self, rows: Any) -> Result:
        return Result(self.weights[rows], self.ids[rows], self.logits[rows])

    def poison(self) -> None:
        self.weights.fill_(POISON_WEIGHT)
        self.ids.fill_(POISON_ID)
        self.logits.fill_(POISON_WEIGHT)


def poisoned_result(num_tokens: int, config: RouterConfig, ids_dtype: torch.dtype = torch.int32) -> Result:
    outputs = poisoned_on_gpu(num_tokens, config.top_k, ids_dtype)
    return Result(*outputs, torch.full((num_tokens, config.num_experts), POISON_WEIGHT, device="cuda"))


def route_on_gpu(inputs: DenseInputs, config: RouterConfig, result: Result | None = None, **options: Any) -> Result:
    """A call on the decode path, unless the options say otherwise; into poisoned outputs, unless some are given."""
    result = poisoned_result(inputs.hidden_states.shape[0], config) if result is None else result
    options = {"backend": "decode", "logits_out": result.logits} | options
    returned = dense_router_dispatch(*inputs, config.top_k, config.routed_scaling_factor, *result[:2], **options)
    assert returned[0] is result.weights
    assert returned[1] is result.ids
    return result


def differing(a: Result, b: Result) -> torch.Tensor:
    """How many outputs differ in their bits, on the device."""
    weights = (a.weights.view(torch.int32) != b.weights.view(torch.int32)).sum()
    logits = (a.logits.view(torch.int32) != b.logits.view(torch.int32)).sum()
    return weights + logits + (a.ids != b.ids).sum()


def assert_same(a: Result, b: Result) -> None:
    assert int(differing(a, b)) == 0


def compiled_for_test(source: str, entry: str) -> Any:
    """A kernel of CUDA C++ that no user calls, loaded as the package loads its own."""
    from cuda.core import Device, ObjectCode, Program, ProgramOptions

    Device(torch.cuda.current_device()).set_current()
    target = cuda_module.architecture(torch.cuda.get_device_capability())
    options = ProgramOptions(arch=target, std="c++17", include_path=str(cuda_module.kernel_folder()))
    code = Program(source, "c++", options).compile("cubin").code
    return ObjectCode.from_cubin(bytes(code)).get_kernel(entry)


@cache
def of_file(entry: str) -> Any:
    """The kernel of a file of its name beside the GPU tests."""
    return compiled_for_test((Path(__file__).parent / "gpu" / f"{entry}.cu").read_text(), entry)


def write_late(target: torch.Tensor, source: torch.Tensor, nanoseconds: int = 20000) -> None:
    """What ``late_writer.cu`` does, on the current stream, as a dependent launch."""
    size = target.numel() * target.element_size()
    addresses = target.data_ptr(), source.data_ptr()
    cuda_module.launch(of_file("late_writer"), target.get_device(), 1, 256, True, *addresses, size, nanoseconds)


def route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    scaling: float = SCALING,
    ids_dtype: torch.dtype = torch.int32,
    **options: Any,
) -> Outputs:
    """The dense entry point into poisoned outputs."""
    weights, ids = poisoned(hidden_states.shape[0], top_k, ids_dtype)
    returned = dense_router_dispatch(
        hidden_states, gate_weight, correction_bias, top_k, scaling, weights, ids, **options
    )
    assert returned[0] is weights
    assert returned[1] is ids
    return weights, ids


def hashed(
    token_ids: torch.Tensor, hash_lut: torch.Tensor, top_k: int, ids_dtype: torch.dtype = torch.int32, **options: Any
) -> Outputs:
    """The hash entry point into poisoned outputs."""
    weights, ids = poisoned(token_ids.shape[0], top_k, ids_dtype)
    returned = hash_router_dispatch(token_ids, hash_lut, top_k, weights, ids, **options)
    assert returned[0] is weights
    assert returned[1] is ids
    return weights, ids


def of_logits(logits: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 hidden states (one-hot) and gate weight whose products are exactly these finite logits."""
    rows = torch.tensor(logits, dtype=torch.float32)
    return torch.eye(rows.shape[0]), rows.T.contiguous()


class Inputs(NamedTuple):
    hidden_states: torch.Tensor
    gate_weight: torch.Tensor
    correction_bias: torch.Tensor


def separated(
    generator: torch.Generator, num_tokens: int, num_experts: int, hidden_size: int, top_k: int, dtype: torch.dtype
) -> Inputs:
    """Random inputs of logits about N(0, 1) whose best k + 1 selections differ by more than 1e-4 in every row."""
    gate = (torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5).to(dtype)
    bias = torch.randn(num_experts, generator=generator) * 0.2
    kept: list[torch.Tensor] = []
    while len(kept) < num_tokens:
        row = torch.randn(hidden_size, generator=generator).to(dtype)
        logits = gate.double() @ row.double()
        selection = torch.nn.functional.softplus(logits).sqrt() + bias.double()
        best = selection.topk(min(top_k + 1, num_experts)).values
        if bool(((best[:-1] - best[1:]) > 1e-4).all()):
            kept.append(row)
    return Inputs(torch.stack(kept), gate, bias)


def score_of(logit: float) -> float:
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


def weights_of(scores: list[float], scaling: float) -> list[float]:
    total = math.fsum(scores) + 1e-20
    return [score / total * scaling for score in scores]


def brute_force(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    scaling: float = SCALING,
) -> Outputs:
    """The six steps as loops over float64 numbers."""
    gate = gate_weight.double().tolist()
    bias = [0.0] * len(gate) if correction_bias is None else correction_bias.double().tolist()
    all_weights, all_ids = [], []
    for token in hidden_states.double().tolist():
        scores = [score_of(math.fsum(a * b for a, b in zip(token, row, strict=True))) for row in gate]
        ranked = sorted(range(len(gate)), key=lambda expert: (-(scores[expert] + bias[expert]), expert))[:top_k]
        all_ids.append(ranked)
        all_weights.append(weights_of([scores[expert] for expert in ranked], scaling))
    return torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_ids)


def assert_weights(got: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=0.0)


def assert_bits(got: Outputs, expected: Outputs) -> None:
    assert torch.equal(got[0].view(torch.int32), expected[0].view(torch.int32))
    assert torch.equal(got[1], expected[1])


SHAPES = [(16, 64, 1), (24, 96, 6), (33, 72, 4), (64, 256, 16), (5, 64, 5)]  # E, H, k


class PrecisionOfProducts(TorchDispatchMode):
    """Notes the precision setting in force at each matrix product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(("aten.mm", "aten.mv", "aten.addmm", "aten.addmv", "aten.bmm", "aten.matmul")):
            self.seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


def padding_of_8_rows(count: str, masked: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """The options that make padding rows, and the rows of 8 that remain; a count leaves the first 6."""
    mask = torch.tensor([True, False, True, True, False, True, True, False])
    num_valid: int | torch.Tensor | None = {
        "none": None,
        "int": 6,
        "tensor": torch.tensor(6, dtype=torch.int32),
        "tensor-1d": torch.tensor([6], dtype=torch.int32),
    }[count]
    valid = torch.ones(8, dtype=torch.bool)
    if masked:
        valid &= mask
    if num_valid is not None:
        valid[6:] = False
    return {"token_mask": mask if masked else None, "num_valid_tokens": num_valid}, valid
