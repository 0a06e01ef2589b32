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
from dsv4_router.decode_config import ARCHITECTURES, TOKEN_TILES, DecodeConfig, max_tokens, too_large, variants

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

    expert_tile: int
    num_expert_tiles: int
    chunks_per_slice: int
    num_slices: int
    num_blocks: int
    num_threads: int
    selection_bytes: int
    barrier_bytes: int


# expert_tile: E / 8, up to a multiple of 16; slices: H / 64 chunks, at most 16 slices of as many chunks each;
# threads: 4 quarters x expert_tile / 16 warps, and the producer warp;
# selection: 16 bytes a worker thread, 8 a candidate (k of every 32 experts), 128 for 16 winners;
# barriers: two of 8 bytes a chunk.
CUTS = {
    # 256 / 8 = 32; 4096 / 64 = 64 chunks = 16 x 4; (4 x 2 + 1) x 32; 16 x 256 + 8 x (8 x 6) + 128; 16 x 4
    "v4-flash": Cut(32, 8, 4, 16, 128, 288, 4608, 64),
    # 384 / 8 = 48; 7168 / 64 = 112 chunks = 16 x 7; (4 x 3 + 1) x 32; 16 x 384 + 8 x (12 x 6) + 128; 16 x 7
    "v4-pro": Cut(48, 8, 7, 16, 128, 416, 6848, 112),
    # 384 / 8 = 48; 5120 / 64 = 80 chunks = 16 x 5; (4 x 3 + 1) x 32; 16 x 384 + 8 x (12 x 6) + 128; 16 x 5
    "v4.1-flash": Cut(48, 8, 5, 16, 128, 416, 6848, 80),
    # 128 / 8 = 16; 5120 / 64 = 80 chunks = 16 x 5; (4 x 1 + 1) x 32; 16 x 128 + 8 x (4 x 3) + 128; 16 x 5
    "v4.1-flash-draft": Cut(16, 8, 5, 16, 128, 160, 2272, 80),
}


class Variant(NamedTuple):
    """What depends on the token tile."""

    operand_bytes: int
    partial_bytes: int
    partials_share_operands: bool
    shared_bytes: int
    blocks_per_sm: int
    registers_per_thread: int
    workspace_bytes: int


# For a tile of T rows:
# operands: chunks x 128 bytes x (expert_tile + T); partial sums: 4 quarters x T x (expert_tile + 8) x 4 bytes, over the
# operands if else both and the selection exceed 232448 / 2 = 116224; shared: 1024 + operands + partial sums (or the
# larger of them) + selection and barriers + 16, each up to a multiple of 128; two blocks of an SM: 2 x (shared + 1024)
# <= 233472, and registers for both: 65536 / 4 a partition / threads of its warps, down to a multiple of 8, at least 72
# and 32 + T / 2 + 8; workspace: 2048 + T x 16 slices x E / 2 packets x 16 bytes.
VARIANTS = {
    # 512 (32 + T); 640 T; + 1024 + 4608 + 128; 2 x 9 warps: 5 a partition, 16384 / 160 = 102; 9: 3, 16384 / 96 = 170
    "v4-flash": {
        16: Variant(24576, 10240, False, 40576, 2, 96, 526336),
        32: Variant(32768, 20480, False, 59008, 2, 96, 1050624),
        64: Variant(49152, 40960, False, 95872, 2, 96, 2099200),
        128: Variant(81920, 81920, True, 87680, 1, 168, 4196352),  # 104 registers needed: not two
    },
    # 896 (48 + T); 896 T; + 1024 + 6912 + 128; 2 x 13 warps: 7 a partition, 16384 / 224 = 73; 13: 4, 16384 / 128 = 128
    "v4-pro": {
        16: Variant(57344, 14336, False, 79744, 2, 72, 788480),
        32: Variant(71680, 28672, False, 108416, 2, 72, 1574912),
        64: Variant(100352, 57344, True, 108416, 2, 72, 3147776),
        128: Variant(157696, 114688, True, 165760, 1, 128, 6293504),
    },
    # 640 (48 + T); 896 T; + 1024 + 6912 + 128; as above
    "v4.1-flash": {
        16: Variant(40960, 14336, False, 63360, 2, 72, 788480),
        32: Variant(51200, 28672, False, 87936, 2, 72, 1574912),
        64: Variant(71680, 57344, True, 79744, 2, 72, 3147776),
        128: Variant(112640, 114688, True, 122752, 1, 128, 6293504),
    },
    # 640 (16 + T); 384 T; + 1024 + 2304 + 128; 2 x 5 warps: 3 a partition, 16384 / 96 = 170
    "v4.1-flash-draft": {
        16: Variant(20480, 6144, False, 30080, 2, 168, 264192),
        32: Variant(30720, 12288, False, 46464, 2, 168, 526336),
        64: Variant(51200, 24576, False, 79232, 2, 168, 1050624),
        128: Variant(92160, 49152, True, 95616, 2, 168, 2099200),
    },
}


@pytest.mark.parametrize("tile", TOKEN_TILES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_models_variants(name: str, tile: int) -> None:
    config = DecodeConfig(*sizes_of(PRESETS[name]), tile)
    assert Cut(*(getattr(config, field) for field in Cut._fields)) == CUTS[name]
    assert Variant(*(getattr(config, field) for field in Variant._fields)) == VARIANTS[name][tile]
    for architecture in ("sm_90a", "sm_100a", "sm_103a"):
        config.check(architecture)


@pytest.mark.parametrize(
    ("model", "smaller"),
    # At most 101376 bytes a block on sm_120a; see VARIANTS.
    [(V4_FLASH, 128), (V4_PRO, 16), (V4_1_FLASH, 64), (V4_1_FLASH_DRAFT, 128)],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_fits_each_architecture(model: RouterConfig, smaller: int) -> None:
    for architecture in ARCHITECTURES:
        largest = smaller if architecture == "sm_120a" else 128
        expected = [DecodeConfig(*sizes_of(model), tile) for tile in TOKEN_TILES if tile <= largest]
        assert variants(*sizes_of(model), architecture) == expected
        assert max_tokens(*sizes_of(model), architecture) == largest
        assert too_large(*sizes_of(model), architecture) is None


def test_the_workspace_of_a_stream_serves_every_variant() -> None:
    """2048 + 128 rows x 16 slices x 256 pairs x 16 bytes; the contract allows 16 MiB."""
    assert decode_config.MAX_WORKSPACE_BYTES == 8390656 <= 16 << 20


def test_token_tiles_of_row_counts() -> None:
    tiles = {rows: decode_config.token_tile(rows) for rows in range(1, 129)}
    assert set(tiles.values()) == set(TOKEN_TILES) == {16, 32, 64, 128}
    for rows, tile in tiles.items():
        assert rows <= tile
        assert tile == 16 or rows > tile // 2, "a smaller tile would do"


# ---- every shape


@given(configs)
def test_every_column_of_k_is_in_one_chunk_of_one_slice(config: DecodeConfig) -> None:
    chunks = [
        slice_idx * config.chunks_per_slice + chunk
        for slice_idx in range(config.num_slices)
        for chunk in range(config.chunks_per_slice)
    ]
    assert len(set(chunks)) == len(chunks)
    assert set(range(config.hidden_size // 64)) <= set(chunks)
    last = range((config.num_slices - 1) * config.chunks_per_slice, config.hidden_size // 64)
    assert 1 <= len(last) <= config.chunks_per_slice, "a slice without a column"
    assert 9 <= config.num_slices <= 16, "the kernel adds two halves of several slices"


@given(configs)
def test_every_expert_is_in_one_tile_one_warp_and_one_packet(config: DecodeConfig) -> None:
    assert config.expert_tile % 16 == 0
    tiles = [set(range(t * config.expert_tile, (t + 1) * config.expert_tile)) for t in range(config.num_expert_tiles)]
    assert set(range(config.num_experts)) <= set().union(*tiles)
    assert all(tile & set(range(config.num_experts)) for tile in tiles), "a block without an expert"
    n_tiles = config.expert_tile // 16
    cells = {(warp % n_tiles, warp // n_tiles) for warp in range(config.num_worker_warps)}
    assert len(cells) == config.num_worker_warps
    assert cells == {(n_tile, quarter) for n_tile in range(n_tiles) for quarter in range(4)}
    assert config.packets_per_slice * 2 == len(tiles) * config.expert_tile >= config.num_experts


@given(configs)
def test_there_is_a_thread_for_each_part_of_the_selection(config: DecodeConfig) -> None:
    workers = config.num_worker_threads
    assert workers % 32 == 0
    assert workers >= config.padded_experts, "compute_row keeps a sum for each padded expert"
    assert config.num_experts % 2 == 0, "in collect a thread has two experts and half of the slices"
    assert workers >= 32 * config.num_expert_groups >= config.num_experts
    assert workers >= config.num_expert_groups * config.top_k
    assert config.num_threads == workers + 32 <= 1024


@given(configs)
def test_packets_do_not_overlap_and_stay_in_the_workspace(config: DecodeConfig) -> None:
    """As ``packet_address`` places them: [row][slice][pair]."""

    def place(row: int, slice_idx: int, pair: int) -> int:
        packet = row * config.packets_per_row + slice_idx * config.packets_per_slice + pair
        return decode_config.HEADER_BYTES + packet * decode_config.PACKET_BYTES

    last = config.token_tile - 1, config.num_slices - 1, config.packets_per_slice - 1
    assert place(0, 0, 0) == decode_config.HEADER_BYTES >= 8 * (config.num_blocks + 1)
    assert place(0, 0, last[2]) + 16 == place(0, 1, 0)
    assert place(0, last[1], last[2]) + 16 == place(1, 0, 0)
    assert place(*last) + 16 == config.workspace_bytes <= decode_config.MAX_WORKSPACE_BYTES <= 16 << 20


@given(hidden_sizes, expert_counts, top_ks, tiles, expert_counts, top_ks, tiles)
def test_the_cut_of_k_depends_on_the_hidden_size_alone(
    hidden_size: int, experts: int, k: int, tile: int, other_experts: int, other_k: int, other_tile: int
) -> None:
    """So the order of summation, and every bit, is the same for any number of tokens."""
    one = DecodeConfig(hidden_size, experts, k, tile)
    other = DecodeConfig(hidden_size, other_experts, other_k, other_tile)
    assert (one.chunks_per_slice, one.num_slices) == (other.chunks_per_slice, other.num_slices)


@given(hidden_sizes, expert_counts, top_ks, tiles, tiles)
def test_variants_of_a_model_share_everything_but_rows(
    hidden_size: int, num_experts: int, top_k: int, tile: int, other_tile: int
) -> None:
    """Launches of any variants may follow each other on one workspace: same blocks, counter and places of a row."""
    one, other = (DecodeConfig(hidden_size, num_experts, top_k, rows) for rows in (tile, other_tile))
    for name in ("num_blocks", "packets_per_row", "packets_per_slice", "num_threads", "expert_tile"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_variants_serve_all_row_counts(architecture: str) -> None:
    """At most 6 variants a model; 64 rows or more at once with 227 KiB of shared memory; no gap below the largest."""
    capacity = decode_config.SHARED_MEMORY[architecture]
    gaps = []
    for sizes in ALL_SIZES:
        found = [config.token_tile for config in variants(*sizes, architecture)]
        assert len(found) <= 6
        assert (too_large(*sizes, architecture) is None) == bool(found)
        assert max_tokens(*sizes, architecture) == max(found, default=0)
        if capacity == 232448:
            assert found[-1] >= 64, sizes
        if tuple(found) != TOKEN_TILES[: len(found)]:
            gaps.append((sizes, found))
    assert not gaps, f"{len(gaps)} models have no variant for some row counts below their largest, first {gaps[0]}"


@settings(max_examples=300)
@given(configs, st.sampled_from(ARCHITECTURES))
@example(DecodeConfig(5120, 384, 6, 128), "sm_90a")
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
    assert variants(*sizes, "sm_90a") == []
    assert max_tokens(*sizes, "sm_90a") == 0
    assert too_large(*sizes, "sm_90a") == why


@given(hidden_sizes, expert_counts, top_ks)
def test_shapes_that_it_serves(hidden_size: int, num_experts: int, top_k: int) -> None:
    assert decode_config.unsupported_shape(hidden_size, num_experts, top_k) is None
    DecodeConfig(hidden_size, num_experts, top_k, 16).check("sm_90a")


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "", "sm_121a"])
def test_unknown_architecture(architecture: str) -> None:
    with pytest.raises(ValueError, match=rf"^architecture: expected one of \('sm_90a', .*got '{architecture}'"):
        FLASH_16.check(architecture)


@pytest.mark.parametrize("tile", [0, -16, 8, 17, 48, 256])
def test_unknown_token_tile(tile: int) -> None:
    with pytest.raises(ValueError, match=rf"^token_tile: expected one of \(16, 32, 64, 128\), got {tile}$"):
        dataclasses.replace(FLASH_16, token_tile=tile).check()


def test_too_large_says_by_how_much() -> None:
    why = too_large(8192, 512, 16, "sm_120a")
    assert why is not None
    # 8 chunks x 128 x (64 + 16) = 81920; 4 x 16 x 72 x 4 = 18432; 16 x 512 + 8 x 256 + 128 = 10368; 16 x 8 = 128
    expected = (
        "1024 alignment + 81920 operands + 18432 partial sums + 10368 selection + 128 barriers = 112000 bytes > 101376"
    )
    assert why.endswith(f": shared memory: {expected} of sm_120a")


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
        "1024 alignment + 157696 operands + 114688 partial sums (over the operands) + 6848 selection + 112 barriers = "
        "165760 bytes > 101376 of sm_120a", "sm_120a",
    ),
    "registers": Refusal(
        DecodeConfig(4096, 512, 6, 128), {}, {}, "max(72, 72 for the MMA + 32) = 104 > 65536 for 544 threads = 96",
    ),
    "ticket counters": Refusal(FLASH_16, {"HEADER_BYTES": 1024}, {}, "8 x (128 + 1) bytes > 1024"),
    "tag": Refusal(FLASH_16, {"NUM_BLOCKS_BITS": 7}, {}, "128 blocks do not fit into 7 bits"),
    "threads": Refusal(
        DecodeConfig(1024, 256, 6, 16), {"TARGET_EXPERT_TILES": 1, "REGISTERS_PER_SM": 1 << 20}, {}, "2080 > 1024",
    ),
    "named barriers": Refusal(FLASH_16, {"HARDWARE_BARRIERS": 1}, {}, "1 + 1 > 1"),
    "K coverage": Refusal(
        FLASH_16, {}, {"num_slices": 15},
        "15 slices x 4 chunks x 64 = 3840 columns for 4096, 8 chunks in the last slice",
    ),
    "expert coverage": Refusal(FLASH_16, {}, {"num_expert_tiles": 7}, "7 tiles x 32 = 224 for 256"),
    "MMA coverage": Refusal(
        FLASH_16, {}, {"num_worker_warps": 6}, "6 warps x 16 experts = 96 != 4 quarters x 32 experts",
    ),
    "selection": Refusal(
        DecodeConfig(4096, 384, 6, 16), {"TARGET_EXPERT_TILES": 12}, {}, "256 threads < 384 experts",
    ),
    "merge": Refusal(
        DecodeConfig(4096, 256, 33, 16), {"MAX_TOP_K": 64}, {}, "256 threads < 8 groups x 33 candidates",
    ),
    "transaction count": Refusal(
        FLASH_16, {"MAX_TRANSACTION_BYTES": 4096}, {}, "4096 bytes on one barrier >= 4096",
    ),
    "workspace": Refusal(
        FLASH_16, {"MAX_WORKSPACE_BYTES": 526335}, {},
        "2048 + 16 rows x 2048 packets x 16 = 526336 bytes > 526335",
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
        ("K coverage", {"num_slices": 17}),  # the last one without a chunk
        ("expert coverage", {"num_expert_tiles": 9}),  # the last one without an expert
        ("MMA coverage", {"num_worker_warps": 12}),
    ],
)
def test_more_than_enough_is_refused_too(
    condition: str, properties: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(Refusal(FLASH_16, {}, properties, ""), monkeypatch)
    with pytest.raises(ValueError, match=rf": {condition}: "):
        FLASH_16.check()


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
    assert repr(FLASH_16) == "DecodeConfig(hidden_size=4096, num_experts=256, top_k=6, token_tile=16)"
