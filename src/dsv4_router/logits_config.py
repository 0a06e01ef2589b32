# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The geometry of the kernel that makes logits of many rows, and the host-side check of its contract.

Plain arithmetic, as in :mod:`.decode_config`, from which the order of summation comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import NamedTuple

from .decode_config import (
    BF16_BYTES,
    CHUNK,
    LANES,
    MAX_TRANSACTION_BYTES,
    REGISTERS_PER_SM,
    SHARED_MEMORY,
    SWIZZLE_ROWS,
    TOKEN_TILES,
    WARPGROUP_ROWS,
    WARPGROUP_WARPS,
    WGMMA_ARCHITECTURES,
    DecodeConfig,
    unsupported_shape,
)

ARCHITECTURES = WGMMA_ARCHITECTURES
ROW_TILE = 128  # rows of a block
WARPGROUP = WARPGROUP_WARPS * LANES  # threads
CONSUMERS = ROW_TILE // WARPGROUP_ROWS  # warpgroups that multiply
CLUSTER = 2  # blocks with the same rows and neighbouring experts, which share copies of the hidden states
SWIZZLE_BYTES = 128  # of a row of a copy
MAX_EXPERT_TILE, MAX_TILE_IN_REGISTERS = 96, 64  # experts of a block; and so few that registers hold all sums
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
REGISTERS_BESIDE_SUMS = 40
# Of LogitsConfig.cost: the factor of a tile; what each round of tiles adds for each sum that it stores; sums stored and
# read in a unit of time, of rows that take no less with fewer experts. Close to the times of each tile and number of
# parts on an H100 and an H200: ARCHITECTURE.md, "More rows, measured", runs 16 and 19.
SUMS_IN_SHARED, ROUND, SUMS_IN_UNIT, FEW_EXPERTS = 1.45, 0.4, 2.8e6, 256
# What a launch of the decode kernel costs after these, in such units times the chunks of a slice, and how many logits
# of it add one. More than it takes, for `cost` is too high where few tiles begin a round: runs 21 and 22.
DECODE_LAUNCH, DECODE_LOGITS = 9.0, 5500
# LogitsConfig.early_stages: of few rows, up to how many those are, and of more: runs 20 to 24.
EARLY_STAGES_OF_FEW, FEW_ROWS, EARLY_STAGES = 4, 2 * ROW_TILE, 1
# When a launch lets its dependent in, LogitsConfig.dependents: from how many tiles on, and how many of its blocks, of
# how many rows each, an SM takes without harm: runs 7, 10, 24 and 25.
AS_BLOCKS_END, AFTER_PRODUCTS, AT_ONCE = range(3)
MANY_TILES, TOPK_BLOCKS, TOPK_ROWS = 256, 2, 4


@dataclass(frozen=True)
class LogitsConfig:
    """One compiled kernel: a model's sizes.

    The sums are those of :class:`DecodeConfig`, in its order. A block makes them one slice of K after the other.

    Attributes:
        hidden_size: H.
        num_experts: E.
        expert_tile: experts of a block, a multiple of 8; rows of the gate weight past E are zero-filled by the copy.
    """

    hidden_size: int
    num_experts: int
    expert_tile: int

    @cached_property
    def order(self) -> DecodeConfig:
        """A decode kernel of the model, for how K is cut; every one cuts it alike."""
        return DecodeConfig(self.hidden_size, self.num_experts, 1, TOKEN_TILES[-1])

    @property
    def num_pairs(self) -> int:
        """Pairs of slices of K, as many as partial logits at most."""
        return self.order.num_slices // 2

    @property
    def num_expert_tiles(self) -> int:
        """Whole clusters of them."""
        return CLUSTER * -(-self.num_experts // (CLUSTER * self.expert_tile))

    @property
    def tiles_are_whole(self) -> bool:
        """Whether every expert of every tile exists; else a whole tile may lie past E, where it completes a cluster."""
        return self.num_expert_tiles * self.expert_tile == self.num_experts

    @property
    def stage_bytes(self) -> int:
        """Of a chunk of both operands."""
        return (ROW_TILE + self.expert_tile) * CHUNK * BF16_BYTES

    @property
    def sums_in_shared(self) -> bool:
        """Registers have no room for the sums of a pair's even slice and of the pairs so far."""
        return self.expert_tile > MAX_TILE_IN_REGISTERS

    @property
    def sums_bytes(self) -> int:
        """Of sums in shared memory."""
        return 2 * ROW_TILE * self.expert_tile * 4 if self.sums_in_shared else 0

    @property
    def stages(self) -> int:
        """As many as shared memory holds beside the sums; 16 bytes of barriers for each, 1 KiB for alignment."""
        return (SHARED_MEMORY[ARCHITECTURES[0]] - 1024 - self.sums_bytes) // (self.stage_bytes + 16)

    @property
    def shared_bytes(self) -> int:
        """Upper bound of the block's shared memory."""
        return 1024 + self.sums_bytes + self.stages * (self.stage_bytes + 16)

    @property
    def num_threads(self) -> int:
        return (CONSUMERS + 1) * WARPGROUP

    @property
    def sum_registers(self) -> int:
        """Of a multiplying thread: a slice's four quarters, and what does not lie in shared memory."""
        return (4 if self.sums_in_shared else 6) * (WARPGROUP_ROWS * self.expert_tile // WARPGROUP)

    @property
    def parts(self) -> tuple[int, ...]:
        """The numbers of parts in which the kernel makes K, the most first: pairs of slices, quarters, halves, all."""
        return self.num_pairs, 4, 2, 1

    def sums_of_halves(self, num_parts: int) -> tuple[int, int]:
        """Partial logits of both halves of K: the sums that are added in turn, before the halves are.

        A half's pairs are added one after the other, so of its quarters only the first one's can be before.
        """
        halves = self.order.half_pairs, self.num_pairs - self.order.half_pairs
        if num_parts == self.num_pairs:
            return halves
        return (1 + halves[0] // 2, 1 + halves[1] // 2) if num_parts == 4 else (1, num_parts - 1)

    def num_sums(self, num_parts: int) -> int:
        """Partial logits of so many parts."""
        return sum(self.sums_of_halves(num_parts))

    def first_half(self, num_parts: int) -> int | None:
        """How many of the partial logits are added apart from the rest; none, if they are halves already."""
        return self.sums_of_halves(num_parts)[0] if num_parts > 2 else None

    def early_stages(self, num_tokens: int) -> int:
        """Of a block's first stages, how many have a constant gate weight requested before the previous kernel ends.

        With few rows there are fewer blocks than SMs of an H100 or H200, so all of them are there by then, and each has
        an SM for itself. They are stages of the block's first tile, which has at least the two slices of a pair.
        """
        early = EARLY_STAGES_OF_FEW if num_tokens <= FEW_ROWS else EARLY_STAGES
        return min(early, 2 * self.order.chunks_per_slice)

    def dependents(self, num_parts: int, num_tokens: int, num_multiprocessors: int) -> int:
        """When a launch lets the top-k in that adds its sums: its blocks lie on the SMs that are free then.

        At once, if it leaves enough of them: so the top-k's start costs no time. With many tiles, when a block's last
        products are done. Else as blocks end, for all of the top-k would crowd on few SMs and stay there.
        """
        tiles = -(-num_tokens // ROW_TILE) * self.num_expert_tiles * num_parts
        if tiles >= MANY_TILES:
            return AFTER_PRODUCTS
        free = num_multiprocessors - tiles
        return AT_ONCE if -(-num_tokens // TOPK_ROWS) <= TOPK_BLOCKS * free else AS_BLOCKS_END

    def cost(self, num_parts: int, num_tokens: int, num_multiprocessors: int) -> float:
        """About how long a call takes, in units of a pair of slices of a tile of 64 experts.

        Blocks take turns with tiles of rows as in ``dense_logits.py``. A tile takes as long as shared memory takes to
        move its operands, each written once and read by as many consumers as need it, and longer if sums lie there too.
        The second quarter of a half has as many sums to store as it has pairs.
        """
        clusters = max(num_multiprocessors // CLUSTER, 1)
        of_row_tile = self.num_expert_tiles // CLUSTER * num_parts
        lanes = max(clusters // of_row_tile, 1)
        rounds = -(-num_tokens // (ROW_TILE * lanes)) * -(-of_row_tile // clusters)
        pairs = self.num_pairs if num_parts == 1 else -(-self.num_pairs // num_parts)
        moved = (2 * ROW_TILE + (1 + CONSUMERS) * self.expert_tile) / (2 * ROW_TILE + (1 + CONSUMERS) * 64)
        tile = moved * (SUMS_IN_SHARED if self.sums_in_shared else 1)
        sums = self.num_sums(num_parts) * num_tokens * max(self.num_experts, FEW_EXPERTS)
        stores = self.order.half_pairs // 2 if num_parts == 4 else 1
        return rounds * (tile * pairs + ROUND * stores) + sums / SUMS_IN_UNIT

    def check(self, architecture: str = ARCHITECTURES[0]) -> None:
        """Recomputes the contract that the kernel relies on.

        Raises:
            ValueError: with the arithmetic of the first condition that does not hold.
        """
        if (why := unsupported_shape(self.hidden_size, self.num_experts, 1)) is not None:
            raise ValueError(why)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
        registers = WARPGROUP * (CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS)
        columns = self.num_pairs * 2 * self.order.chunks_per_slice * CHUNK
        experts = self.num_expert_tiles * self.expert_tile
        least_stages = 2  # while one is waited for, another's products have been issued
        row_bytes = CHUNK * BF16_BYTES
        for holds, text in (
            (
                self.stages >= least_stages and self.shared_bytes <= SHARED_MEMORY[architecture],
                f"shared memory: 1024 alignment + {self.sums_bytes} sums + {self.stages} stages (>= {least_stages}) "
                f"x ({self.stage_bytes} + 16) = {self.shared_bytes} bytes of {SHARED_MEMORY[architecture]}",
            ),
            (
                registers <= REGISTERS_PER_SM,
                f"registers: {CONSUMERS} x {WARPGROUP} x {CONSUMER_REGISTERS} + {WARPGROUP} x {PRODUCER_REGISTERS} = "
                f"{registers} > {REGISTERS_PER_SM}",
            ),
            (
                self.sum_registers + REGISTERS_BESIDE_SUMS <= CONSUMER_REGISTERS,
                f"registers: {self.sum_registers} of sums + {REGISTERS_BESIDE_SUMS} > {CONSUMER_REGISTERS}",
            ),
            (
                # Else the producer would wait for stages whose rows it has not requested.
                self.early_stages(1) <= min(self.stages, 2 * self.order.chunks_per_slice),
                f"early stages: {self.early_stages(1)} of {self.stages} and 2 x {self.order.chunks_per_slice} chunks",
            ),
            (
                self.num_pairs > 4,
                f"parts: {self.num_pairs} pairs of slices, where 4 parts are quarters, 2 are halves and 1 is all of K",
            ),
            (
                columns - 2 * self.order.chunks_per_slice * CHUNK < self.hidden_size <= columns,
                f"K coverage: {self.num_pairs} pairs of slices of {self.order.chunks_per_slice} chunks x {CHUNK} = "
                f"{columns} columns for {self.hidden_size}",
            ),
            (
                self.expert_tile <= MAX_EXPERT_TILE and experts >= self.num_experts,
                f"expert coverage: {self.num_expert_tiles} tiles x {self.expert_tile} (<= {MAX_EXPERT_TILE}) = "
                f"{experts} for {self.num_experts}",
            ),
            (
                row_bytes == SWIZZLE_BYTES,
                f"swizzle: rows of {CHUNK} x {BF16_BYTES} = {row_bytes} bytes, not {SWIZZLE_BYTES}",
            ),
            (
                # Whole patterns of the swizzle, so that every copy, and every stage, begins with one.
                self.expert_tile % SWIZZLE_ROWS == 0 and ROW_TILE // CLUSTER % SWIZZLE_ROWS == 0,
                f"alignment: copies of {self.expert_tile} and {ROW_TILE} / {CLUSTER} rows of {row_bytes} bytes, "
                f"not all multiples of {SWIZZLE_ROWS * SWIZZLE_BYTES} bytes",
            ),
            (
                self.stage_bytes < MAX_TRANSACTION_BYTES,
                f"transaction count: {self.stage_bytes} bytes on one barrier >= {MAX_TRANSACTION_BYTES}",
            ),
        ):
            if not holds:
                raise ValueError(f"{self}: {text}")


def logits_configs(hidden_size: int, num_experts: int, architecture: str) -> tuple[LogitsConfig, ...]:
    """The kernels for many rows of a model's supported sizes, small tiles of experts first; none but on some GPUs."""
    if architecture not in ARCHITECTURES:
        return ()
    tiles: dict[int, None] = {}
    for most in (MAX_TILE_IN_REGISTERS, MAX_EXPERT_TILE):
        num_expert_tiles = CLUSTER * -(-num_experts // (CLUSTER * most))
        tiles[-(-num_experts // num_expert_tiles // 8) * 8] = None
    return tuple(LogitsConfig(hidden_size, num_experts, tile) for tile in tiles)


class Schedule(NamedTuple):
    """How logits of many rows are made: by one of the kernels, with K in ``num_parts``, of the first ``num_rows``.

    The rows that are left go through the decode kernel instead, in one launch.
    """

    config: LogitsConfig
    num_parts: int
    num_rows: int


@lru_cache(maxsize=4096)
def fastest(
    configs: tuple[LogitsConfig, ...], num_tokens: int, num_multiprocessors: int, max_rows_left: int
) -> Schedule:
    """The fastest schedule for a number of rows; the bits are the same.

    All pairs apart make the most blocks. More parts have more sums to store and read again. Rows that alone begin
    another round of tiles are left, where that is estimated to take less.

    Args:
        configs: of the model's kernels for many rows.
        num_tokens: rows of the call.
        num_multiprocessors: of the GPU.
        max_rows_left: that one launch of the decode kernel takes.
    """

    def of_rows(num_rows: int) -> tuple[float, Schedule]:
        choices = [Schedule(config, num_parts, num_rows) for config in configs for num_parts in config.parts]
        costs = [choice.config.cost(choice.num_parts, num_rows, num_multiprocessors) for choice in choices]
        return min(zip(costs, choices, strict=True), key=itemgetter(0))

    cost, schedule = of_rows(num_tokens)
    left = (num_tokens - 1) % ROW_TILE + 1
    if left > min(max_rows_left, num_tokens - 1):
        return schedule
    cost_without, schedule_without = of_rows(num_tokens - left)
    of_left = (DECODE_LAUNCH + left * configs[0].num_experts / DECODE_LOGITS) / configs[0].order.chunks_per_slice
    return schedule_without if cost_without + of_left < cost else schedule
