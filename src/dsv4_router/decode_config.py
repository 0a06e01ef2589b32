# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The geometry of the one-launch decode kernel, and the host-side check of its concurrency contract.

Plain arithmetic: nothing here needs CUTLASS or a GPU. :class:`DecodeConfig` is one compiled variant; the kernel takes
every size from it, so what is checked here is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

MIN_HIDDEN_SIZE, MAX_HIDDEN_SIZE, HIDDEN_SIZE_STEP = 1024, 8192, 64
MIN_NUM_EXPERTS, MAX_NUM_EXPERTS, NUM_EXPERTS_STEP = 32, 512, 4
MAX_TOP_K = 16
# Rows that one launch takes are padded to a token tile; one compiled variant for each. Two halves of a tile's rows are
# whole 16-row tiles of the MMA; 96 is in ARCHITECTURE.md, "Decode kernel, measured", at "A tile of 96 rows".
TOKEN_TILES = (8, 16, 32, 64, 96, 128)

CHUNK = 64  # columns of K in one tensor copy: 128 bytes of bf16, the width of the widest swizzle
SWIZZLE_ROWS = 8  # of 128 bytes, after which the swizzle's pattern begins again
QUARTERS = 4  # of a chunk, 16 columns each: one k-step of m16n8k16
MMA_WARPS = 2 * QUARTERS  # that multiply, each a quarter of one of two slices, or of half of the rows
MAX_SLICES = 16
# What was timed for these is in ARCHITECTURE.md, "Decode kernel, measured", at the words quoted.
TWO_SLICES_UP_TO_BYTES = 32768  # of hidden states in a block, 16 rows of Pro: "Two slices up to 16 rows"
ROW_COPIES_UP_TO = 4  # rows: "rows by bulk copies of their own", "Rows by copies of their own up to 4"
FIRST_BLOCKS_OWN_UP_TO = 2  # rows of a launch, at most MMA_N: "Rows owned by the first blocks"
EARLY_DEPENDENTS_UP_TO = 16  # rows of a tile: "Dependents let in before the packets", "Dependents early at 16 rows"
# A gate tile is late if it comes less than this before the wait on the previous kernel ends, or after it: "Dependents
# let in when the gate tile is late".
LATE_GATE_CYCLES = 300
# At a row's packets: with up to 8 rows, with more, and with warpgroups for 32 rows and for more: "First looks later",
# "Sums by warpgroups", "All packets again".
FIRST_LOOK_AFTER_CYCLES = (30, 120, 320, 560)
WARPGROUPS_FROM_SUMS = 1024  # of a block: "Sums by warpgroups"
TARGET_EXPERT_TILES = 8
MMA_M, MMA_N, MMA_K = 16, 8, 16
LANES = 32
WARPGROUP_WARPS, WARPGROUP_ROWS = 4, 64  # of a warpgroup, and of its MMA
PACKET_BYTES = 16
EPOCH_BITS, NUM_BLOCKS_BITS = 44, 8  # of a packet's 64-bit tag; the rest is of %gridid
HEADER_BYTES = 2048  # one 8-byte ticket counter for each number of blocks
BF16_BYTES = 2
MAX_TRANSACTION_BYTES = 1 << 20  # of an mbarrier phase (PTX ISA, "mbarrier")
# Of every variant of every shape: 128 rows, 16 slices, 512 experts.
MAX_WORKSPACE_BYTES = HEADER_BYTES + TOKEN_TILES[-1] * MAX_SLICES * MAX_NUM_EXPERTS // 2 * PACKET_BYTES
REGISTERS_PER_SM, SM_PARTITIONS = 65536, 4  # each partition has its own quarter of the registers
MAX_REGISTERS = 255
# What a thread needs beside accumulators and fragments, and what looking at 8 packets takes.
REGISTERS_BESIDE_MMA, MIN_REGISTERS = 14, 72
# Shared memory that a block may use, in bytes (CUDA programming guide, "Technical Specifications per Compute
# Capability": the SM's capacity less 1 KiB that the system reserves for each block).
RESERVED_SHARED_BYTES = 1024
SHARED_MEMORY = {"sm_90a": 232448, "sm_100a": 232448, "sm_103a": 232448, "sm_120a": 101376}
# What leaves room for a second block on the SM, of which each takes the reserved bytes as well.
HALF_SHARED_BYTES = (SHARED_MEMORY["sm_90a"] - RESERVED_SHARED_BYTES) // 2
ARCHITECTURES = tuple(SHARED_MEMORY)
WGMMA_ARCHITECTURES = ("sm_90a",)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b


def _fits_twice(shared_bytes: int) -> bool:
    """Whether an SM has shared memory for two blocks."""
    return shared_bytes <= HALF_SHARED_BYTES


def unsupported_shape(hidden_size: int, num_experts: int, top_k: int) -> str | None:
    """Why the decode kernel serves no call of these sizes, or None. The one statement of its limits."""
    for name, value, low, high, step in (
        ("hidden_size", hidden_size, MIN_HIDDEN_SIZE, MAX_HIDDEN_SIZE, HIDDEN_SIZE_STEP),
        ("num_experts", num_experts, MIN_NUM_EXPERTS, MAX_NUM_EXPERTS, NUM_EXPERTS_STEP),
        ("top_k", top_k, 1, MAX_TOP_K, 1),
    ):
        if not low <= value <= high or value % step:
            multiple = f", a multiple of {step}" if step > 1 else ""
            return f"the one-launch kernel needs {name} from {low} to {high}{multiple}, got {value}"
    return None


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled variant of the decode kernel: a model's sizes and a token tile.

    How K is cut, and with it every bit of a logit, depends on ``hidden_size`` alone: a logit is
    ``(p[0] + ... + p[h-1]) + (p[h] + ... + p[P-1])`` over its P pairs of slices of K with ``h = ceil(P / 2)``, each
    pair ``s[2 i] + s[2 i + 1]``, each slice ``(q0 + q1) + (q2 + q3)`` over its quarters, and quarter j takes columns
    ``16 j .. 16 j + 15`` of every 64-column chunk of the slice, one MMA step after the other. No other field changes
    this order.

    Attributes:
        hidden_size: H.
        num_experts: E.
        top_k: k.
        token_tile: rows that a launch can take, one of :data:`TOKEN_TILES`.
        warpgroup_mma: whether warpgroups multiply (``wgmma``), 64 rows each, and not warps (``mma.sync``).
    """

    hidden_size: int
    num_experts: int
    top_k: int
    token_tile: int
    warpgroup_mma: bool = False

    @property
    def slices_per_block(self) -> int:
        """With few rows a block has two slices, and half as many experts: half as many sums cross blocks."""
        two = self.chunk_bytes(self.token_tile) * 2 * self.chunks_per_slice
        return 2 if two <= TWO_SLICES_UP_TO_BYTES else 1

    @property
    def steps(self) -> list[int]:
        """The order in which a block's chunks arrive: slices in turn, for different warps multiply them."""
        chunks = self.chunks_per_slice
        return [s * chunks + chunk for chunk in range(chunks) for s in range(self.slices_per_block)]

    @property
    def m_tiles(self) -> int:
        return _ceil_div(self.token_tile, MMA_M)

    @property
    def warp_m_tiles(self) -> int:
        """16-row tiles of a warp that multiplies."""
        return self.m_tiles * self.slices_per_block * QUARTERS // MMA_WARPS

    @property
    def experts_are_rows(self) -> bool:
        """Whether experts are the 16 rows of a warp's MMA, and the tile's rows its 8 columns."""
        return self.token_tile <= MMA_N

    @property
    def warpgroup_warps(self) -> int:
        """Warps that multiply where warpgroups do."""
        return _ceil_div(self.token_tile, WARPGROUP_ROWS) * WARPGROUP_WARPS

    @property
    def exchanges_sums(self) -> bool:
        """Whether lanes exchange sums of warpgroups, for wider stores; with few rows it takes longer than it saves."""
        return self.token_tile >= WARPGROUP_ROWS

    @property
    def expert_tile(self) -> int:
        """Experts of a block; rows of the gate weight past E are zero-filled by the copy."""
        tile = _round_up(_ceil_div(self.num_experts, TARGET_EXPERT_TILES), 2 * MMA_N)
        return tile // self.slices_per_block

    @property
    def expert_rows(self) -> int:
        """Of a warp's MMAs, where experts are their rows: with whole MMAs."""
        return _round_up(self.expert_tile, MMA_M)

    @property
    def num_expert_tiles(self) -> int:
        return _ceil_div(self.num_experts, self.expert_tile)

    @property
    def chunks_per_slice(self) -> int:
        """64-column chunks of a slice of K; columns past H are zeros."""
        return _ceil_div(self.hidden_size // CHUNK, MAX_SLICES)

    @property
    def num_slices(self) -> int:
        """Whole pairs of them."""
        return _round_up(_ceil_div(self.hidden_size // CHUNK, self.chunks_per_slice), 2)

    @property
    def half_pairs(self) -> int:
        """Pairs of slices in the first half of a logit's sum."""
        return _ceil_div(self.num_slices // 2, 2)

    @property
    def chunks_per_block(self) -> int:
        return self.slices_per_block * self.chunks_per_slice

    @property
    def covered_columns(self) -> int:
        """H, and the columns past it that complete the last block's slices."""
        return self.num_slices * self.chunks_per_slice * CHUNK

    @property
    def num_parts(self) -> int:
        """Published sums of a logit: one for each block along K."""
        return self.num_slices // self.slices_per_block

    @property
    def max_row_copies(self) -> int:
        """Up to how many rows of a launch each comes by a copy of its own, and not all by tensor copies."""
        return ROW_COPIES_UP_TO if self.experts_are_rows else 0

    @property
    def hidden_rows(self) -> int:
        """Rows that hidden states have room for: as many as an MMA reads at least."""
        return max(self.token_tile, WARPGROUP_ROWS) if self.warpgroup_mma else self.token_tile

    @property
    def hidden_pitch(self) -> int:
        """Elements between rows that are copied one by one: 16 bytes more than 128-byte units, for the banks' sake."""
        return self.chunks_per_block * CHUNK + 16 // BF16_BYTES

    @property
    def hidden_stages(self) -> int:
        """Parts that the hidden states arrive in: with few rows, waiting for each chunk costs more than it hides."""
        return 1 if self.token_tile <= MMA_M else self.chunks_per_block

    @property
    def gate_registers(self) -> int:
        """Of the gate weight's fragment of one step."""
        return 4 * self.expert_rows // MMA_M if self.experts_are_rows else 2 * self.expert_tile // MMA_N

    @property
    def gate_fragments(self) -> int:
        """Steps whose gate fragments a warp holds: with few rows there are registers for nearly all."""
        # 6 steps of Pro: ARCHITECTURE.md, "Nearly all gate fragments held". It tells no timing for 24.
        registers = 48 if self.experts_are_rows else 36 if self.token_tile <= MMA_M else 24
        return max(1, min(self.chunks_per_slice, registers // self.gate_registers))

    @property
    def hidden_fragments(self) -> int:
        """Steps whose fragments of the hidden states a warp holds."""
        return 4 if self.token_tile <= MMA_M else 2

    @property
    def lets_dependents_in_early(self) -> bool:
        """By one warp, before the packets are stored: few are not held up by loads of the next launch's gate weight.

        Else each warp says so when it has stored its own, or has none; the first one's word counts.
        """
        return self.token_tile <= EARLY_DEPENDENTS_UP_TO

    @property
    def has_usher(self) -> bool:
        """Whether there is a warp to spare that lets dependents in at once where the gate tile is late."""
        return self.experts_are_rows and self.num_warps > MMA_WARPS + 1

    @property
    def first_look_after_cycles(self) -> int:
        """How long an owner waits before it looks at its row's packets: other blocks store theirs meanwhile."""
        few, more, few_of_warpgroups, more_of_warpgroups = FIRST_LOOK_AFTER_CYCLES
        if self.warpgroup_mma:
            return more_of_warpgroups if self.token_tile >= WARPGROUP_ROWS else few_of_warpgroups
        return few if self.experts_are_rows else more

    @property
    def num_blocks(self) -> int:
        return self.num_expert_tiles * self.num_parts

    @property
    def num_warps(self) -> int:
        """Those that multiply and at least one more, the producer; and a thread for each padded expert."""
        return max(MMA_WARPS + 1, _ceil_div(self.padded_experts, LANES))

    @property
    def num_threads(self) -> int:
        return self.num_warps * LANES

    @property
    def group_lanes(self) -> int:
        """Experts of a group: as many as a warp has lanes, or the largest power of two that makes at least k groups."""
        lanes = LANES
        while _ceil_div(self.num_experts, lanes) < self.top_k:
            lanes //= 2
        return lanes

    @property
    def num_groups(self) -> int:
        """Subtiles of the experts whose best ones bound a row's k-th best from below."""
        return _ceil_div(self.num_experts, self.group_lanes)

    @staticmethod
    def chunk_bytes(rows: int) -> int:
        """Bytes that one tensor copy of ``rows`` rows writes, those of rows and columns out of range included."""
        return rows * CHUNK * BF16_BYTES

    @property
    def operand_bytes(self) -> int:
        gate = self.chunks_per_block * self.chunk_bytes(self.expert_tile)
        if self.max_row_copies:
            return gate + self.hidden_rows * self.hidden_pitch * BF16_BYTES
        return gate + self.chunks_per_block * self.chunk_bytes(self.hidden_rows)

    @property
    def partial_pitch(self) -> int:
        """Floats between two rows of partial sums, so that stores of a warp fall on different banks.

        Of two neighbouring experts and eight rows an odd multiple of 8, of eight experts and every other row one of 4.
        """
        return self.expert_tile + (4 if self.experts_are_rows else (self.expert_tile + 8) % 16)

    @property
    def partial_rows(self) -> int:
        """Rows of partial sums in shared memory; sums of warpgroups are there only of a row that is computed alone."""
        return MMA_M if self.warpgroup_mma else self.token_tile

    @property
    def partial_bytes(self) -> int:
        return self.slices_per_block * QUARTERS * self.partial_rows * self.partial_pitch * 4

    @property
    def partials_share_operands(self) -> bool:
        """Partial sums lie over the operands where both would keep a second block off the SM, or warpgroups multiply.

        Not with two slices, where that would bring no block.
        """
        if self.warpgroup_mma:
            return True
        return self.slices_per_block == 1 and not _fits_twice(self._shared_bytes(shares=False))

    @property
    def selection_bytes(self) -> int:
        """Both halves of the logits, scores, candidates, the best of each group, winners, a counter, and to spare."""
        return (3 * 4 + 8) * self.num_threads + 4 * LANES + 2 * 4 * MAX_TOP_K + 16

    @property
    def barrier_bytes(self) -> int:
        return 8 * (self.slices_per_block + self.hidden_stages)

    @property
    def shared_bytes(self) -> int:
        """Upper bound of the block's shared memory."""
        return self._shared_bytes(self.partials_share_operands)

    def _shared_bytes(self, shares: bool) -> int:
        """The parts, each rounded up to its alignment; ``shares``: whether partial sums lie over the operands."""
        if shares:
            operands = max(self.operand_bytes, self.partial_bytes)
        else:
            operands = self.operand_bytes + _round_up(self.partial_bytes, 128)
        rest = _round_up(self.selection_bytes, 128) + _round_up(self.barrier_bytes + 16, 128)
        return 1024 + operands + rest + self.padding_bytes

    @property
    def padding_bytes(self) -> int:
        """Shared memory for nothing but that an SM holds only one block where warpgroups multiply."""
        used = max(self.operand_bytes, self.partial_bytes) + self.selection_bytes
        return _round_up(max(0, HALF_SHARED_BYTES + 1 - used), 128) if self.warpgroup_mma else 0

    def _registers(self, blocks: int) -> int:
        """What the register file leaves to a thread of that many blocks on an SM."""
        warps = _ceil_div(blocks * self.num_threads // LANES, SM_PARTITIONS)
        return min(MAX_REGISTERS, REGISTERS_PER_SM // SM_PARTITIONS // (warps * LANES) // 8 * 8)

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that an SM shall hold: two, so that the next launch loads its gate weight while this one ends.

        Of warpgroups one: where two multiply on one SM while another has none, that takes longer than it saves.
        """
        if self.warpgroup_mma:
            return 1
        return 2 if _fits_twice(self.shared_bytes) and self._registers(2) >= self.needed_registers else 1

    @property
    def registers_per_thread(self) -> int:
        """The compiler's limit."""
        return self._registers(self.blocks_per_sm)

    @property
    def needed_registers(self) -> int:
        return max(MIN_REGISTERS, self.mma_registers + REGISTERS_BESIDE_MMA)

    @property
    def mma_registers(self) -> int:
        """Accumulators of a warp's rows and experts, and the fragments of the steps that it holds.

        Of a warpgroup, which reads its operands from shared memory, accumulators of all quarters.
        """
        if self.warpgroup_mma:
            return QUARTERS * WARPGROUP_ROWS * self.expert_tile // (WARPGROUP_WARPS * LANES)
        sums, hidden = self.warp_m_tiles * self.expert_tile // MMA_N * 4, 4 * self.hidden_fragments
        if self.experts_are_rows:
            sums, hidden = self.expert_rows // MMA_M * 4, 2 * self.hidden_fragments
        return sums + self.gate_registers * self.gate_fragments + hidden

    @property
    def padded_experts(self) -> int:
        return self.num_expert_tiles * self.expert_tile

    @property
    def packets_per_part(self) -> int:
        """Packets of one row and part of K: two experts each."""
        return self.padded_experts // 2

    @property
    def packets_per_row(self) -> int:
        return self.num_parts * self.packets_per_part

    @property
    def workspace_bytes(self) -> int:
        """What a launch of this variant may use."""
        return HEADER_BYTES + self.token_tile * self.packets_per_row * PACKET_BYTES

    def _without_warpgroups(self, architecture: str) -> list[str]:
        """What keeps warpgroups from multiplying."""
        found = []
        if architecture not in WGMMA_ARCHITECTURES:
            found.append(f"{architecture}, which is none of {WGMMA_ARCHITECTURES}")
        if self.token_tile * self.expert_tile < WARPGROUPS_FROM_SUMS:
            found.append(f"{self.token_tile} rows x {self.expert_tile} experts < {WARPGROUPS_FROM_SUMS} sums")
        if self.warpgroup_warps > MMA_WARPS:
            found.append(f"{self.warpgroup_warps} > {MMA_WARPS} warps")
        if self.slices_per_block > 1:
            found.append(f"{self.slices_per_block} slices a block")
        return found

    def check(self, architecture: str = "sm_90a") -> None:
        """Recomputes the contract that the kernel relies on.

        Raises:
            ValueError: with the arithmetic of the first condition that does not hold.
        """
        if (why := unsupported_shape(self.hidden_size, self.num_experts, self.top_k)) is not None:
            raise ValueError(why)
        if architecture not in SHARED_MEMORY:
            raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
        if self.token_tile not in TOKEN_TILES:
            raise ValueError(f"token_tile: expected one of {TOKEN_TILES}, got {self.token_tile}")
        for holds, text in self._conditions(architecture):
            if not holds:
                raise ValueError(f"{self}: {text}")

    def _conditions(self, architecture: str) -> tuple[tuple[bool, str], ...]:
        capacity = SHARED_MEMORY[architecture]
        covered = self.covered_columns
        of_hidden_states = self.token_tile * self.chunks_per_block // self.hidden_stages
        largest_phase = self.chunk_bytes(max(self.expert_tile * self.chunks_per_slice, of_hidden_states))
        requesting = self.num_warps - self.has_usher  # the usher waits for the previous kernel later than the others
        without = self._without_warpgroups(architecture) if self.warpgroup_mma else []
        multiplied, wanted = MMA_WARPS * self.warp_m_tiles, self.slices_per_block * QUARTERS * self.m_tiles
        return (
            (
                self.shared_bytes <= capacity,
                f"shared memory: 1024 alignment + {self.operand_bytes} operands + {self.partial_bytes} partial sums"
                f"{' (over the operands)' if self.partials_share_operands else ''} + {self.selection_bytes} selection"
                f" + {self.barrier_bytes} barriers = {self.shared_bytes} bytes > {capacity} of {architecture}",
            ),
            (
                self.needed_registers <= self.registers_per_thread,
                f"registers: max({MIN_REGISTERS}, {self.mma_registers} for the MMA + {REGISTERS_BESIDE_MMA}) = "
                f"{self.needed_registers} > {REGISTERS_PER_SM} for {self.num_threads} threads = "
                f"{self.registers_per_thread}",
            ),
            (
                8 * (self.num_blocks + 1) <= HEADER_BYTES,
                f"ticket counters: 8 x ({self.num_blocks} + 1) bytes > {HEADER_BYTES}",
            ),
            (
                self.num_blocks < 1 << NUM_BLOCKS_BITS,
                f"tag: {self.num_blocks} blocks do not fit into {NUM_BLOCKS_BITS} bits",
            ),
            (self.num_threads <= 1024, f"threads: {self.num_threads} > 1024"),
            (
                covered - 2 * self.chunks_per_slice * CHUNK < self.hidden_size <= covered
                and covered == self.num_parts * self.chunks_per_block * CHUNK,
                f"K coverage: {self.num_parts} parts x {self.chunks_per_block} chunks x {CHUNK} = {covered} columns "
                f"for {self.hidden_size}, in pairs of slices of {self.chunks_per_slice} chunks",
            ),
            (
                self.padded_experts >= self.num_experts > self.padded_experts - self.expert_tile,
                f"expert coverage: {self.num_expert_tiles} tiles x {self.expert_tile} = {self.padded_experts} for "
                f"{self.num_experts}",
            ),
            (
                multiplied == wanted,
                f"MMA coverage: {MMA_WARPS} warps x {self.warp_m_tiles} row tiles = {multiplied} != "
                f"{self.slices_per_block} slices x {QUARTERS} quarters x {self.m_tiles} row tiles",
            ),
            (not without, f"warpgroups: {' and '.join(without)}"),
            (
                self.num_warps > MMA_WARPS,
                f"producer: none of {self.num_warps} warps is left beside {MMA_WARPS} that multiply",
            ),
            (
                # The kernel computes a swizzled address once, and adds whole tiles to it.
                self.expert_tile % SWIZZLE_ROWS == 0,
                f"swizzle: {self.expert_tile} experts, not a multiple of {SWIZZLE_ROWS}",
            ),
            (
                self.max_row_copies <= requesting,
                f"row requests: {self.max_row_copies} rows, each by a warp of its own, > {requesting} warps",
            ),
            (
                # Where a row is computed alone. So `expert_tile // 2` threads, which add its sums there, exist as well.
                self.num_threads >= self.padded_experts,
                f"selection: {self.num_threads} threads < {self.padded_experts} padded experts",
            ),
            (
                self.top_k <= self.num_groups <= LANES,
                f"threshold: {self.num_groups} groups of {self.group_lanes} experts for top_k = {self.top_k} and "
                f"{LANES} lanes",
            ),
            (
                largest_phase < MAX_TRANSACTION_BYTES,
                f"transaction count: {largest_phase} bytes on one barrier >= {MAX_TRANSACTION_BYTES}",
            ),
            (
                self.workspace_bytes <= MAX_WORKSPACE_BYTES,
                f"workspace: {HEADER_BYTES} + {self.token_tile} rows x {self.packets_per_row} packets x "
                f"{PACKET_BYTES} = {self.workspace_bytes} bytes > {MAX_WORKSPACE_BYTES}",
            ),
        )


def variant(hidden_size: int, num_experts: int, top_k: int, token_tile: int, architecture: str) -> DecodeConfig:
    """A model's variant for a token tile: warpgroups multiply wherever they can. It need not fit."""
    config = DecodeConfig(hidden_size, num_experts, top_k, token_tile)
    by_warpgroups = replace(config, warpgroup_mma=True)
    return by_warpgroups if _fits(by_warpgroups, architecture) else config


@lru_cache
def variants(hidden_size: int, num_experts: int, top_k: int, architecture: str) -> tuple[DecodeConfig, ...]:
    """The variants of a model that fit an architecture, the fewest rows first; all that its calls ever need.

    They end before the first that does not fit, so that any number of rows up to the last one's has its variant.
    Remembered, for dispatch asks for every new number of tokens, and the checks take a millisecond.
    """
    if unsupported_shape(hidden_size, num_experts, top_k):
        return ()
    configs = (variant(hidden_size, num_experts, top_k, tile, architecture) for tile in TOKEN_TILES)
    return tuple(takewhile(lambda config: _fits(config, architecture), configs))


def max_tokens(
    hidden_size: int, num_experts: int, top_k: int, architecture: str, num_multiprocessors: int | None = None
) -> int:
    """Rows that one launch takes: of the largest variant that fits an architecture; 0 if none does.

    A GPU that holds fewer blocks at once than a launch has takes no more rows than that: else every block that it
    holds could own a row, and wait for the sums of those that start when one has left. With as many, or fewer, those
    that own none leave, and make room for all of the others.

    Args:
        hidden_size, num_experts, top_k, architecture: of the model's variants.
        num_multiprocessors: of the GPU; None for one that holds all blocks of a launch, as those with 128 and more do.
    """
    most = 0
    for config in variants(hidden_size, num_experts, top_k, architecture):
        held = config.num_blocks if num_multiprocessors is None else num_multiprocessors * config.blocks_per_sm
        if held < min(config.num_blocks, config.token_tile):
            return max(most, held)
        most = config.token_tile
    return most


def too_large(hidden_size: int, num_experts: int, top_k: int, architecture: str) -> str | None:
    """Why not even the smallest variant fits an architecture, or None."""
    if max_tokens(hidden_size, num_experts, top_k, architecture):
        return None
    try:
        DecodeConfig(hidden_size, num_experts, top_k, TOKEN_TILES[0]).check(architecture)
    except ValueError as error:
        return str(error)
    return None


def _fits(config: DecodeConfig, architecture: str) -> bool:
    try:
        config.check(architecture)
    except ValueError:
        return False
    return True


_TOKEN_TILE = tuple(next(tile for tile in TOKEN_TILES if rows <= tile) for rows in range(TOKEN_TILES[-1] + 1))


def token_tile(num_tokens: int) -> int:
    """The smallest token tile for N rows, N from 1 to ``TOKEN_TILES[-1]``."""
    return _TOKEN_TILE[num_tokens]
