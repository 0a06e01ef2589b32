# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Measures paths with the hidden size in more or fewer pieces: time, and the largest error of a logit.

    python profiling/splits.py --out profiling/results/h100-splits.jsonl
    python profiling/splits.py --many-rows --out profiling/results/h100-many-rows.jsonl

The first is the ``cublas`` path with 1 to 16 pieces. The second is the ``decode`` path for more rows than one launch
takes, by each of its kernels, with the pairs of slices of K apart, in quarters, in halves, and in one part.
``src/dsv4_router/thresholds.py`` and ``logits_config.py`` hold what follows from them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import torch

import dsv4_router
from dsv4_router.backends import cublas, decode
from dsv4_router.config import RouterConfig
from dsv4_router.logits_config import LogitsConfig, Schedule, fastest, logits_configs
from dsv4_router.testing import float64_logits, logit_tolerance, make_dense_inputs

from .cases import SHAPES
from .providers import outputs
from .timing import CALLS, cold_weights, graph_samples, raise_clocks

TOKENS = (1, 4, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
SPLITS = (1, 2, 4, 8, 16)
MANY_ROWS = (129, 256, 512, 640, 768, 896, 1024, 1536, 2048, 4096, 8192, 16384)
_PARTS = ("pairs", "quarters", "halves", "whole")


class Way(NamedTuple):
    """One of the kernels for many rows, small tiles of experts first, and in which parts it has K: see :func:`ways`.

    The last ``rows_left`` rows are left to the decode kernel.
    """

    kernel: int
    parts: str
    rows_left: int = 0

    def choose(
        self, configs: tuple[LogitsConfig, ...], num_tokens: int, num_multiprocessors: int, max_rows_left: int
    ) -> Schedule:
        """In the place of :func:`logits_config.fastest`: rows this way, whatever their number."""
        config = configs[self.kernel]
        return Schedule(config, config.parts[_PARTS.index(self.parts)], num_tokens - self.rows_left)


def ways(kernels: Iterable[int]) -> list[Way]:
    """Every one of these kernels, with K in every number of parts."""
    return list(starmap(Way, product(kernels, _PARTS)))


def measure(config: RouterConfig, num_tokens: int, pieces: int | Way) -> dict[str, Any]:
    """One line of results, without what all lines share: of so many pieces, or of a way to route many rows."""
    backend = "decode" if isinstance(pieces, Way) else "cublas"
    inputs = make_dense_inputs(config, num_tokens, seed=num_tokens, device="cuda")
    weights, mine = cold_weights(inputs.gate_weight), outputs(num_tokens, config.top_k)
    logits = torch.full((num_tokens, config.num_experts), torch.nan, device="cuda")

    def route(i: int, **options: Any) -> None:
        dsv4_router.dense_router_dispatch(
            inputs.hidden_states, weights[i], inputs.correction_bias, config.top_k, 1.5, *mine, **options
        )

    # What is remembered of a shape holds for one number of splits.
    with (
        mock.patch.object(cublas, "num_splits", return_value=pieces),
        mock.patch.dict(cublas.remembered, clear=True),
        mock.patch.object(decode, "fastest", pieces.choose if isinstance(pieces, Way) else fastest),
    ):
        route(0, logits_out=logits, backend=backend)
        times = {
            "warm": [partial(route, 0, backend=backend)] * CALLS,
            "cold": [partial(route, i, backend=backend) for i in range(len(weights))],
        }
        samples = graph_samples(times, num_tokens)
    error = float((logits - float64_logits(inputs.hidden_states, inputs.gate_weight)).abs().max())
    bound = logit_tolerance(inputs.hidden_states, inputs.gate_weight)
    what: dict[str, Any] = {"splits": pieces}
    if isinstance(pieces, Way):
        kernels = logits_configs(config.hidden_size, config.num_experts, "sm_90a")
        what = {"expert_tile": kernels[pieces.kernel].expert_tile, "parts": pieces.parts}
    return {
        "num_tokens": num_tokens,
        **what,
        "us_warm": round(samples["warm"].us, 3),
        "us_cold": round(samples["cold"].us, 3),
        "logit_error": error,
        "logit_error_over_bound": round(error / bound, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON lines go")
    parser.add_argument("--many-rows", action="store_true", help="the decode path's parts for many rows")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("splits: needs a CUDA GPU; torch sees none")
    bench = "many_rows" if options.many_rows else "splits"
    common = {"bench": bench, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    common["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    raise_clocks()
    with options.out.open("w") as file:
        for shape, config in SHAPES.items():
            kernels = range(len(logits_configs(config.hidden_size, config.num_experts, "sm_90a")))
            cases: Iterable[tuple[int, int | Way]] = product(TOKENS, SPLITS)
            for num_tokens, pieces in product(MANY_ROWS, ways(kernels)) if options.many_rows else cases:
                line = common | {"shape": shape} | measure(config, num_tokens, pieces)
                file.write(json.dumps(line) + "\n")
                print(
                    shape,
                    num_tokens,
                    *(pieces[:2] if isinstance(pieces, Way) else [pieces]),
                    line["us_warm"],
                    line["logit_error_over_bound"],
                )


if __name__ == "__main__":
    main()
