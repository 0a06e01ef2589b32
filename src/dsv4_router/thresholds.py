# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Crossovers as data, each with the measurement that it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crossover:
    """Up to ``max_tokens`` tokens ``value`` is taken; ``source`` says where it was measured."""

    max_tokens: int
    value: int
    source: str


_SOURCE = "NVIDIA H100 80GB HBM3, 2026-11-22, profiling/results/h100-splits.jsonl"
# In how many pieces the cublas path cuts the hidden size. Short sums in the tensor cores are what keeps the error of a
# logit small, and many pieces fill the GPU when tokens are few; when tokens are many, writing and adding them costs.
# 8 pieces: at most 0.91 of the contract's bound on logits, and faster than one piece up to 768 tokens (at 1024 between
# 7 % faster and 4 % slower). 2 pieces: up to 4.2 of the bound. One piece, above the last entry: up to 9.6.
GEMM_SPLITS = (
    Crossover(1024, 8, _SOURCE),
    Crossover(4096, 2, _SOURCE),
)
# Up to how many tokens the decode path is taken: value 1 says that it is the faster one. At 96 tokens the two paths are
# within 10 % of each other, which one ahead depending on the model and on whether the weight is in L2.
DECODE = Crossover(64, 1, "NVIDIA H100 80GB HBM3, 2026-11-23, profiling/results/h100.jsonl")
