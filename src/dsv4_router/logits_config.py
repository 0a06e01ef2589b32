# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The geometry of the kernel that makes logits of many rows, and the host-side check of its contract.

Plain arithmetic, as in :mod:`.decode_config`, from which the order of summation comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from . import thresholds
from .decode_config import (
    BF16_BYTES,
    CHUNK,
    MAX_TRANSACTION_BYTES,
    REGISTERS_PER_SM,
    SHARED_MEMORY,
    TOKEN_TILES,
    DecodeConfig,
    unsupported_shape,
)

ARCHITECTURES = ("sm_90a",)  # which has warpgroup MMA
ROW_TILE = 128  # rows of a block, 64 for each warpgroup that multiplies
WARPGROUP = 128  # threads
CONSUMERS = ROW_TILE // 64
CLUSTER = 2  # blocks with the same rows and neighbouring experts, which share copies of the hidden states
HALF_CHUNK = CHUNK // 2  # columns of a copy: those of two quarters
SWIZZLE_BYTES, SWIZZLE_ROWS = 64, 8  # of a row of a copy, and rows after which the pattern begins again
MAX_EXPERT_TILE, MAX_DEFERRED_TILE = 96, 64
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
REGISTERS_BESIDE_SUMS = 40
# A grid of so many blocks lets dependents in before they end: ARCHITECTURE.md, "More rows, measured", runs 7, 10.
EARLY_DEPENDENTS_FROM_BLOCKS = 256


@dataclass(frozen=True)
class LogitsConfig:
    """One compiled kernel: a model's sizes.

    The sums are those of :class:`DecodeConfig`, in its order. A block makes them one phase after the other: the
    products of quarters 0 and 1 of a slice of K, then of quarters 2 and 3.

    Attributes:
        hidden_size: H.
        num_experts: E.
    """

    hidden_size: int
    num_experts: int

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
        return CLUSTER * -(-self.num_experts // (CLUSTER * MAX_EXPERT_TILE))

    @property
    def expert_tile(self) -> int:
        """Experts of a block, a multiple of 8; rows of the gate weight past E are zero-filled by the copy."""
        return -(-self.num_experts // self.num_expert_tiles // 8) * 8

    @property
    def stage_bytes(self) -> int:
        """Of two half chunks of both operands."""
        return (ROW_TILE + self.expert_tile) * 2 * HALF_CHUNK * BF16_BYTES

    @property
    def total_bytes(self) -> int:
        """Of the running sums of pairs, which registers have no room for."""
        return ROW_TILE * self.expert_tile * 4

    @property
    def stages(self) -> int:
        """As many as shared memory holds beside the sums; 16 bytes of barriers for each, 1 KiB for alignment."""
        return (SHARED_MEMORY[ARCHITECTURES[0]] - 1024 - self.total_bytes) // (self.stage_bytes + 16)

    @property
    def shared_bytes(self) -> int:
        """Upper bound of the block's shared memory."""
        return 1024 + self.total_bytes + self.stages * (self.stage_bytes + 16)

    @property
    def num_threads(self) -> int:
        return (CONSUMERS + 1) * WARPGROUP

    @property
    def defers_sums(self) -> bool:
        """A phase's sums are made while the next one multiplies, if registers hold the quarters of both."""
        return self.expert_tile <= MAX_DEFERRED_TILE

    @property
    def sum_registers(self) -> int:
        """Of a multiplying thread: a phase's two quarters or those of two, the first two's sum, and the even slice."""
        return (6 if self.defers_sums else 4) * (64 * self.expert_tile // WARPGROUP)

    @property
    def parts(self) -> tuple[int, ...]:
        """The numbers of parts in which the kernel makes K, the most first."""
        return self.num_pairs, 2, 1

    def first_half(self, num_parts: int) -> int | None:
        """How many of the parts are added apart from the rest; none, if they are halves already."""
        return self.order.half_pairs if num_parts == self.num_pairs else None

    def num_parts(self, num_tokens: int, num_multiprocessors: int) -> int:
        """Which of :attr:`parts` is the fastest for a number of rows; the bits are the same.

        All pairs apart, for more blocks, where that has been measured to be faster. For more rows the halves, or K in
        one part, with half the sums to store and read again, if that takes the multiprocessors no longer: each has one
        block at a time, which takes as long as two of the halves'.
        """
        if num_tokens <= self.pairs_apart_up_to:
            return self.num_pairs
        blocks = -(-num_tokens // ROW_TILE) * self.num_expert_tiles
        rounds, rounds_of_halves = -(-blocks // num_multiprocessors), -(-2 * blocks // num_multiprocessors)
        return 1 if 2 * rounds <= rounds_of_halves else 2

    @cached_property
    def pairs_apart_up_to(self) -> int:
        """:func:`thresholds.pairs_apart_up_to` of the shape."""
        return thresholds.pairs_apart_up_to(self.hidden_size, self.num_experts)

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
        # While one is waited for, another's products have been issued, and a third's if their sums are deferred.
        least_stages = 3 if self.defers_sums else 2
        row_bytes = HALF_CHUNK * BF16_BYTES
        for holds, text in (
            (
                self.stages >= least_stages and self.shared_bytes <= SHARED_MEMORY[architecture],
                f"shared memory: 1024 alignment + {self.total_bytes} sums + {self.stages} stages (>= {least_stages}) "
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
                self.num_pairs > 2,
                f"parts: {self.num_pairs} pairs of slices, where 2 parts are the halves and 1 is all of K",
            ),
            (
                columns - 2 * self.order.chunks_per_slice * CHUNK < self.hidden_size <= columns,
                f"K coverage: {self.num_pairs} pairs of slices of {self.order.chunks_per_slice} chunks x {CHUNK} = "
                f"{columns} columns for {self.hidden_size}",
            ),
            (
                experts >= self.num_experts and self.num_expert_tiles % CLUSTER == 0,
                f"expert coverage: {self.num_expert_tiles} tiles x {self.expert_tile} = {experts} for "
                f"{self.num_experts}, in clusters of {CLUSTER}",
            ),
            (
                row_bytes == SWIZZLE_BYTES,
                f"swizzle: rows of {HALF_CHUNK} x {BF16_BYTES} = {row_bytes} bytes, not {SWIZZLE_BYTES}",
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


def logits_config(hidden_size: int, num_experts: int, architecture: str) -> LogitsConfig | None:
    """The kernel for many rows of a model's supported sizes, or None on an architecture that has none."""
    return LogitsConfig(hidden_size, num_experts) if architecture in ARCHITECTURES else None
