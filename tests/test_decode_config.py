# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The geometry of the decode kernel: the models' numbers by hand, what holds for every shape, and every refusal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_router import V4_1_FLASH, V4_1_FLASH_DRAFT, V4_FLASH, V4_PRO, RouterConfig, decode_config
from dsv4_router.config import PRESETS
from dsv4_router.decode_config import (
    ARCHITECTURES,
    TOKEN_TILES,
    WGMMA_ARCHITECTURES,
    DecodeConfig,
    max_tokens,
    too_large,
    variant,
    variants,
)

FLASH_16 = DecodeConfig(4096, 256, 6, 16)
# Every H; the fewest and the most experts of each expert tile (16, 32, 48, 64), and some between; the largest k.
ALL_SIZES = [
    (hidden_size, num_experts, 16)
    for hidden_size in range(1024, 8192 + 1, 64)
    for num_experts in (32, 100, 128, 132, 256, 260, 320, 384, 388, 452, 512)
]
hidden_sizes = st.integers(16, 128).map(lambda chunks: 64 * chunks)
expert_counts = st.integers(8, 128).map(lambda quads: 4 * quads)
top_ks = st.integers(1, 16)
tiles = st.sampled_from(TOKEN_TILES)
configs = st.builds(DecodeConfig, hidden_sizes, expert_counts, top_ks, tiles)


def sizes_of(config: RouterConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_experts, config.top_k


def fits(config: DecodeConfig, architecture: str = "sm_90a") -> bool:
    try:
        config.check(architecture)
    except ValueError:
        return False
    return True


# ---- the published models


class Cut(NamedTuple):
    """What does not depend on the token tile."""

    chunks_per_slice: int
    num_slices: int
    half_pairs: int
    num_blocks: int
    num_threads: int
    group_lanes: int
    num_groups: int
    selection_bytes: int


# slices: H / 64 chunks, at most 16 slices of as many chunks each; threads: one an expert, at least 9 warps: 8 that
# multiply and the producer; groups: E / 32; selection: 20 bytes a thread, 4 x 32 of groups, 128 for 16 winners, 16.
CUTS = {
    "v4-flash": Cut(4, 16, 4, 128, 288, 32, 8, 6032),  # 4096 / 64 = 64 chunks = 16 x 4; 20 x 288 + 272
    "v4-pro": Cut(7, 16, 4, 128, 384, 32, 12, 7952),  # 7168 / 64 = 112 chunks = 16 x 7; 20 x 384 + 272
    "v4.1-flash": Cut(5, 16, 4, 128, 384, 32, 12, 7952),  # 5120 / 64 = 80 chunks = 16 x 5; 20 x 384 + 272
    "v4.1-flash-draft": Cut(5, 16, 4, 128, 288, 32, 4, 6032),  # 5120 / 64 = 80 chunks = 16 x 5; 20 x 288 + 272
}


class Block(NamedTuple):
    """What depends on the slices of a block."""

    expert_tile: int
    num_expert_tiles: int
    num_parts: int
    chunks_per_block: int
    packets_per_row: int


# Of one slice a block has E / 8 experts, up to a multiple of 16. Two slices: half the experts; twice the blocks along
# E, half of them along K, and half the packets.
BLOCKS = {
    "v4-flash": {1: Block(32, 8, 16, 4, 16 * 128), 2: Block(16, 16, 8, 8, 8 * 128)},
    "v4-pro": {1: Block(48, 8, 16, 7, 16 * 192), 2: Block(24, 16, 8, 14, 8 * 192)},
    "v4.1-flash": {1: Block(48, 8, 16, 5, 16 * 192), 2: Block(24, 16, 8, 10, 8 * 192)},
    "v4.1-flash-draft": {1: Block(16, 8, 16, 5, 16 * 64), 2: Block(8, 16, 8, 10, 8 * 64)},
}


class Variant(NamedTuple):
    """What depends on the token tile."""

    slices_per_block: int
    warp_m_tiles: int
    gate_fragments: int
    operand_bytes: int
    partial_bytes: int
    partials_share_operands: bool
    barrier_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    registers_per_thread: int
    workspace_bytes: int


# For a tile of T rows and blocks of c chunks and e experts:
# slices: two of as many chunks as rows x 256 x chunks_per_slice <= 32768 allows; row tiles of a warp: T / 16, of one
# slice half of them; steps of gate fragments: e / 4 registers each, 36 in all at 16 rows, 24 with more, and with 8 rows
# 4 registers for each 16 experts or fewer, 48 in all; but no more than a slice has chunks;
# operands: 128 c (e + T), of 8 rows 128 c e + 8 (128 c + 16), which is more; partial sums: slices x 16 T pitches, a
# pitch being e + 4 with 8 rows, else e, or e + 8 where that makes an odd multiple of 8, over the operands if there is
# one slice and else both and the selection exceed 232448 / 2 = 116224; barriers: 8 for each slice of the gate tile, 8
# for the hidden states, or for each chunk of them from 32 rows; shared: 1024 + operands + partial sums (or the larger
# of them) + selection and barriers + 16, each up to a multiple of 128; registers needed: 14, 4 for a row tile and 8
# experts (with 8 rows for 16 experts), the gate fragments', 4 for a fragment of hidden states (with 8 rows 2), 4 of
# those up to 16 rows, else 2; at least 72; two blocks of an SM: 2 x (shared + 1024) <= 233472, and registers for both:
# 65536 / 4 a partition / threads of its warps, down to a multiple of 8; workspace: 2048 + T x packets x 16.
VARIANTS = {
    # chunks_per_slice 4: two slices up to 32 rows. 1024 (16 + T) and 768 T, of 8 rows 16384 + 8 x 1040 and 512 x 20;
    # 512 (32 + T) and 640 T;
    # + 1024 + 6144 + 128; 2 x 9 warps: 5 a partition, 16384 / 160 = 102; 9: 3, 16384 / 96 = 170
    "v4-flash": {
        8: Variant(2, 1, 4, 24704, 5120, False, 24, 37120, 2, 96, 133120),
        16: Variant(2, 1, 4, 32768, 12288, False, 24, 52352, 2, 96, 264192),
        32: Variant(2, 2, 4, 49152, 24576, False, 80, 81024, 2, 96, 526336),
        64: Variant(1, 2, 3, 49152, 40960, False, 40, 97408, 2, 96, 2099200),  # 14 + 32 + 24 + 8 = 78 registers
        96: Variant(1, 3, 3, 65536, 61440, True, 40, 72832, 2, 96, 3147776),  # 14 + 48 + 24 + 8 = 94
        128: Variant(1, 4, 3, 81920, 81920, True, 40, 89216, 1, 168, 4196352),  # 14 + 64 + 24 + 8 = 110: not two
    },
    # chunks_per_slice 7: up to 18 rows. 1792 (24 + T) and 768 T, of 8 rows 43008 + 8 x 1808 and 512 x 28;
    # 896 (48 + T) and 896 T; + 1024 + 8064 + 128;
    # 2 x 12 warps: 6 a partition, 16384 / 192 = 85; 12: 3, 16384 / 96 = 170
    "v4-pro": {
        8: Variant(2, 1, 6, 57472, 7168, False, 24, 73856, 2, 80, 198656),  # 14 + 8 + 48 + 8 = 78
        16: Variant(2, 1, 6, 71680, 12288, False, 24, 93184, 2, 80, 395264),
        32: Variant(1, 1, 2, 71680, 28672, False, 64, 109568, 2, 80, 1574912),  # 14 + 24 + 24 + 8 = 70
        64: Variant(1, 2, 2, 100352, 57344, True, 64, 109568, 1, 168, 3147776),  # 14 + 48 + 24 + 8 = 94: not two
        96: Variant(1, 3, 2, 129024, 86016, True, 64, 138240, 1, 168, 4720640),
        128: Variant(1, 4, 2, 157696, 114688, True, 64, 166912, 1, 168, 6293504),
    },
    # chunks_per_slice 5: up to 25 rows. 1280 (24 + T) and 768 T, of 8 rows 30720 + 8 x 1296; 640 (48 + T) and 896 T;
    # as above
    "v4.1-flash": {
        8: Variant(2, 1, 5, 41088, 7168, False, 24, 57472, 2, 80, 198656),
        16: Variant(2, 1, 5, 51200, 12288, False, 24, 72704, 2, 80, 395264),
        32: Variant(1, 1, 2, 51200, 28672, False, 48, 89088, 2, 80, 1574912),
        64: Variant(1, 2, 2, 71680, 57344, True, 48, 80896, 1, 168, 3147776),
        96: Variant(1, 3, 2, 92160, 86016, True, 48, 101376, 1, 168, 4720640),
        128: Variant(1, 4, 2, 112640, 114688, True, 48, 123904, 1, 168, 6293504),
    },
    # chunks_per_slice 5: up to 25 rows. 1280 (8 + T) and 256 T, of 8 rows 10240 + 8 x 1296 and 512 x 12;
    # 640 (16 + T) and 384 T; + 1024 + 6144 + 128;
    # 2 x 9 warps: 5 a partition, 16384 / 160 = 102
    "v4.1-flash-draft": {
        8: Variant(2, 1, 5, 20608, 3072, False, 24, 30976, 2, 96, 67584),
        16: Variant(2, 1, 5, 30720, 4096, False, 24, 42112, 2, 96, 133120),
        32: Variant(1, 1, 5, 30720, 12288, False, 48, 50304, 2, 96, 526336),
        64: Variant(1, 2, 5, 51200, 24576, False, 48, 83072, 2, 96, 1050624),
        96: Variant(1, 3, 5, 71680, 36864, True, 48, 78976, 2, 96, 1574912),
        128: Variant(1, 4, 5, 92160, 49152, True, 48, 99456, 2, 96, 2099200),
    },
}


@pytest.mark.parametrize("tile", TOKEN_TILES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_models_variants(name: str, tile: int) -> None:
    config = DecodeConfig(*sizes_of(PRESETS[name]), tile)
    expected = VARIANTS[name][tile]
    assert Cut(*(getattr(config, field) for field in Cut._fields)) == CUTS[name]
    assert Variant(*(getattr(config, field) for field in Variant._fields)) == expected
    assert Block(*(getattr(config, field) for field in Block._fields)) == BLOCKS[name][expected.slices_per_block]
    for architecture in ("sm_90a", "sm_100a", "sm_103a"):
        config.check(architecture)


class Warpgroups(NamedTuple):
    """What is another where warpgroups multiply."""

    warpgroup_warps: int
    hidden_rows: int
    operand_bytes: int
    partial_bytes: int
    padding_bytes: int
    shared_bytes: int
    needed_registers: int
    registers_per_thread: int
    first_look_after_cycles: int


# Warps: 4 for each 64 rows. Operands: 128 c (e + T), T at least 64; partial sums: 16 rows' instead of T; padding: what
# operands and selection lack of 115713, up to a multiple of 128; so shared memory is at least 1024 + (115713 up to a
# multiple of 128) + 128 for barriers. Registers: 14 + 4 x 64 e / 128, of one block.
WARPGROUPS = {
    "v4-flash": {
        64: Warpgroups(4, 64, 49152, 10240, 60544, 116992, 78, 168, 560),
        96: Warpgroups(8, 96, 65536, 10240, 44160, 116992, 78, 168, 560),
        128: Warpgroups(8, 128, 81920, 10240, 27776, 116992, 78, 168, 560),
    },
    "v4-pro": {
        32: Warpgroups(4, 64, 100352, 14336, 7424, 116992, 110, 168, 320),
        64: Warpgroups(4, 64, 100352, 14336, 7424, 116992, 110, 168, 560),
        96: Warpgroups(8, 96, 129024, 14336, 0, 138240, 110, 168, 560),
        128: Warpgroups(8, 128, 157696, 14336, 0, 166912, 110, 168, 560),
    },
    "v4.1-flash": {
        32: Warpgroups(4, 64, 71680, 14336, 36096, 116992, 110, 168, 320),
        64: Warpgroups(4, 64, 71680, 14336, 36096, 116992, 110, 168, 560),
        96: Warpgroups(8, 96, 92160, 14336, 15616, 116992, 110, 168, 560),
        128: Warpgroups(8, 128, 112640, 14336, 0, 121856, 110, 168, 560),
    },
    "v4.1-flash-draft": {
        64: Warpgroups(4, 64, 51200, 6144, 58496, 116992, 72, 168, 560),
        96: Warpgroups(8, 96, 71680, 6144, 38016, 116992, 72, 168, 560),
        128: Warpgroups(8, 128, 92160, 6144, 17536, 116992, 72, 168, 560),
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_models_warpgroups(name: str, architecture: str) -> None:
    found = {}
    for config in variants(*sizes_of(PRESETS[name]), architecture):
        if config.warpgroup_mma:
            found[config.token_tile] = Warpgroups(*(getattr(config, field) for field in Warpgroups._fields))
            assert config.slices_per_block == config.blocks_per_sm == 1
            assert config.partials_share_operands
    assert found == (WARPGROUPS[name] if architecture == "sm_90a" else {})


@pytest.mark.parametrize(
    ("model", "smaller"),
    # At most 101376 bytes a block on sm_120a; see VARIANTS.
    [(V4_FLASH, 128), (V4_PRO, 16), (V4_1_FLASH, 96), (V4_1_FLASH_DRAFT, 128)],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_fits_each_architecture(model: RouterConfig, smaller: int) -> None:
    for architecture in ARCHITECTURES:
        largest = smaller if architecture == "sm_120a" else 128
        expected = tuple(variant(*sizes_of(model), tile, architecture) for tile in TOKEN_TILES if tile <= largest)
        assert variants(*sizes_of(model), architecture) == expected
        assert max_tokens(*sizes_of(model), architecture) == largest
        assert too_large(*sizes_of(model), architecture) is None


def test_the_workspace_of_a_stream_serves_every_variant() -> None:
    """2048 + 128 rows x 16 slices x 256 pairs x 16 bytes; the contract allows 16 MiB."""
    assert decode_config.MAX_WORKSPACE_BYTES == 8390656 <= 16 << 20


def test_token_tiles_of_row_counts() -> None:
    tiles = {rows: decode_config.token_tile(rows) for rows in range(1, 129)}
    assert set(tiles.values()) == set(TOKEN_TILES) == {8, 16, 32, 64, 96, 128}
    for rows, tile in tiles.items():
        assert tile == min(enough for enough in TOKEN_TILES if rows <= enough)


# ---- every shape


@given(configs)
def test_every_column_of_k_is_in_one_step_of_one_part(config: DecodeConfig) -> None:
    steps, chunks, slices = config.steps, config.chunks_per_slice, config.slices_per_block
    parts = range(config.num_parts)
    assert sorted(steps) == list(range(config.chunks_per_block))
    multiplied = [part * config.chunks_per_block + step for part in parts for step in steps]
    assert sorted(multiplied) == list(range(config.covered_columns // 64))
    assert set(range(config.hidden_size // 64)) <= set(multiplied)
    assert [step // chunks for step in steps] == list(range(slices)) * chunks, "slices take turns"
    for s in range(slices):
        assert [step for step in steps if step // chunks == s] == list(range(s * chunks, (s + 1) * chunks))
    pairs = [range(2 * chunks * pair, min(2 * chunks * (pair + 1), config.hidden_size // 64)) for pair in range(8)]
    assert sum(map(bool, pairs)) == config.num_slices // 2, "pairs of slices without a column"
    assert config.num_slices in (10, 12, 14, 16), "the kernel adds two halves of several pairs"
    assert slices * config.num_parts == config.num_slices


@given(configs)
def test_stages_and_fragments_divide_the_chunks(config: DecodeConfig) -> None:
    stages, chunks = config.hidden_stages, config.chunks_per_block
    assert chunks % stages == 0, "every stage has as many bytes"
    stage_of_step = [step * stages // chunks for step in range(chunks)]
    assert stage_of_step == sorted(stage_of_step)
    assert set(stage_of_step) == set(range(stages))
    assert stage_of_step == [0] * chunks if config.token_tile <= 16 else stage_of_step == list(range(chunks))
    assert config.barrier_bytes == 8 * config.slices_per_block + 8 * stages
    assert 1 <= config.gate_fragments <= config.chunks_per_slice
    a_step = -(-config.expert_tile // 16) * 4 if config.token_tile == 8 else config.expert_tile // 4
    assert config.gate_fragments * a_step <= {8: 48, 16: 36}.get(config.token_tile, 24)


@given(hidden_sizes, expert_counts, top_ks)
def test_tiles_of_few_rows_have_two_slices(hidden_size: int, num_experts: int, top_k: int) -> None:
    found = [DecodeConfig(hidden_size, num_experts, top_k, tile) for tile in TOKEN_TILES]
    slices = [config.slices_per_block for config in found]
    assert slices == [2 if config.token_tile * config.chunks_per_slice <= 128 else 1 for config in found]
    assert slices[:2] == [2, 2]
    assert [config.experts_are_rows for config in found] == [True, *[False] * 5]
    assert [config.max_row_copies for config in found] == [4, *[0] * 5]
    for config in found:
        assert config.slices_per_block == 1 or not config.partials_share_operands, "it would bring no second block"
        assert config.slices_per_block * config.expert_tile == found[0].expert_tile * 2


@given(hidden_sizes, expert_counts, top_ks)
def test_rows_that_are_copied_one_by_one(hidden_size: int, num_experts: int, top_k: int) -> None:
    """Copies need 16 bytes; a fragment's 8 rows x 4 pairs of columns are read from 32 banks."""
    config = DecodeConfig(hidden_size, num_experts, top_k, 8)
    assert config.max_row_copies
    assert config.hidden_pitch * 2 % 16 == 0
    assert config.hidden_pitch >= config.chunks_per_block * 64
    assert len({(row * config.hidden_pitch // 2 + pair) % 32 for row in range(8) for pair in range(4)}) == 32
    gate = config.chunks_per_block * config.expert_tile * 128
    assert gate % 1024 == 0, "the rows begin at a multiple of 1024 bytes, as their allocation asks"
    assert config.operand_bytes == gate + 8 * config.hidden_pitch * 2
    for part in range(config.num_parts):
        assert hidden_size - part * config.chunks_per_block * 64 > 0, "a block without a column"


@given(hidden_sizes, expert_counts, top_ks)
def test_the_usher_has_no_other_role(hidden_size: int, num_experts: int, top_k: int) -> None:
    """It waits for the previous kernel later than the others, so it must not be one that then requests rows."""
    few, *more = (DecodeConfig(hidden_size, num_experts, top_k, tile) for tile in TOKEN_TILES)
    assert few.has_usher == (few.padded_experts > 288)
    assert not few.has_usher or few.num_warps - 1 > decode_config.MMA_WARPS >= few.max_row_copies
    assert not any(config.has_usher for config in more)


@given(configs)
def test_every_expert_is_in_one_tile_and_one_packet(config: DecodeConfig) -> None:
    assert config.expert_tile % 8 == 0
    tiles = [set(range(t * config.expert_tile, (t + 1) * config.expert_tile)) for t in range(config.num_expert_tiles)]
    assert set(range(config.num_experts)) <= set().union(*tiles)
    assert all(tile & set(range(config.num_experts)) for tile in tiles), "a block without an expert"
    assert config.packets_per_part * 2 == len(tiles) * config.expert_tile >= config.num_experts


@given(configs)
def test_every_row_and_quarter_is_one_warps(config: DecodeConfig) -> None:
    """As ``_cell`` deals them out to 8 warps."""
    assert decode_config.MMA_WARPS == 8
    cells = []
    for warp in range(8):
        quarter, group = warp % 4, warp // 4
        s, first = (group, 0) if config.slices_per_block == 2 else (0, group * config.warp_m_tiles)
        cells += [(s, quarter, first + m) for m in range(config.warp_m_tiles)]
    row_tiles = max(1, config.token_tile // 16)
    assert sorted(cells) == [
        (s, quarter, m) for s in range(config.slices_per_block) for quarter in range(4) for m in range(row_tiles)
    ]


@given(configs)
def test_partial_sums_fall_on_different_banks(config: DecodeConfig) -> None:
    """Half a warp stores two sums of each of 4 rows and 4 pairs of columns at once, or a warp every other of 8 rows."""
    assert config.partial_pitch >= config.expert_tile
    assert config.partial_pitch % 2 == 0, "sums of two experts are read at once"
    if config.token_tile == 8:
        places = [row * config.partial_pitch + expert for row in range(0, 8, 2) for expert in range(8)]
    else:
        places = [row * config.partial_pitch + 2 * pair + v for row in range(4) for pair in range(4) for v in range(2)]
    assert len({place % 32 for place in places}) == 32


@given(configs)
def test_there_is_a_thread_for_each_part_of_the_selection(config: DecodeConfig) -> None:
    threads = config.num_threads
    assert threads == 32 * config.num_warps <= 1024
    assert config.num_warps > decode_config.MMA_WARPS, "the producer does not multiply"
    assert threads >= config.padded_experts, "compute_row keeps a sum for each padded expert"
    assert threads >= config.expert_tile // 2
    assert config.num_experts % 2 == 0, "in collect two neighbours have two experts, and half of the parts each"


@given(configs)
def test_groups_bound_the_kth_best(config: DecodeConfig) -> None:
    """No fewer than k of them, or their k-th best would not exist; a warp's lanes hold whole groups."""
    lanes, groups = config.group_lanes, config.num_groups
    assert 32 % lanes == 0
    assert config.top_k <= groups <= 32
    members = [range(g * lanes, min((g + 1) * lanes, config.num_experts)) for g in range(groups)]
    assert [expert for group in members for expert in group] == list(range(config.num_experts))
    assert all(members)
    assert lanes == 32 or -(-config.num_experts // (2 * lanes)) < config.top_k, "larger groups would do"


@given(configs)
def test_packets_do_not_overlap_and_stay_in_the_workspace(config: DecodeConfig) -> None:
    """As ``packet_address`` places them: [row][part][pair]."""

    def place(row: int, part: int, pair: int) -> int:
        packet = row * config.packets_per_row + part * config.packets_per_part + pair
        return decode_config.HEADER_BYTES + packet * decode_config.PACKET_BYTES

    pairs = range(config.packets_per_part)
    written = [tile * (config.expert_tile // 2) for tile in range(config.num_expert_tiles)]
    written = [first + pair for first in written for pair in range(config.expert_tile // 2)]
    assert written == list(pairs), "every block along E has pairs of its own"
    last = config.token_tile - 1, config.num_parts - 1, pairs[-1]
    assert place(0, 0, 0) == decode_config.HEADER_BYTES >= 8 * (config.num_blocks + 1)
    assert place(0, 0, last[2]) + 16 == place(0, 1, 0)
    assert place(0, last[1], last[2]) + 16 == place(1, 0, 0)
    assert place(*last) + 16 == config.workspace_bytes <= decode_config.MAX_WORKSPACE_BYTES <= 16 << 20


@given(configs, configs)
def test_a_packet_of_any_variant_has_its_tag_where_the_others_look(config: DecodeConfig, other: DecodeConfig) -> None:
    """Variants cut a workspace differently. Of one number of blocks they share a counter, so no two launches a tag."""
    assert decode_config.HEADER_BYTES % 16 == 0
    assert (config.workspace_bytes - other.workspace_bytes) % decode_config.PACKET_BYTES == 0
    assert 1 <= config.num_blocks < 1 << decode_config.NUM_BLOCKS_BITS
    assert 8 * config.num_blocks + 8 <= decode_config.HEADER_BYTES


# ---- the canonical order of a logit

# The columns of a sum: a run of 16-column blocks that one accumulator takes, or the two sums that are added.
Tree = tuple["Tree", "Tree"] | tuple[int, ...] | None


def slice_tree(config: DecodeConfig, part: int, s: int) -> Tree:
    """What ``mma`` and ``add_partials`` add up: quarter j of a chunk is the block ``4 x chunk + j`` of 16 columns."""
    chunks = [part * config.chunks_per_block + step for step in config.steps if step // config.chunks_per_slice == s]
    q = [tuple(4 * chunk + quarter for chunk in chunks) for quarter in range(4)]
    return (q[0], q[1]), (q[2], q[3])


def part_tree(config: DecodeConfig, part: int) -> Tree:
    """A packet's sum, as ``add_partials`` makes it in ``epilogue`` and in ``compute_row``."""
    slices = [slice_tree(config, part, s) for s in range(config.slices_per_block)]
    return (slices[0], slices[1]) if len(slices) == 2 else slices[0]


def collected(config: DecodeConfig) -> Tree:
    """As ``collect`` adds a row's packets, and then its halves."""
    width = 2 // config.slices_per_block
    parts = config.half_pairs * width
    short = config.num_parts < 2 * parts
    halves: list[Tree] = []
    for half in range(2):
        looked_at = [half * parts + p - (width * half if short and p >= parts - width else 0) for p in range(parts)]
        assert max(looked_at) < config.num_parts
        values = [part_tree(config, part) for part in looked_at]
        two = values if width == 1 else [(values[p], values[p + 1]) for p in range(0, parts, 2)]
        total = two[0]
        for i in range(1, len(two)):
            if not (short and i == len(two) - 1 and half == 1):
                total = total, two[i]
        halves.append(total)
    return halves[0], halves[1]


def computed_alone(config: DecodeConfig) -> Tree:
    """As ``compute_row`` and ``add_part`` add them, part after part."""
    half_parts = config.half_pairs * 2 // config.slices_per_block
    halves: list[Tree] = [None, None]
    kept: Tree = None
    for part in range(config.num_parts):
        two = sums = part_tree(config, part)
        half = int(part >= half_parts)
        if config.slices_per_block == 1:
            two, kept = (kept, sums), sums
        if config.slices_per_block == 2 or part % 2 == 1:
            add = part - half * half_parts >= 2 // config.slices_per_block
            halves[half] = (halves[half], two) if add else two
    return halves[0], halves[1]


def canonical(hidden_size: int) -> Tree:
    """By the words of ``DecodeConfig``, from ``hidden_size`` alone."""
    chunks = -(-hidden_size // 64 // 16)
    num_pairs = -(-hidden_size // 64 // chunks)
    num_pairs = -(-num_pairs // 2)

    def slice_sum(s: int) -> Tree:
        q = [tuple(4 * chunk + j for chunk in range(s * chunks, (s + 1) * chunks)) for j in range(4)]
        return (q[0], q[1]), (q[2], q[3])

    p: list[Tree] = [(slice_sum(2 * i), slice_sum(2 * i + 1)) for i in range(num_pairs)]
    h = -(-num_pairs // 2)
    lower, upper = p[0], p[h]
    for each in p[1:h]:
        lower = lower, each
    for each in p[h + 1 :]:
        upper = upper, each
    return lower, upper


@given(hidden_sizes, expert_counts, top_ks)
@example(1024, 32, 1)
@example(1088, 132, 4)  # 17 chunks: 9 slices of 2, and a half and a whole slice of zeros
@example(1152, 132, 4)  # 9 slices of 2, and one of zeros
@example(2112, 144, 8)  # 11 slices of 3
@example(7168, 384, 6)
@example(8192, 512, 16)
def test_the_order_of_a_logit_depends_on_the_hidden_size_alone(hidden_size: int, num_experts: int, top_k: int) -> None:
    """So every bit is the same for any number of tokens, and for a row that its owner computes alone."""
    expected = canonical(hidden_size)
    for tile in TOKEN_TILES:
        config = DecodeConfig(hidden_size, num_experts, top_k, tile)
        assert collected(config) == expected
        assert computed_alone(config) == expected


def test_the_order_by_hand() -> None:
    """Of 1088 columns: 5 pairs of slices of 2 chunks, the lower half of three pairs; block 68 is the first past H."""

    def s(*first: int) -> Tree:
        return ((first, tuple(b + 1 for b in first)), (tuple(b + 2 for b in first), tuple(b + 3 for b in first)))

    p = [(s(16 * i, 16 * i + 4), s(16 * i + 8, 16 * i + 12)) for i in range(5)]
    expected = ((p[0], p[1]), p[2]), (p[3], p[4])
    assert canonical(1088) == expected
    assert collected(DecodeConfig(1088, 132, 4, 8)) == collected(DecodeConfig(1088, 132, 4, 128)) == expected
    assert {DecodeConfig(1088, 132, 4, tile).slices_per_block for tile in (8, 128)} == {1, 2}, "both ways were compared"


# ---- what fits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_variants_serve_all_row_counts(architecture: str) -> None:
    """At most 6 variants a model; 64 rows or more at once with 227 KiB of shared memory; no gap below the largest."""
    capacity = decode_config.SHARED_MEMORY[architecture]
    gaps = []
    for sizes in ALL_SIZES:
        found = [config.token_tile for config in variants(*sizes, architecture)]
        assert len(found) <= 6
        if sizes[1] in (32, 512):
            assert (too_large(*sizes, architecture) is None) == bool(found)
            assert max_tokens(*sizes, architecture) == max(found, default=0)
        if capacity == 232448:
            assert found[-1] >= 64, sizes
        if tuple(found) != TOKEN_TILES[: len(found)]:
            gaps.append((sizes, found))
    assert not gaps, f"{len(gaps)} models have no variant for some row counts below their largest, first {gaps[0]}"


@given(configs, st.sampled_from(ARCHITECTURES))
@example(DecodeConfig(7168, 384, 6, 32), "sm_90a")
@example(DecodeConfig(7168, 384, 6, 32), "sm_100a")
def test_warpgroups_multiply_wherever_they_can(config: DecodeConfig, architecture: str) -> None:
    by_warpgroups = dataclasses.replace(config, warpgroup_mma=True)
    found = variant(config.hidden_size, config.num_experts, config.top_k, config.token_tile, architecture)
    assert found == (by_warpgroups if fits(by_warpgroups, architecture) else config)
    assert architecture in WGMMA_ARCHITECTURES or not found.warpgroup_mma


@settings(max_examples=300)
@given(st.builds(dataclasses.replace, configs, warpgroup_mma=st.booleans()), st.sampled_from(ARCHITECTURES))
@example(DecodeConfig(5120, 384, 6, 128), "sm_90a")
@example(DecodeConfig(5120, 384, 6, 128, True), "sm_90a")
@example(DecodeConfig(8192, 512, 16, 128), "sm_120a")
def test_what_a_fitting_variant_may_use(config: DecodeConfig, architecture: str) -> None:
    if not fits(config, architecture):
        assert config not in variants(config.hidden_size, config.num_experts, config.top_k, architecture)
        return
    assert config.shared_bytes <= decode_config.SHARED_MEMORY[architecture]
    largest = max(config.operand_bytes, config.partial_bytes)
    operands = largest if config.partials_share_operands else config.operand_bytes + config.partial_bytes
    assert config.shared_bytes >= 1024 + operands + config.selection_bytes
    blocks = config.blocks_per_sm
    assert blocks in (1, 2)
    registers = config.registers_per_thread
    assert registers % 8 == 0 or registers == 255
    assert config.needed_registers <= registers <= 255
    # Every warp of the blocks on an SM goes to one of 4 partitions, each with a quarter of the registers.
    assert -(-blocks * config.num_threads // 128) * 32 * registers <= 16384
    assert blocks * (config.shared_bytes + 1024) <= 233472
    if config.warpgroup_mma:
        alone = max(config.operand_bytes, config.partial_bytes) + config.selection_bytes + config.padding_bytes
        assert 2 * (alone + 1024) > 233472, "nothing keeps a second block off the SM"


# ---- what is refused


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((960, 256, 6), "hidden_size from 1024 to 8192, a multiple of 64, got 960"),
        ((8256, 256, 6), "hidden_size from 1024 to 8192, a multiple of 64, got 8256"),
        ((4128, 256, 6), "hidden_size from 1024 to 8192, a multiple of 64, got 4128"),
        ((4096, 28, 6), "num_experts from 32 to 512, a multiple of 4, got 28"),
        ((4096, 516, 6), "num_experts from 32 to 512, a multiple of 4, got 516"),
        ((4096, 255, 6), "num_experts from 32 to 512, a multiple of 4, got 255"),
        ((4096, 256, 0), "top_k from 1 to 16, got 0"),
        ((4096, 256, 17), "top_k from 1 to 16, got 17"),
    ],
)
def test_shapes_that_the_kernel_does_not_serve(sizes: tuple[int, int, int], words: str) -> None:
    why = decode_config.unsupported_shape(*sizes)
    assert why == f"the one-launch kernel needs {words}"
    with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
        DecodeConfig(*sizes, 16).check()
    assert variants(*sizes, "sm_90a") == ()
    assert max_tokens(*sizes, "sm_90a") == 0
    assert too_large(*sizes, "sm_90a") == why


@given(hidden_sizes, expert_counts, top_ks, st.sampled_from([8, 16, 32, 64]))
def test_shapes_that_it_serves(hidden_size: int, num_experts: int, top_k: int, tile: int) -> None:
    assert decode_config.unsupported_shape(hidden_size, num_experts, top_k) is None
    DecodeConfig(hidden_size, num_experts, top_k, tile).check("sm_90a")


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "", "sm_121a"])
def test_unknown_architecture(architecture: str) -> None:
    with pytest.raises(ValueError, match=rf"^architecture: expected one of \('sm_90a', .*got '{architecture}'"):
        FLASH_16.check(architecture)


@pytest.mark.parametrize("tile", [0, -16, 4, 12, 17, 48, 256])
def test_unknown_token_tile(tile: int) -> None:
    with pytest.raises(ValueError, match=rf"^token_tile: expected one of \(8, 16, 32, 64, 96, 128\), got {tile}$"):
        dataclasses.replace(FLASH_16, token_tile=tile).check()


def test_too_large_says_by_how_much() -> None:
    why = too_large(8192, 512, 16, "sm_120a")
    assert why is not None
    # 16 chunks x 128 x 32 + 8 x (16 x 128 + 16) = 82048; 2 x 4 x 8 x 36 x 4 = 9216; 20 x 512 + 272 = 10512; 3 x 8 = 24
    expected = (
        "1024 alignment + 82048 operands + 9216 partial sums + 10512 selection + 24 barriers = 103040 bytes > 101376"
    )
    assert why.endswith(f": shared memory: {expected} of sm_120a")


@pytest.mark.parametrize("hidden_size", range(1024, 8193, 64))
def test_every_block_has_columns_of_rows_that_are_copied_one_by_one(hidden_size: int) -> None:
    """What the copies of rows and ``clear_missing_columns`` rely on: only the last part lacks columns, and not all."""
    config = DecodeConfig(hidden_size, 384, 6, 8)
    columns = config.chunks_per_block * decode_config.CHUNK
    missing = [(part + 1) * columns - hidden_size for part in range(config.num_parts)]
    assert all(number <= 0 for number in missing[:-1])
    assert 0 <= missing[-1] < columns


class Refusal(NamedTuple):
    """A variant, what is changed so that one condition of ``check`` fails, and the arithmetic that it tells."""

    config: DecodeConfig
    constants: dict[str, object]
    properties: dict[str, int]
    message: str
    architecture: str = "sm_90a"


# Some conditions hold for every shape that is served, by the formulas of the other fields: those formulas are changed.
REFUSALS = {
    "shared memory": Refusal(
        DecodeConfig(7168, 384, 6, 128), {}, {},
        "1024 alignment + 157696 operands + 114688 partial sums (over the operands) + 7952 selection + 64 barriers = "
        "166912 bytes > 101376 of sm_120a", "sm_120a",
    ),
    "registers": Refusal(
        DecodeConfig(4096, 512, 6, 128), {}, {}, "max(72, 152 for the MMA + 14) = 166 > 65536 for 512 threads = 128",
    ),
    "ticket counters": Refusal(FLASH_16, {"HEADER_BYTES": 1024}, {}, "8 x (128 + 1) bytes > 1024"),
    "tag": Refusal(FLASH_16, {"NUM_BLOCKS_BITS": 7}, {}, "128 blocks do not fit into 7 bits"),
    "threads": Refusal(FLASH_16, {"REGISTERS_PER_SM": 1 << 20}, {"num_warps": 33}, "1056 > 1024"),
    "K coverage": Refusal(
        FLASH_16, {}, {"num_slices": 14},
        "7 parts x 8 chunks x 64 = 3584 columns for 4096, in pairs of slices of 4 chunks",
    ),
    "expert coverage": Refusal(FLASH_16, {}, {"num_expert_tiles": 15}, "15 tiles x 16 = 240 for 256"),
    "MMA coverage": Refusal(
        DecodeConfig(4096, 256, 6, 64), {}, {"warp_m_tiles": 1},
        "8 warps x 1 row tiles = 8 != 1 slices x 4 quarters x 4 row tiles",
    ),
    "warpgroups": Refusal(
        DecodeConfig(4096, 256, 6, 64, True), {}, {}, "sm_100a, which is none of ('sm_90a',)", "sm_100a",
    ),
    "selection": Refusal(
        DecodeConfig(4096, 384, 6, 16), {}, {"num_warps": 9}, "288 threads < 384 padded experts",
    ),
    "producer": Refusal(FLASH_16, {}, {"num_warps": 8}, "none of 8 warps is left beside 8 that multiply"),
    "swizzle": Refusal(FLASH_16, {"SWIZZLE_ROWS": 32}, {}, "16 experts, not a multiple of 32"),
    "row requests": Refusal(
        DecodeConfig(4096, 32, 6, 8), {}, {"max_row_copies": 10}, "10 rows, each by a warp of its own, > 9 warps",
    ),
    "threshold": Refusal(
        DecodeConfig(4096, 256, 33, 16), {"MAX_TOP_K": 64}, {}, "64 groups of 4 experts for top_k = 33 and 32 lanes",
    ),
    "transaction count": Refusal(
        FLASH_16, {"MAX_TRANSACTION_BYTES": 16384}, {}, "16384 bytes on one barrier >= 16384",
    ),
    "workspace": Refusal(
        FLASH_16, {"MAX_WORKSPACE_BYTES": 264191}, {},
        "2048 + 16 rows x 1024 packets x 16 = 264192 bytes > 264191",
    ),
}  # fmt: skip


def apply(refusal: Refusal, patch: pytest.MonkeyPatch) -> None:
    for name, value in refusal.constants.items():
        assert hasattr(decode_config, name)
        patch.setattr(decode_config, name, value)
    for name, number in refusal.properties.items():
        assert isinstance(getattr(DecodeConfig, name), property)
        patch.setattr(DecodeConfig, name, property(lambda self, number=number: number))


@pytest.mark.parametrize("condition", REFUSALS)
def test_each_condition_is_checked(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = REFUSALS[condition]
    if refusal.constants or refusal.properties:
        dataclasses.replace(refusal.config, top_k=6).check(refusal.architecture)
    apply(refusal, monkeypatch)
    with pytest.raises(ValueError, match=condition) as caught:
        refusal.config.check(refusal.architecture)
    assert str(caught.value) == f"{refusal.config}: {condition}: {refusal.message}"
    assert not fits(refusal.config, refusal.architecture)


@pytest.mark.parametrize(
    ("condition", "properties"),
    [
        ("K coverage", {"num_slices": 17}),  # the last one without a block
        ("K coverage", {"num_slices": 18}),  # a pair without a column
        ("K coverage", {"slices_per_block": 3}),  # which do not divide them
        ("expert coverage", {"num_expert_tiles": 17}),  # the last one without an expert
        ("MMA coverage", {"slices_per_block": 1}),  # with one row tile, which has no half
        ("selection", {"num_warps": 9, "expert_tile": 80, "num_expert_tiles": 4}),  # threads for the experts alone
        ("threshold", {"group_lanes": 64}),  # 4 groups, of which there is no 6th best
    ],
)
def test_what_else_breaks_a_condition(
    condition: str, properties: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(Refusal(FLASH_16, {}, properties, ""), monkeypatch)
    with pytest.raises(ValueError, match=rf": {condition}: "):
        FLASH_16.check()


@pytest.mark.parametrize(
    ("config", "constants", "words"),
    [
        (DecodeConfig(7168, 384, 6, 16, True), {}, "16 rows x 24 experts < 1024 sums and 2 slices a block"),
        (DecodeConfig(5120, 128, 6, 32, True), {}, "32 rows x 16 experts < 1024 sums"),
        (DecodeConfig(2048, 512, 6, 64, True), {}, "2 slices a block"),
        (DecodeConfig(4096, 256, 6, 128, True), {"MMA_WARPS": 4}, "8 > 4 warps"),
    ],
)
def test_what_keeps_warpgroups_from_multiplying(
    config: DecodeConfig, constants: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(Refusal(config, constants, {}, ""), monkeypatch)
    with pytest.raises(ValueError, match=rf": warpgroups: {words}$"):
        config.check()


def test_every_condition_has_its_case() -> None:
    names = [text.partition(":")[0] for _, text in FLASH_16._conditions("sm_90a")]
    assert sorted(names) == sorted(REFUSALS)
    assert all(holds for holds, _ in FLASH_16._conditions("sm_90a"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: dataclasses.replace(config, hidden_size=8192, num_experts=512),
        lambda config: dataclasses.replace(config, token_tile=512),
    ],
)
def test_variants_that_do_not_fit_are_not_compiled(change: Callable[[DecodeConfig], DecodeConfig]) -> None:
    from dsv4_router.backends import decode

    config = change(FLASH_16)
    with pytest.raises(ValueError, match=r"shared memory|token_tile"):
        decode.compile_object(config, "sm_120a")


def test_a_variant_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLASH_16.token_tile = 32  # type: ignore[misc]
    assert hash(FLASH_16) == hash(DecodeConfig(4096, 256, 6, 16))
    sizes = "hidden_size=4096, num_experts=256, top_k=6, token_tile=16"
    assert repr(FLASH_16) == f"DecodeConfig({sizes}, warpgroup_mma=False)", (
        "of which a kernel's key in the cache is made"
    )
