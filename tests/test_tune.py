# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Thresholds of the decode path: which entry decides, choosing one from times, and what ``dsv4-router tune`` stores."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Run, assert_one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router import __version__, decode_config, dispatch, explain, thresholds, timing, tune
from dsv4_router.backends import decode
from dsv4_router.config import PRESETS, V4_PRO
from dsv4_router.settings import CACHE_DIR_VARIABLE
from dsv4_router.thresholds import DECODE, DecodeThreshold, decode_limit
from dsv4_router.tune import (
    CACHES,
    Effort,
    Timing,
    best_threshold,
    counts_around_crossing,
    counts_at_edges,
    counts_in_doubt,
    means,
    ranges_beyond,
    worst,
)

ROOT = Path(__file__).resolve().parent.parent
H100, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)
OWN = DecodeThreshold(H100, CAPABILITY, 7168, 384, 40, "2026-11-24")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(folder))
    return folder


def record_of(entry: DecodeThreshold, **changes: Any) -> dict[str, Any]:
    lists = {"compute_capability": list(entry.compute_capability), "also": [list(each) for each in entry.also]}
    record = dataclasses.asdict(entry) | lists | {"versions": {"dsv4-router": __version__}} | changes
    del record["results"]
    return record


# Which entry decides.


@pytest.mark.parametrize("entry", DECODE, ids=lambda entry: f"{entry.gpu}-H{entry.hidden_size}-E{entry.num_experts}")
def test_a_measured_shape_takes_its_own_entry(entry: DecodeThreshold) -> None:
    limit = decode_limit(entry.gpu, entry.compute_capability, (), *entry.shape)
    assert limit == (entry.max_tokens, f"measured on {entry.gpu}, {entry.date}, {entry.results}", entry.also, True)


def test_every_shape_of_a_gpu_has_one_entry() -> None:
    assert len({(entry.gpu, entry.shape) for entry in DECODE}) == len(DECODE)


@pytest.mark.parametrize(
    ("sizes", "nearest"), [((1024, 32), (5120, 128)), ((4096, 288), (4096, 256)), ((8192, 512), (7168, 384))]
)
def test_another_shape_takes_the_entry_of_the_nearest(sizes: tuple[int, int], nearest: tuple[int, int]) -> None:
    limit = decode_limit(H100, CAPABILITY, (), *sizes)
    expected = decode_limit(H100, CAPABILITY, (), *nearest)
    assert limit.max_tokens == expected.max_tokens
    assert limit.source == f"{expected.source}, for the nearest shape: H={nearest[0]} E={nearest[1]}"


@given(st.integers(1, 1 << 14), st.integers(1, 1024))
def test_no_entry_is_nearer_than_the_one_taken(hidden_size: int, num_experts: int) -> None:
    entries = tuple(dataclasses.replace(OWN, num_experts=experts, max_tokens=experts) for experts in (16, 128, 384))
    taken = decode_limit("a GPU", CAPABILITY, entries, hidden_size, num_experts).max_tokens

    def ratio(experts: int) -> float:
        a, b = 7168 * experts, hidden_size * num_experts
        return max(a, b) / min(a, b)

    if hidden_size != 7168:
        assert ratio(taken) <= min(ratio(entry.num_experts) for entry in entries) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("gpu", "capability"), [("NVIDIA B200", (10, 0)), ("NVIDIA GH200", (9, 0)), (None, None), ("NVIDIA A100", (8, 0))]
)
def test_another_gpu_takes_the_nearest_that_was_measured(gpu: str | None, capability: tuple[int, int] | None) -> None:
    limit, h100 = decode_limit(gpu, capability, (), 7168, 384), decode_limit(H100, CAPABILITY, (), 7168, 384)
    assert limit == (h100.max_tokens, h100.source + ", the nearest GPU that was measured", (), True)
    assert decode_limit(gpu, capability, (), 4096, 256).also == ()


def test_the_nearest_gpu_is_that_of_the_nearest_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        DecodeThreshold(gpu, capability, 7168, 384, limit, "2026-11-24", "a file")
        for gpu, capability, limit in (("A", (9, 0), 1), ("B", (10, 0), 2), ("C", (10, 0), 3), ("D", (12, 0), 4))
    ]
    monkeypatch.setattr(thresholds, "DECODE", tuple(entries))
    for capability, limit in (((8, 0), 1), ((9, 0), 1), ((10, 0), 2), ((10, 3), 2), ((12, 1), 4), (None, 1)):
        assert decode_limit("another", capability, (), 7168, 384).max_tokens == limit
    assert decode_limit("C", (10, 0), (), 7168, 384).max_tokens == 3


def test_the_machines_own_entries_come_first() -> None:
    source = "from this machine's dsv4-router tune of 2026-11-24"
    assert decode_limit(H100, CAPABILITY, (OWN,), 7168, 384) == (40, source, (), True)
    flash = decode_limit(H100, CAPABILITY, (), 4096, 256)
    assert decode_limit(H100, CAPABILITY, (OWN,), 4096, 256) == flash, "committed, but for this very shape"
    near = decode_limit(H100, CAPABILITY, (OWN,), 7168, 380)
    assert near == (40, f"{source}, for the nearest shape: H=7168 E=384", (), False)
    other = decode_limit("NVIDIA B200", (10, 0), (dataclasses.replace(OWN, gpu="NVIDIA B200"),), 4096, 256)
    assert other == (40, f"{source}, for the nearest shape: H=7168 E=384", (), False), "rather this GPU than this shape"


# The committed entries are those of their results.


def timings_in_results(entry: DecodeThreshold) -> list[Timing]:
    assert entry.results is not None
    lines = [json.loads(line) for line in (ROOT / entry.results).read_text().splitlines()]
    for line in lines:
        if (line["hidden_size"], line["num_experts"]) == entry.shape:
            assert (line["gpu"], line["date"]) == (entry.gpu, entry.date)
            return [Timing(*row) for row in line["times"]]
    raise AssertionError(f"{entry.results} has no line of {entry.shape}")


@pytest.mark.parametrize("entry", DECODE, ids=lambda entry: f"{entry.gpu}-H{entry.hidden_size}-E{entry.num_experts}")
def test_committed_entries_follow_from_their_results(entry: DecodeThreshold) -> None:
    timings = timings_in_results(entry)
    assert len(timings) >= 20
    request, found = dispatch.Request(*entry.shape, 6, 1), dispatch.Availability("cuda", entry.compute_capability)
    most = dispatch.most_tokens(request, found)
    assert entry.max_tokens == best_threshold(timings, most)
    assert entry.also == ranges_beyond(timings, entry.max_tokens, most)
    for taken in timings:
        regret = taken.regret(entry.max_tokens, entry.also)
        if regret > tune.WORTH:  # then the other choice costs as much, or more, with the other caches
            same_count = [other for other in timings if other.num_tokens == taken.num_tokens]
            assert taken.num_tokens <= most
            assert all(max(other.regret(limit) for other in same_count) >= regret for limit in (0, most))


# Choosing from times.

_us = st.floats(1, 100, allow_nan=False)
_timings = st.lists(st.builds(Timing, st.integers(1, 300), st.sampled_from(CACHES), _us, _us), min_size=1)


@settings(deadline=None)  # an example may have to wait for other processes
@given(_timings, st.integers(0, 300))
def test_no_threshold_has_a_smaller_worst_regret(timings: list[Timing], most: int) -> None:
    chosen = best_threshold(timings, most)
    assert 0 <= chosen <= most

    def cost(max_tokens: int) -> float:
        also = ranges_beyond(timings, max_tokens, most)
        takes_decode = {n for n in range(301) if n <= max_tokens or any(first <= n <= last for first, last in also)}
        return max(
            (t.decode if t.num_tokens in takes_decode else t.cublas) / min(t.decode, t.cublas) - 1 for t in timings
        )

    assert max(cost(chosen), tune.WORTH) == max(min(cost(limit) for limit in range(most + 1)), tune.WORTH)
    also = ranges_beyond(timings, chosen, most)
    assert cost(chosen) == worst(timings, chosen, also).regret(chosen, also)


def test_a_threshold_beyond_which_ranges_do_better() -> None:
    """Up to 128 tokens decode is faster, then slower by 5 %, and at 240 to 256 faster again: two choices are right."""
    decode = {64: 4.0, 128: 4.0, 129: 5.25, 200: 5.25, 240: 4.0, 256: 4.0, 300: 8.0}
    timings = [Timing(count, cache, us, 5.0) for count, us in decode.items() for cache in CACHES]
    chosen = best_threshold(timings, 1024)
    assert (chosen, ranges_beyond(timings, chosen, 1024)) == (128, ((240, 256),))


def test_no_range_for_what_costs_little() -> None:
    """From 129 to 200 decode is slower by 2 %: a threshold of 256 says as much as one of 128 and a range."""
    decode = {64: 4.0, 128: 4.0, 129: 5.1, 200: 5.1, 240: 4.0, 256: 4.0, 300: 8.0}
    timings = [Timing(count, cache, us, 5.0) for count, us in decode.items() for cache in CACHES]
    chosen = best_threshold(timings, 1024)
    assert (chosen, ranges_beyond(timings, chosen, 1024)) == (256, ())


def test_counts_at_which_either_choice_costs_much_are_in_doubt() -> None:
    """By one cache state or the other; what the better choice costs elsewhere is below 3 %."""
    ratios = {
        64: (1.5, 1.5),
        128: (1.05, 1.02),
        129: (0.95, 1.05),
        130: (0.98, 1.05),
        300: (1.04, 0.95),
        400: (0.5, 0.5),
    }
    timings = [
        Timing(count, cache, 10.0, 10.0 * ratio)
        for count, both in ratios.items()
        for cache, ratio in zip(CACHES, both, strict=True)
    ]
    assert counts_in_doubt(timings, 1024) == [129, 300]
    assert counts_in_doubt([taken for taken in timings if taken.num_tokens not in (129, 300)], 1024) == []


def test_means_of_what_was_timed_again() -> None:
    timings = [Timing(129, "cold", 3.0, 4.0), Timing(1, "warm", 1.0, 2.0), Timing(129, "warm", 1.0, 2.0)]
    again = [Timing(129, "cold", 4.0, 6.0), Timing(129, "warm", 2.0, 2.0), Timing(129, "warm", 2.0, 5.0)]
    assert means(timings) == [timings[1], timings[2], timings[0]]
    assert means(timings + again) == [timings[1], Timing(129, "warm", 1.667, 3.0), Timing(129, "cold", 3.5, 5.0)]


@settings(max_examples=30, deadline=None)  # 200 thresholds for each of 200 counts
@given(st.integers(1, 200), st.integers(1, 3))
def test_one_crossing_is_found_exactly(crossing: int, caches: int) -> None:
    counts = range(1, 201)
    timings = [Timing(n, CACHES[c % 2], 4 + n / 64, 4 + crossing / 64 + c / 999) for n in counts for c in range(caches)]
    chosen = best_threshold(timings, 200)
    assert worst(timings, chosen).regret(chosen) <= 1e-3
    assert abs(chosen - crossing) <= 1


@pytest.mark.parametrize(
    ("decode_us", "cublas_us", "chosen"),
    [(1.0, 2.0, 128), (2.0, 1.0, 0), (1.0, 1.0, 0)],
    ids=["always", "never", "all the same"],
)
def test_extremes(decode_us: float, cublas_us: float, chosen: int) -> None:
    timings = [Timing(n, "warm", decode_us, cublas_us) for n in (1, 64, 128, 129)]
    assert best_threshold(timings, 128) == chosen


def test_ranges_beyond_the_threshold() -> None:
    """Where cublas would cost more than 3 % with warm or cold caches, and the decode path less."""
    ratios = {  # of cublas to decode, warm and cold
        100: (1.5, 1.5), 129: (1.05, 1.0), 130: (1.0, 1.04), 131: (1.02, 1.0), 132: (1.1, 1.1), 140: (0.9, 1.05),
        150: (0.99, 1.05), 160: (1.031, 1.0), 1025: (2.0, 2.0),
    }  # fmt: skip
    timings = [
        Timing(count, cache, 10.0, 10.0 * ratio)
        for count, both in reversed(ratios.items())
        for cache, ratio in zip(CACHES, both, strict=True)
    ]
    assert ranges_beyond(timings, 128, 1024) == ((129, 130), (132, 132), (150, 160))
    assert ranges_beyond(timings, 1024, 1024) == ranges_beyond([], 128, 1024) == ()
    assert timings[-1].regret(128, ((129, 130),)) == 0
    assert worst(timings, 128, ((129, 160),)).regret(128, ((129, 160),)) > 0.1


@given(_timings, st.integers(0, 300))
def test_ranges_make_no_choice_worse_than_both(timings: list[Timing], max_tokens: int) -> None:
    also = ranges_beyond(timings, max_tokens, 250)
    assert all(max_tokens < first <= last <= 250 for first, last in also)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(also))
    for count in {taken.num_tokens for taken in timings}:
        of_count = [taken for taken in timings if taken.num_tokens == count]
        now, before = (max(taken.regret(max_tokens, ranges) for taken in of_count) for ranges in (also, ()))
        assert now <= before


def test_the_ends_of_ranges_are_found_by_halving() -> None:
    """Here it is faster again from 301 to 340 tokens."""

    def taken(count: int) -> list[Timing]:
        decode = 4.0 if count <= 128 or 301 <= count <= 340 else 9.0
        return [Timing(count, cache, decode, 5.0) for cache in CACHES]

    counts = [1, 128, 129, 256, 288, 304, 320, 336, 352, 512, 1024]
    timings = [timing for count in counts for timing in taken(count)]
    asked = []
    while new := counts_at_edges(timings, 1024):
        asked.append(new)
        timings += [timing for count in new for timing in taken(count)]
    assert asked == [[296, 344], [300, 340], [302, 342], [301, 341]]
    assert ranges_beyond(timings, 128, 1024) == ((301, 340),)


def test_what_a_limit_says() -> None:
    limit = thresholds.Limit(128, "here", ((240, 256), (385, 385)))
    assert str(limit) == "up to 128, 240 to 256, 385 tokens"
    assert str(thresholds.Limit(128, "here")) == "up to 128 tokens"
    assert str(thresholds.Limit(0, "here", ((32, 64),))) == "32 to 64 tokens"
    assert str(thresholds.Limit(0, "here")) == "up to 0 tokens"
    counts = (1, 128, 129, 239, 240, 256, 257, 384, 385, 386)
    assert [count for count in counts if limit.includes(count)] == [1, 128, 240, 256, 385]


def test_ranges_are_of_their_shape_alone() -> None:
    flash = decode_limit(H100, CAPABILITY, (), 4096, 256)
    assert flash.also
    assert flash.is_of_shape
    near = decode_limit(H100, CAPABILITY, (), 4096, 252)
    assert (near.max_tokens, near.also, near.is_of_shape) == (flash.max_tokens, (), False)


def test_warm_and_cold_disagree() -> None:
    """At 96 decode loses 20 % warm and wins 5 % cold: 64 is the smaller evil."""
    timings = [
        Timing(64, "warm", 6, 7),
        Timing(96, "warm", 9.6, 8),
        Timing(64, "cold", 7, 9),
        Timing(96, "cold", 8, 8.4),
    ]
    assert best_threshold(timings, 128) == 64
    assert worst(timings, 64) == timings[3]
    assert timings[3].regret(64) == pytest.approx(0.05)
    assert timings[3].regret(96) == 0


def linear(count: int, crossing: dict[str, int]) -> list[Timing]:
    """Times that cross right above these counts."""
    return [Timing(count, cache, 1 + count, 1.5 + crossing[cache]) for cache in CACHES]


_crossings = st.one_of(st.integers(0, 128), st.integers(0, 1024))


@given(
    *(_crossings, _crossings, st.integers(1, 8), st.sampled_from([64, 128]), st.sampled_from([128, 1024])),
    st.sampled_from([Effort().counts, tune.QUICK.counts]),
)
def test_the_crossing_is_swept_finely(
    warm: int, cold: int, step: int, one_launch: int, most: int, counts: tuple[int, ...]
) -> None:
    """Wherever one launch is enough; beyond it 16 times as coarsely, which bounds the time that it takes."""
    warm, cold = min(warm, most), min(cold, most)
    timings = [timing for count in counts for timing in linear(count, {"warm": warm, "cold": cold})]
    fine = counts_around_crossing(timings, one_launch, most, step)
    assert fine == sorted(set(fine))
    assert not set(fine) & set(counts)
    assert all(1 <= count <= most + 1 for count in fine)
    assert len(fine) <= (one_launch + 1) / step + (most + 1) / (16 * step) + 2
    swept = sorted({*fine, *counts})
    for limit in (warm, cold):
        last = min(most + 1, limit + 16)
        apart = step if last <= one_launch + 1 else 16 * step
        near = [count for count in swept if max(1, limit - 16) <= count <= last]
        assert max((b - a for a, b in itertools.pairwise(near)), default=1) <= apart
        assert min(abs(count - limit) for count in swept) <= apart


@pytest.mark.parametrize("effort", [Effort(), tune.QUICK], ids=["thorough", "quick"])
def test_counts_begin_and_end_a_launch_and_reach_beyond_every_threshold(effort: Effort) -> None:
    assert list(effort.counts) == sorted(set(effort.counts))
    assert {1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512} <= set(effort.counts)
    assert max(effort.counts) > thresholds.MOST_TOKENS in effort.counts
    assert {128 * tiles + 1 for tiles in range(1, 8)} <= set(Effort().counts)


# Storing.


def test_stored_thresholds_are_read_again(cache: Path) -> None:
    assert thresholds.stored(H100) == ()
    assert not cache.exists(), "reading makes no folder"
    path = thresholds.store([record_of(OWN, driver="580.1", times=[[1, "warm", 2.0, 3.0]])], H100)
    assert path == thresholds.stored_file(H100) == cache / "thresholds-nvidia-h100-80gb-hbm3.jsonl"
    assert thresholds.stored(H100) == (OWN,)
    assert thresholds.stored("NVIDIA H200") == ()
    assert {entry.name for entry in cache.iterdir()} <= {path.name, f"{path.name}.lock"}


def test_other_shapes_are_kept(cache: Path) -> None:
    flash = dataclasses.replace(OWN, hidden_size=4096, num_experts=256, max_tokens=128)
    thresholds.store([record_of(OWN), record_of(flash)], H100)
    again = dataclasses.replace(OWN, max_tokens=50, date="2026-12-01")
    path = thresholds.store([record_of(again, driver="later")], H100)
    assert set(thresholds.stored(H100)) == {again, flash}
    assert [json.loads(line).get("driver") for line in path.read_text().splitlines()] == ["later", None]


DAMAGED = {
    "empty-line": b"\n",
    "no-json": b"not json",
    "cut": json.dumps(record_of(OWN)).encode()[:-9],
    "binary": bytes(range(128, 256)),
    "no-object": b"[1, 2]",
    "no-key": json.dumps({"gpu": H100}).encode(),
    "other-gpu": json.dumps(record_of(OWN, gpu="NVIDIA H200")).encode(),
    "no-capability": json.dumps(record_of(OWN, compute_capability="9.0")).encode(),
    "no-number": json.dumps(record_of(OWN, max_tokens="many")).encode(),
    "no-integer": json.dumps(record_of(OWN, max_tokens=64.0)).encode(),
    "no-ranges": json.dumps(record_of(OWN, also=7)).encode(),
    "no-range": json.dumps(record_of(OWN, also=[[300]])).encode(),
    "below-the-threshold": json.dumps(record_of(OWN, also=[[40, 50]])).encode(),
    "backwards": json.dumps(record_of(OWN, also=[[60, 50]])).encode(),
    "far-beyond": json.dumps(record_of(OWN, also=[[4000, 4097]])).encode(),
    "truth": json.dumps(record_of(OWN, max_tokens=True)).encode(),
    "negative": json.dumps(record_of(OWN, max_tokens=-1)).encode(),
    "no-experts": json.dumps(record_of(OWN, num_experts=0)).encode(),
    "no-versions": json.dumps(record_of(OWN, versions="all")).encode(),
    "other-kernels": json.dumps(record_of(OWN, versions={"dsv4-router": "0.1.0"})).encode(),
    "no-date": json.dumps(record_of(OWN, date="yesterday")).encode(),
    "one-of-two": json.dumps(record_of(OWN)).encode() + b"\n{",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_a_warning_and_no_more(cache: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = thresholds.stored_file(H100)
    cache.mkdir()
    path.write_bytes(DAMAGED[name])
    with caplog.at_level(logging.WARNING):
        assert thresholds.stored(H100) == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert "dsv4-router tune" in caplog.text
    thresholds.store([record_of(OWN)], H100)
    assert thresholds.stored(H100) == (OWN,)


def test_a_file_that_cannot_be_read_is_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    thresholds.stored_file(H100).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert thresholds.stored(H100) == ()
    assert "not usable" in caplog.text


def test_a_failed_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = thresholds.store([record_of(OWN)], H100)

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        thresholds.store([record_of(OWN, max_tokens=1)], H100)
    assert thresholds.stored(H100) == (OWN,)
    assert [entry for entry in cache.iterdir() if entry.suffix != ".lock"] == [path]


def test_processes_that_store_at_once_keep_each_others_shapes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = dataclasses.replace(OWN, hidden_size=4096, num_experts=256, max_tokens=128)
    write = thresholds.write

    def slowly(records: Any, path: Path) -> None:
        time.sleep(0.2)
        write(records, path)

    monkeypatch.setattr(thresholds, "write", slowly)
    threads = [threading.Thread(target=thresholds.store, args=([record_of(own)], H100)) for own in (OWN, flash)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(thresholds.stored(H100)) == {OWN, flash}


# From the file to the choice.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """Device ``cuda:7``, of a machine with an H100 for all that torch is asked here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "missing_cutlass_dsl", lambda: None)
    dispatch.availability.cache_clear()
    yield "cuda:7"  # type: ignore[misc]
    dispatch.availability.cache_clear()


def test_calls_follow_what_was_stored(cache: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds.store([record_of(OWN)], H100)
    assert explain(V4_PRO, 40, gpu).path == "decode"
    assert "faster up to 40 tokens (from this machine's dsv4-router tune of 2026-11-24)" in str(explain(V4_PRO, 1, gpu))
    plan = explain(V4_PRO, 41, gpu)
    assert plan.path == "cublas"
    assert "not decode: faster up to 40 tokens only (from this machine's dsv4-router tune of 2026-11-24)" in str(plan)
    thresholds.stored_file(H100).unlink()
    assert explain(V4_PRO, 41, gpu).path == "cublas", "read once for each device"
    monkeypatch.setattr(decode, "_models", {})
    assert decode._model(7, 7168, 384, 6).ordinary == set(range(1, 41))


def test_the_short_way_ends_where_the_choice_does(cache: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_models", {})
    for config in (*PRESETS.values(), dataclasses.replace(V4_PRO, hidden_size=8192, num_experts=512)):
        sizes = config.hidden_size, config.num_experts, config.top_k
        ordinary = decode._model(7, *sizes).ordinary
        rows = max(ordinary)
        assert ordinary == set(range(1, rows + 1))
        found = dispatch.availability(torch.device(gpu))
        limit, one_launch = dispatch.decode_limit(*sizes[:2], found), decode_config.max_tokens(*sizes, "sm_90a")
        assert rows == min(limit.max_tokens, one_launch)
        last = limit.max_tokens if limit.is_of_shape else rows
        paths = [dispatch.choose(dispatch.Request(*sizes, n), found) for n in (1, rows, last, last + 1)]
        assert paths == ["decode", "decode", "decode", "cublas"]


def test_the_short_way_knows_ranges_beyond_the_threshold(
    cache: Path, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds.store([record_of(OWN, max_tokens=8, also=[[16, 16], [100, 300]])], H100)
    monkeypatch.setattr(decode, "_models", {})
    ordinary = decode._model(7, 7168, 384, 6).ordinary
    assert ordinary == {*range(1, 9), 16, *range(100, 129)}
    assert {n for n in range(1, 129) if explain(V4_PRO, n, gpu).path == "decode"} == ordinary


def test_the_short_way_takes_one_launch(cache: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of more rows go the long way, though this path is chosen for them."""
    thresholds.store([record_of(OWN, max_tokens=300)], H100)
    monkeypatch.setattr(decode, "_models", {})
    launched: list[int] = []
    monkeypatch.setattr(decode, "_launch", lambda model, device_index, num_tokens, *_: launched.append(num_tokens))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 7, raising=False)
    assert decode._model(7, 7168, 384, 6).ordinary == set(range(1, 129))
    assert explain(V4_PRO, 300, gpu).path == "decode"
    assert explain(V4_PRO, 301, gpu).path == "cublas"
    gate = torch.empty(384, 7168, dtype=torch.bfloat16)
    for num_tokens in (128, 129, 300):
        hidden = torch.empty(num_tokens, 7168, dtype=torch.bfloat16)
        operands = hidden, gate, None, 6, 1.0, torch.empty(num_tokens, 6), torch.empty(num_tokens, 6).int()
        assert decode.route_again((7, num_tokens, 384, 7168), operands, True, True) == (num_tokens == 128)
    assert launched == [128]


def test_a_damaged_file_leaves_the_committed_thresholds(
    cache: Path, gpu: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    thresholds.stored_file(H100).write_text("{")
    expected = decode_limit(H100, CAPABILITY, (), 7168, 384)
    plan = explain(V4_PRO, 1, gpu)
    assert f"faster {expected} ({expected.source})" in plan.reason
    assert caplog.text.count("not usable") == 1
    explain(V4_PRO, 2, gpu)
    assert caplog.text.count("not usable") == 1


def test_importing_reads_nothing(cache: Path) -> None:
    cache.mkdir()
    thresholds.stored_file(H100).write_text("{")
    code = "import dsv4_router.api, dsv4_router.backends.decode, sys; print(sorted({'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# The command.

CROSSING = {"v4-pro": {"warm": 70, "cold": 74}, "v4-flash": {"warm": 128, "cold": 300}}


class FakeSubject:
    """Times without a GPU: linear, crossing where :data:`CROSSING` says."""

    asked: list[tuple[str, int, int]] = []  # noqa: RUF012 - of all instances, emptied by the fixture

    def __init__(self, config: Any, most_tokens: int) -> None:
        self.name = next((name for name, preset in PRESETS.items() if preset is config), config.name)
        self.most_tokens = most_tokens

    def times(self, num_tokens: int, replays: int) -> list[Timing]:
        assert 1 <= num_tokens <= self.most_tokens
        self.asked.append((self.name, num_tokens, replays))
        return linear(num_tokens, CROSSING.get(self.name, {"warm": 0, "cold": 0}))


@pytest.fixture
def fake_times(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "Subject", FakeSubject)
    monkeypatch.setattr(timing, "raise_clocks", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    FakeSubject.asked.clear()


def rows_of(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]


def test_tune_stores_and_prints(cache: Path, fake_times: None, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    code, out, _ = run("tune", "--preset", "v4-pro", "--preset", "v4-flash", "--output", output)
    assert code == 0
    stored = {entry.shape: entry.max_tokens for entry in thresholds.stored(H100)}
    assert stored == {(7168, 384): 72, (4096, 256): 192}
    path = thresholds.stored_file(H100)
    assert path.read_bytes() == output.read_bytes()
    assert f"Stored for new processes: {path}" in out
    before = str(decode_limit(H100, CAPABILITY, (), 7168, 384))
    summary = [row for row in rows_of(out) if row[0] in PRESETS]
    assert [row[:5] for row in summary] == [
        ["v4-pro", "7168", "384", "up to 72 tokens", before],
        ["v4-flash", "4096", "256", "up to 192 tokens", summary[1][4]],
    ]
    assert str(decode_limit(H100, CAPABILITY, (), 4096, 256)).startswith(summary[1][4]), "the rest is on another line"
    assert summary[0][5:] == ["2.1 % slower, 72 tokens", "2.0 % slower, 73 tokens"]
    for limit, taken in ((72, "decode"), (73, "cublas")):
        times = linear(limit, CROSSING["v4-pro"])
        cells = [f"{us:.2f}" for timing in times for us in (timing.decode, timing.cublas)]
        assert [str(limit), *cells, taken] in rows_of(out)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    pro = records[0]
    assert pro["versions"]["torch"] == importlib.metadata.version("torch")
    assert pro["worst_regret"]["warm"] == {"regret": 0.021, "num_tokens": 72}
    counts = [count for name, count, _ in FakeSubject.asked if name == "v4-pro"]
    assert sorted(counts) == sorted({count for count, *_ in pro["times"]})
    assert len(counts) == len(set(counts))
    assert set(range(56, 91)) <= set(counts)
    assert max(counts) == 8192
    assert {replays for *_, replays in FakeSubject.asked} == {timing.REPLAYS}
    assert [Timing(*row) for row in pro["times"]] == [t for n in sorted(counts) for t in linear(n, CROSSING["v4-pro"])]


def test_what_seems_to_cost_much_is_timed_again(
    cache: Path, fake_times: None, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At one count the first time taken is so wrong that either choice would cost half of it."""
    wrong = [Timing(769, "warm", 10.0, 15.0), Timing(769, "cold", 15.0, 10.0)]
    right = linear(769, CROSSING["v4-pro"])
    times = FakeSubject.times

    def at_first_wrong(self: FakeSubject, num_tokens: int, replays: int) -> list[Timing]:
        is_first = ("v4-pro", num_tokens, replays) not in self.asked
        taken = times(self, num_tokens, replays)
        return wrong if num_tokens == 769 and is_first else taken

    monkeypatch.setattr(FakeSubject, "times", at_first_wrong)
    output = tmp_path / "results.jsonl"
    assert run("tune", "--preset", "v4-pro", "--output", output)[0] == 0
    counts = [count for _, count, _ in FakeSubject.asked]
    assert {count for count in counts if counts.count(count) > 1} == {769}
    record = json.loads(output.read_text())
    found = [Timing(*row) for row in record["times"] if row[0] == 769]
    assert found == means(wrong + right * (counts.count(769) - 1))
    assert max(each["regret"] for each in record["worst_regret"].values()) < 0.03


def test_quick_takes_fewer_counts(cache: Path, fake_times: None, run: Run) -> None:
    assert run("tune", "--quick", "--preset", "v4-pro")[0] == 0
    quick = len(FakeSubject.asked)
    assert {replays for *_, replays in FakeSubject.asked} == {10}
    (entry,) = thresholds.stored(H100)
    assert abs(entry.max_tokens - 72) <= 4
    FakeSubject.asked.clear()
    assert run("tune", "--preset", "v4-pro")[0] == 0
    assert 2 * quick < len(FakeSubject.asked)


def test_tune_of_a_checkpoint(cache: Path, fake_times: None, run: Run, tmp_path: Path) -> None:
    """A model with some of its experts pruned, which no preset is."""
    fields = {"hidden_size": 4096, "n_routed_experts": 144, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields | {"num_hidden_layers": 2, "vocab_size": 50}))
    assert run("tune", "--quick", "--checkpoint", path)[0] == 0
    assert [entry.shape for entry in thresholds.stored(H100)] == [(4096, 144)]
    assert_one_line_error(run("tune", "--checkpoint", path, "--preset", "v4-pro"), "either --preset or --checkpoint")
    assert_one_line_error(run("tune", "--checkpoint", tmp_path / "absent"), "absent")


def test_tune_of_every_model(cache: Path, fake_times: None, run: Run) -> None:
    assert run("tune", "--quick")[0] == 0
    assert {name for name, *_ in FakeSubject.asked} == set(PRESETS)
    assert {entry.shape for entry in thresholds.stored(H100)} == {
        (config.hidden_size, config.num_experts) for config in PRESETS.values()
    }
    draft = next(entry for entry in thresholds.stored(H100) if entry.num_experts == 128)
    assert draft.max_tokens == 0, "the decode path never wins there"


def test_what_was_measured_is_stored_first(
    cache: Path, fake_times: None, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, write = tmp_path / "results.jsonl", thresholds.write

    def full_disk(records: Any, path: Path) -> None:
        if path == output:
            raise OSError(28, "No space left on device")
        write(records, path)

    monkeypatch.setattr(thresholds, "write", full_disk)
    code, _, err = run("tune", "--preset", "v4-pro", "--output", output)
    assert code == 1
    assert "No space left on device" in err
    assert [entry.shape for entry in thresholds.stored(H100)] == [(7168, 384)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tune_without_a_gpu(run: Run, cache: Path) -> None:
    assert_one_line_error(run("tune"), "tune needs a CUDA GPU, got cpu; torch sees none")
    assert_one_line_error(run("tune", "--device", "cuda"), "--device: expected a usable device", "no CUDA GPU")
    assert not cache.exists()


def test_tune_says_what_is_missing(
    run: Run, cache: Path, fake_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "absent"
    assert_one_line_error(run("tune", "--output", folder / "x.jsonl"), f"--output: no such folder: {folder}")
    assert_one_line_error(run("tune", "--output", "/proc/x.jsonl"), "/proc")
    config = tmp_path / "config.json"
    config.touch()
    for checkpoint in (config, tmp_path):
        result = run("tune", "--checkpoint", checkpoint, "--output", config)
        assert_one_line_error(result, "--output: expected a file of its own", str(config))
    monkeypatch.setattr(dispatch, "missing_cutlass_dsl", lambda: "nvidia-cutlass-dsl is not installed")
    dispatch.availability.cache_clear()
    assert_one_line_error(run("tune"), "no decode path, nvidia-cutlass-dsl is not installed")
    assert FakeSubject.asked == []


def test_tune_into_a_folder_that_is_none(
    run: Run, fake_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "file" / "cache"))
    code, out, err = run("tune", "--quick", "--preset", "v4-flash")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("dsv4-router: error: ")
    assert "Traceback" not in err


def test_tune_is_a_command_with_presets(run: Run) -> None:
    assert run("tune", "--preset", "v4")[0] == 2
    code, out, _ = run("tune", "--help")
    assert code == 0
    assert all(option in out for option in ("--preset", "--quick", "--output", "--device"))


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from dsv4_router import cli\n"
        "try: cli.main(['tune', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'cutlass'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\nGCC version: 13.3.0",
            "580.159.03",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104  Sat", "535.104"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_driver_version(tmp_path: Path, text: str | None, version: str) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    assert tune.driver_version(file) == version
