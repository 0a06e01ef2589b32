# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Inputs and comparisons for tests, benchmarks and ``dsv4-router verify``.

Expert ids may only be compared exactly where the selections differ by more than the summation order can move them.
So random inputs are drawn with a gap between neighbouring ranks, and a comparison accepts at each rank any expert whose
float64 selection lies within ``NEAR_TIE * max(1, |selection|)`` of the one that belongs there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import reference
from .config import RouterConfig

NEAR_TIE = 1e-5
WEIGHT_TOLERANCE = 5e-6  # relative, for exact logits
_GAP = 4 * NEAR_TIE  # between neighbouring ranks of random inputs
_ROWS_AT_ONCE = 8192


class DenseInputs(NamedTuple):
    """``hidden_states`` [N, H], ``gate_weight`` [E, H], ``correction_bias`` fp32 [E]."""

    hidden_states: torch.Tensor
    gate_weight: torch.Tensor
    correction_bias: torch.Tensor


class HashInputs(NamedTuple):
    """``hidden_states`` [N, H], ``gate_weight`` [E, H], ``token_ids`` [N], ``hash_lut`` [vocabulary, k]."""

    hidden_states: torch.Tensor
    gate_weight: torch.Tensor
    token_ids: torch.Tensor
    hash_lut: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """How far a path's outputs are from the float64 reference."""

    num_tokens: int
    wrong_ids: int
    weight_error: float
    weight_tolerance: float

    @property
    def ok(self) -> bool:
        return self.wrong_ids == 0 and self.weight_error <= self.weight_tolerance  # False if the error is NaN

    def __str__(self) -> str:
        return (
            f"{'ok' if self.ok else 'WRONG'}: {self.num_tokens} tokens, {self.wrong_ids} wrong ids, "
            f"weight error {self.weight_error:.1e} (at most {self.weight_tolerance:.1e})"
        )


def _generator(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def float64_logits(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
    """[N, E] in float64."""
    return reference.logits(hidden_states, gate_weight, dtype=torch.float64)


def smallest_gap(selection: torch.Tensor, top_k: int) -> torch.Tensor:
    """The least difference between neighbours among the k + 1 largest of each row: [N]."""
    count = min(top_k + 1, selection.shape[1])
    best = selection.topk(count, dim=-1).values
    if count == 1:
        return torch.full(selection.shape[:1], torch.inf, dtype=selection.dtype, device=selection.device)
    return (best[:, :-1] - best[:, 1:]).amin(dim=-1)


def make_dense_inputs(
    config: RouterConfig,
    num_tokens: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> DenseInputs:
    """Random inputs, of logits about N(0, 1), whose k + 1 best experts are no near ties in any row."""
    generator = _generator(seed, device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    gate_weight = (normal(config.num_experts, config.hidden_size) * config.hidden_size**-0.5).to(dtype)
    correction_bias = normal(config.num_experts) * 0.1
    hidden_states = torch.empty(num_tokens, config.hidden_size, dtype=dtype, device=device)
    filled = 0
    while filled < num_tokens:
        draw = normal(min(_ROWS_AT_ONCE, (num_tokens - filled) * 5 // 4 + 8), config.hidden_size).to(dtype)
        selection = reference.scores(float64_logits(draw, gate_weight)) + correction_bias.double()
        kept = draw[smallest_gap(selection, config.top_k) > _GAP][: num_tokens - filled]
        hidden_states[filled : filled + kept.shape[0]] = kept
        filled += kept.shape[0]
    return DenseInputs(hidden_states, gate_weight, correction_bias)


def make_hash_inputs(
    config: RouterConfig,
    num_tokens: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    token_dtype: torch.dtype = torch.int64,
    table_dtype: torch.dtype = torch.int64,
) -> HashInputs:
    """Random inputs; all token ids lie inside the vocabulary, and rows of the table may name an expert twice."""
    generator = _generator(seed, device)
    hidden_states = torch.randn(num_tokens, config.hidden_size, generator=generator, device=device)
    gate_weight = torch.randn(config.num_experts, config.hidden_size, generator=generator, device=device)
    table_shape = (config.vocab_size, config.top_k)
    hash_lut = torch.randint(config.num_experts, table_shape, generator=generator, device=device, dtype=table_dtype)
    token_ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator, device=device, dtype=token_dtype)
    gate_weight *= config.hidden_size**-0.5
    return HashInputs(hidden_states.to(dtype), gate_weight.to(dtype), token_ids, hash_lut)


def logit_tolerance(hidden_states: torch.Tensor, gate_weight: torch.Tensor) -> float:
    """The absolute error that fp32 accumulation may leave in a logit (the contract's bound)."""
    hidden_size = hidden_states.shape[1]
    rms = hidden_states.float().square().mean().sqrt() * gate_weight.float().square().mean().sqrt()
    return 4e-6 * float((hidden_size / 4096) ** 0.5 * rms * hidden_size**0.5)


def _weight_error(
    scores: torch.Tensor, out_ids: torch.Tensor, out_weights: torch.Tensor, routed_scaling_factor: float
) -> float:
    """The largest relative error of the weights, given float64 scores [N, E] and valid ids."""
    expected = reference.normalize(scores.gather(1, out_ids), routed_scaling_factor)
    error = (out_weights.double() - expected).abs()
    relative = torch.where(expected == 0, error, error / expected)
    return float(relative.max()) if relative.numel() else 0.0


def _worst(errors: list[float]) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).max())  # NaN if any is, unlike Python's max


def compare_selection(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    routed_scaling_factor: float,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    weight_tolerance: float = WEIGHT_TOLERANCE,
) -> Comparison:
    """Compares steps 2 to 6 with float64 on finite logits [N, E], of any dtype."""
    wrong, errors = 0, [0.0]
    for start in range(0, logits.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        scores = reference.scores(logits[rows].double())
        selection = scores if correction_bias is None else scores + correction_bias.double()
        ids = out_ids[rows].long()
        in_range = (ids >= 0) & (ids < logits.shape[1])
        ids = ids.clamp(0, logits.shape[1] - 1)
        belongs = selection.topk(top_k, dim=-1).values
        near = (selection.gather(1, ids) - belongs).abs() <= NEAR_TIE * belongs.abs().clamp(min=1)
        ordered = ids.sort(dim=-1).values
        distinct = (ordered[:, 1:] != ordered[:, :-1]).all(dim=-1, keepdim=True)
        wrong += int((~(in_range & near & distinct)).sum())
        errors.append(_weight_error(scores, ids, out_weights[rows], routed_scaling_factor))
    return Comparison(logits.shape[0], wrong, _worst(errors), weight_tolerance)


def compare_dense(
    inputs: DenseInputs, top_k: int, routed_scaling_factor: float, out_weights: torch.Tensor, out_ids: torch.Tensor
) -> Comparison:
    """Compares dense routing with float64.

    The tolerance of the weights adds to :data:`WEIGHT_TOLERANCE` what an error of the logits moves: a score's relative
    derivative is ``sigmoid / (2 softplus)``, at most 1/2, and a weight has two scores in it.
    """
    logits = torch.cat([float64_logits(rows, inputs.gate_weight) for rows in inputs.hidden_states.split(_ROWS_AT_ONCE)])
    tolerance = WEIGHT_TOLERANCE + logit_tolerance(inputs.hidden_states, inputs.gate_weight)
    return compare_selection(
        logits, inputs.correction_bias, top_k, routed_scaling_factor, out_weights, out_ids, tolerance
    )


def compare_hash(
    inputs: HashInputs, top_k: int, routed_scaling_factor: float, out_weights: torch.Tensor, out_ids: torch.Tensor
) -> Comparison:
    """Compares scored hash routing of valid token ids with float64; the ids must be the table's."""
    expected = inputs.hash_lut[inputs.token_ids.long()].long()
    wrong = int((out_ids.long() != expected).sum())
    tolerance = WEIGHT_TOLERANCE + logit_tolerance(inputs.hidden_states, inputs.gate_weight)
    errors = [0.0]
    for start in range(0, expected.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        scores = reference.scores(float64_logits(inputs.hidden_states[rows], inputs.gate_weight))
        errors.append(_weight_error(scores, expected[rows], out_weights[rows], routed_scaling_factor))
    return Comparison(expected.shape[0], wrong, _worst(errors), tolerance)
