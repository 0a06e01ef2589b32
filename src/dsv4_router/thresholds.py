# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Crossovers as data, each with the measurement that it comes from, and those that this machine has measured itself.

``dsv4-router tune`` stores its results beside the compiled kernels, a file for each GPU model, a JSON line for each
shape. The fields of a line that are read here are those of :class:`DecodeThreshold`; the others say how it came about.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__, settings
from .config import MAX_NUM_EXPERTS, check_integer
from .jit_cache import locked, replace_file

_log = logging.getLogger(__name__)


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
# 11 % faster and 4 % slower). 2 pieces: up to 4.2 of the bound. One piece, above the last entry: up to 9.6.
FEW_TOKENS = Crossover(1024, 8, _SOURCE)
_GEMM_SPLITS = (FEW_TOKENS, Crossover(4096, 2, _SOURCE))
# Of shapes, H and E, that another number of pieces suits better: 4 at 2048 tokens are 7 % faster, with half the error.
_GEMM_SPLITS_OF = {
    (4096, 256): (FEW_TOKENS, Crossover(1536, 2, _SOURCE), Crossover(2048, 4, _SOURCE), Crossover(4096, 2, _SOURCE)),
}


def gemm_splits(num_tokens: int, hidden_size: int, num_experts: int) -> int:
    """In how many pieces the cublas path cuts the hidden size, if that is possible."""
    crossovers = _GEMM_SPLITS_OF.get((hidden_size, num_experts), _GEMM_SPLITS)
    return next((found.value for found in crossovers if num_tokens <= found.max_tokens), 1)


def gemm_crossovers(hidden_size: int, num_experts: int) -> list[int]:
    """A number of tokens for each case of :func:`gemm_splits`."""
    counts = [found.max_tokens for found in _GEMM_SPLITS_OF.get((hidden_size, num_experts), _GEMM_SPLITS)]
    return [*counts, counts[-1] + 1]


_TILE_96X128 = 28  # cublasLtMatmulTile_t: experts x tokens


_WIDE_GATES = ((7168, 384), (5120, 384))


def gemm_tile(
    compute_capability: tuple[int, int], num_tokens: int, hidden_size: int, num_experts: int, splits: int
) -> int | None:
    """The tile that the batched product shall have, if the library offers it; None to take its first choice.

    On compute capability 9.0, for 384 experts, 8 pieces and 1024 tokens that is 192 x 128, one round of tiles, which
    takes 9 % longer than two rounds of 96 x 128 (at 896 tokens 4 and 13 %, H = 7168 and 5120). The bits are the same.
    NVIDIA H100 80GB HBM3, 2026-11-23, profiling/results/h100-cublaslt-tiles.jsonl.
    """
    is_measured = compute_capability == (9, 0) and (hidden_size, num_experts) in _WIDE_GATES
    return _TILE_96X128 if is_measured and splits == 8 and 896 <= num_tokens <= 1024 else None


# From so many rows on, and of so few partial logits each, activation_topk takes its way for many rows. With it a call
# takes 1.5 % less in geometric mean (from 4.3 % less to 3.1 % more), with 1536 tokens 0.3 % less. The top-k of few
# rows would take up to half as long again. NVIDIA H100 80GB HBM3, 2026-11-28,
# profiling/results/h100-alternatives.jsonl, runs 6 and 9.
MANY_ROWS, SPLITS_OF_MANY_ROWS = 2048, (1, 2)


def topk_has_many_rows(num_tokens: int, splits: int) -> bool:
    """Whether ``activation_topk`` is bound by its instructions, and takes the way that has fewer, but takes longer."""
    return num_tokens >= MANY_ROWS and splits in SPLITS_OF_MANY_ROWS


def _distance(shape: tuple[int, int], known: tuple[int, int]) -> tuple[bool, float]:
    """How far a shape, H and E, is from a known one: the same is nearest, then that of the nearest H * E by ratio."""
    return known != shape, abs(math.log(math.prod(shape) / math.prod(known)))


# No threshold below is larger: so far the choice is measured.
MOST_TOKENS = 4096


TokenRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DecodeThreshold:
    """Up to ``max_tokens`` tokens the decode path is the faster one, for one shape on one GPU model.

    Attributes:
        gpu: the model's name, as torch gives it. compute_capability: its own.
        hidden_size, num_experts: the shape; k hardly matters.
        date: of the measurement.
        results: the file with its times, in this repository; None if this machine has measured it.
        also: the first and the last count of each range beyond ``max_tokens`` in which it is the faster one too.
    """

    gpu: str
    compute_capability: tuple[int, int]
    hidden_size: int
    num_experts: int
    max_tokens: int
    date: str
    results: str | None = None
    also: TokenRanges = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden_size, self.num_experts

    @property
    def source(self) -> str:
        if self.results is None:
            return f"from this machine's dsv4-router tune of {self.date}"
        return f"measured on {self.gpu}, {self.date}, {self.results}"


_H100 = ("NVIDIA H100 80GB HBM3", (9, 0))
_H100_RESULTS = ("2026-11-28", "profiling/results/h100-thresholds.jsonl")
_H200 = ("NVIDIA H200", (9, 0))
_H200_RESULTS = ("2026-11-29", "profiling/results/h200-thresholds.jsonl")
# Of each shape that was measured, the number for which, with ranges beyond it where the other choice would cost more
# than 3 %, the worst choice costs the least, with warm or cold caches: tune.best_threshold and tune.ranges_beyond.
# fmt: off
DECODE = (
    DecodeThreshold(*_H100, 4096, 256, 256, *_H100_RESULTS, (
        (385, 399), (448, 460), (475, 512), (1296, 1296), (1321, 1380), (1408, 1408), (1646, 1664), (1742, 1792),
        (1896, 1920),
    )),
    DecodeThreshold(*_H100, 7168, 384, 128, *_H100_RESULTS, ((1360, 1408),)),
    DecodeThreshold(*_H100, 5120, 384, 128, *_H100_RESULTS, ((218, 224), (1312, 1408))),
    DecodeThreshold(*_H100, 5120, 128, 432, *_H100_RESULTS, (
        (449, 487), (513, 543), (576, 576), (641, 655), (704, 1024), (1488, 1488), (1513, 1536), (1768, 1784),
        (2704, 2704), (2744, 2783), (2821, 2851), (2912, 2912), (3103, 3109), (3169, 3264), (3328, 3328), (3376, 3376),
        (3408, 3408), (3440, 3440), (3584, 3584),
    )),
    DecodeThreshold(*_H200, 4096, 256, 512, *_H200_RESULTS, (
        (576, 576), (673, 719), (736, 768), (832, 844), (864, 1024), (1057, 1088), (1281, 1296), (1321, 1378),
        (1408, 1408), (1441, 1514), (1537, 1583), (1600, 2048),
    )),
    DecodeThreshold(*_H200, 7168, 384, 256, *_H200_RESULTS, ((368, 368), (401, 431), (561, 576), (1284, 1408))),
    DecodeThreshold(*_H200, 5120, 384, 256, *_H200_RESULTS, (
        (361, 376), (401, 439), (521, 544), (561, 592), (833, 848), (865, 895), (1281, 1408),
    )),
    DecodeThreshold(*_H200, 5120, 128, 1056, *_H200_RESULTS, (
        (1201, 1376), (1542, 1568), (1616, 1616), (1729, 1821), (1921, 2007), (3169, 3216), (3233, 3248), (3633, 3648),
        (4084, 4096),
    )),
)
# fmt: on


class Limit(NamedTuple):
    """Up to how many tokens the decode path is the faster one, and which measurement says so.

    Attributes:
        max_tokens, also: as those of :class:`DecodeThreshold`.
        source: of the measurement.
        is_of_shape: whether the very shape was measured, not one near it.
    """

    max_tokens: int
    source: str
    also: TokenRanges = ()
    is_of_shape: bool = True

    def includes(self, num_tokens: int) -> bool:
        """Whether the decode path is the faster one."""
        return includes(num_tokens, self.max_tokens, self.also)

    def __str__(self) -> str:
        ranges = [f"up to {self.max_tokens}"] if self.max_tokens or not self.also else []
        ranges += [f"{first} to {last}" if first < last else str(first) for first, last in self.also]
        return f"{', '.join(ranges)} tokens"


def includes(num_tokens: int, max_tokens: int, also: Iterable[tuple[int, int]]) -> bool:
    """Whether a number of tokens is below a threshold or in one of the ranges beyond it."""
    return num_tokens <= max_tokens or any(first <= num_tokens <= last for first, last in also)


def decode_limit(
    gpu: str | None,
    compute_capability: tuple[int, int] | None,
    tuned: tuple[DecodeThreshold, ...],
    hidden_size: int,
    num_experts: int,
) -> Limit:
    """The threshold for a shape on a device, at most :data:`MOST_TOKENS`.

    Entries of the same GPU model count, the machine's own before those of :data:`DECODE` for the same shape; where
    there are none, those of the model in :data:`DECODE` whose compute capability is nearest. Of these the shape's own
    is taken, else that of the shape whose H * E, the size of the gate weight, is nearest by ratio. Ranges beyond the
    threshold are taken of this very GPU model and shape only.

    Args:
        gpu: the model's name, or None if it is not known. compute_capability: likewise.
        tuned: what this machine has measured.
        hidden_size, num_experts: of the call.
    """
    own = {entry.shape: entry for entry in (*(known for known in DECODE if known.gpu == gpu), *tuned)}
    entries = tuple(own.values()) or _of_nearest_gpu(compute_capability)
    shape = hidden_size, num_experts

    entry = min(entries, key=lambda entry: _distance(shape, entry.shape))
    source = entry.source
    if entry.shape != shape:
        source += f", for the nearest shape: H={entry.hidden_size} E={entry.num_experts}"
    if not own:
        source += ", the nearest GPU that was measured"
    also = entry.also if own and entry.shape == shape else ()
    return Limit(min(entry.max_tokens, MOST_TOKENS), source, also, entry.shape == shape)


def _of_nearest_gpu(compute_capability: tuple[int, int] | None) -> tuple[DecodeThreshold, ...]:
    """The committed entries of one GPU model; of several equally near ones, of the first."""

    def distance(entry: DecodeThreshold) -> int:
        (major, minor), (own_major, own_minor) = entry.compute_capability, compute_capability or (0, 0)
        return abs(10 * (major - own_major) + minor - own_minor)

    nearest = min(DECODE, key=distance)
    return tuple(entry for entry in DECODE if entry.gpu == nearest.gpu)


def stored_file(gpu: str) -> Path:
    """Where ``dsv4-router tune`` keeps what it has measured on a GPU model."""
    return settings.cache_dir() / f"thresholds-{re.sub('[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.jsonl"


def stored(gpu: str) -> tuple[DecodeThreshold, ...]:
    """This machine's own thresholds for a GPU model; none, with a warning, if their file is damaged."""
    return tuple(threshold for threshold, _ in _usable(stored_file(gpu), gpu))


def _usable(path: Path, gpu: str) -> list[tuple[DecodeThreshold, Any]]:
    """A file's thresholds and their records, if it is there and they are all in order."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(parse(record, gpu), record) for record in records]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s not usable (%s): taking the package's own; dsv4-router tune writes it anew", path, error)
    return []


_KEYS = {"gpu", "compute_capability", "hidden_size", "num_experts", "max_tokens", "date", "versions"}


def parse(record: object, gpu: str) -> DecodeThreshold:
    """The threshold in a record of ``dsv4-router tune`` for a GPU model.

    Raises:
        TypeError, ValueError: the record is damaged, of another model, or of other kernels: another version's.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object in each line, got {type(record).__name__}")
    if missing := _KEYS - set(record):
        raise ValueError(f"expected the keys {', '.join(sorted(missing))}")
    if record["gpu"] != gpu:
        raise ValueError(f"gpu: expected {gpu!r}, got {record['gpu']!r}")
    versions = record["versions"]
    if not isinstance(versions, Mapping) or versions.get("dsv4-router") != __version__:
        raise ValueError(f"versions: expected dsv4-router {__version__}, got {versions!r}")
    capability, date = record["compute_capability"], record["date"]
    if not isinstance(capability, list) or [type(part) for part in capability] != [int, int]:
        raise ValueError(f"compute_capability: expected two integers, got {capability!r}")
    if not isinstance(date, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise ValueError(f"date: expected one such as 2026-11-23, got {date!r}")
    check_integer("hidden_size", record["hidden_size"], 1, None)
    check_integer("num_experts", record["num_experts"], 1, MAX_NUM_EXPERTS)
    check_integer("max_tokens", record["max_tokens"], 0, None)
    also = record.get("also", [])
    if not isinstance(also, list) or not all(_is_range(each, record["max_tokens"]) for each in also):
        raise ValueError(f"also: expected ranges above max_tokens, up to {MOST_TOKENS}, got {also!r}")
    sizes = record["hidden_size"], record["num_experts"], record["max_tokens"]
    ranges = tuple((first, last) for first, last in also)
    return DecodeThreshold(gpu, (capability[0], capability[1]), *sizes, date, also=ranges)


def _is_range(value: object, above: int) -> bool:
    is_pair = isinstance(value, list) and [type(count) for count in value] == [int, int]
    return is_pair and above < value[0] <= value[1] <= MOST_TOKENS  # type: ignore[index]


def store(records: Iterable[Mapping[str, Any]], gpu: str) -> Path:
    """Writes records of ``dsv4-router tune`` to :func:`stored_file`, which it returns.

    What the file holds of other shapes stays, unless the file is damaged. It is replaced in one step.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = stored_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        kept = {threshold.shape: record for threshold, record in _usable(path, gpu)}
        kept |= {parse(record, gpu).shape: record for record in records}
        write(kept.values(), path)
    return path


def write(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes records as JSON lines, in one step.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())
