# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""``dsv4-router tune`` on a GPU: it takes times, stores them, and new processes follow them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from dsv4_router import thresholds, timing, tune
from dsv4_router.config import V4_1_FLASH_DRAFT
from dsv4_router.settings import CACHE_DIR_VARIABLE

pytestmark = pytest.mark.gpu


def test_graph_times_tell_long_calls_from_short_ones() -> None:
    short, long = (torch.randn(size, size, device="cuda") for size in (64, 4096))
    calls = {"short": [partial(torch.mm, short, short)] * 40, "long": [partial(torch.mm, long, long)] * 5}
    times = timing.graph_times(calls, replays=5)
    assert {name: len(taken) for name, taken in times.items()} == {"short": 5, "long": 5}
    assert 0 < statistics.median(times["short"]) < statistics.median(times["long"])
    several = timing.graph_times(calls, replays=5, captures=2)
    assert {name: len(taken) for name, taken in several.items()} == {"short": 6, "long": 6}
    assert max(several["short"]) < min(several["long"])
    assert timing.graph_medians(calls, replays=3)["long"] > 100


def test_cold_weights_do_not_fit_into_l2() -> None:
    weight = torch.randn(128, 5120, device="cuda").bfloat16()
    weights = timing.cold_weights(weight)
    assert len(weights) >= timing.CALLS
    assert sum(each.nbytes for each in weights) > torch.cuda.get_device_properties(0).L2_cache_size
    assert len({each.data_ptr() for each in weights}) == len(weights)


@pytest.mark.usefixtures("served_by_decode")
def test_tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    output = tmp_path / "results.jsonl"
    # So many replays that a median is free of the turns of other processes.
    effort = tune.Effort((1, 64, 128, 129, 300), step=32, replays=15, halvings=1)
    tune.tune({"v4.1-flash-draft": V4_1_FLASH_DRAFT}, device, effort, output)
    (entry,) = thresholds.stored(torch.cuda.get_device_name(device))
    assert (entry.hidden_size, entry.num_experts) == (5120, 128)
    assert 1 <= entry.max_tokens <= thresholds.MOST_TOKENS, "one token is a case for one launch"
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["max_tokens"] == entry.max_tokens
    assert record["driver"] != ""
    timings = [tune.Timing(*row) for row in record["times"]]
    assert {taken.num_tokens for taken in timings} >= set(effort.counts)
    assert all(0.5 < us < 1000 for taken in timings for us in (taken.decode, taken.cublas))
    assert "Stored for new processes" in capsys.readouterr().out
    code = "import dsv4_router; print(dsv4_router.explain(dsv4_router.V4_1_FLASH_DRAFT, 4096, 'cuda'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit = thresholds.Limit(entry.max_tokens, entry.source, entry.also)
    only = "" if limit.includes(4096) else " only"  # whichever path was found to be faster for this many
    assert f"faster {limit}{only} ({limit.source})" in done.stdout
    assert limit.source == f"from this machine's dsv4-router tune of {entry.date}"
