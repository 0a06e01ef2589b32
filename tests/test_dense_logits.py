# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The kernel that makes logits of many rows: its geometry, and the instructions that it compiles into. Needs no GPU."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled_kernels import MOST_SECONDS, Compiled, compile_jobs
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4_router import decode_config, logits_config
from dsv4_router.backends import cublas, decode
from dsv4_router.config import PRESETS
from dsv4_router.decode_config import ARCHITECTURES, TOKEN_TILES, DecodeConfig
from dsv4_router.logits_config import CLUSTER, LogitsConfig, fastest, logits_configs
from dsv4_router.settings import CACHE_DIR_VARIABLE

hidden_sizes = st.integers(16, 128).map(lambda chunks: 64 * chunks)
expert_counts = st.integers(8, 128).map(lambda quads: 4 * quads)
V4_PRO, V4_FLASH = LogitsConfig(7168, 384, 96), LogitsConfig(4096, 256, 64)

# ---- the geometry


def configs_of(hidden_size: int, num_experts: int) -> tuple[LogitsConfig, ...]:
    return logits_configs(hidden_size, num_experts, "sm_90a")


SMALL_TILE = (64, 9, 24576, 0, 222352)  # 1024 + 9 x 24592
LARGE_TILE = (96, 4, 28672, 98304, 214080)  # 1024 + 98304 + 4 x 28688


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # A stage: (128 + tile) rows of 128 bytes. Sums in shared memory: 2 x 128 x tile x 4 bytes.
        ("v4-pro", {6: SMALL_TILE, 4: LARGE_TILE}),
        ("v4-flash", {4: SMALL_TILE}),
        ("v4.1-flash", {6: SMALL_TILE, 4: LARGE_TILE}),
        ("v4.1-flash-draft", {2: SMALL_TILE}),
    ],
)
def test_presets(name: str, expected: dict[int, tuple[int, ...]]) -> None:
    """By the number of tiles of experts: those, stages, their bytes and those of sums, and shared memory."""
    configs = configs_of(PRESETS[name].hidden_size, PRESETS[name].num_experts)
    assert {
        config.num_expert_tiles: (
            config.expert_tile,
            config.stages,
            config.stage_bytes,
            config.sums_bytes,
            config.shared_bytes,
        )
        for config in configs
    } == expected
    for config in configs:
        assert (config.num_pairs, config.order.half_pairs, config.num_threads) == (8, 4, 384)
        assert config.sums_in_shared == (config.expert_tile == 96)
        assert config.sum_registers == 192
        config.check("sm_90a")


def test_every_preset_is_pinned() -> None:
    (mark,) = (mark for mark in test_presets.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {row[0] for row in mark.args[1]} == PRESETS.keys()


@given(hidden_sizes, expert_counts)
@example(1024, 392)  # whose last tile of 56 is a whole one past E
def test_every_supported_shape_passes(hidden_size: int, num_experts: int) -> None:
    configs = configs_of(hidden_size, num_experts)
    assert [config.sums_in_shared for config in configs] in ([False], [False, True])
    for config in configs:
        config.check()
        config.check("sm_90a")
        # Experts: whole clusters, a tile that the MMA has, and no cluster that is all padding.
        assert config.num_expert_tiles % 2 == 0
        assert config.expert_tile % 8 == 0
        assert 8 <= config.expert_tile <= 96
        assert config.num_expert_tiles * config.expert_tile >= num_experts
        assert (config.num_expert_tiles - 2) * config.expert_tile < num_experts
        last = (config.num_expert_tiles - 1) * config.expert_tile
        exist = [last + expert < num_experts for expert in range(config.expert_tile)]
        assert config.tiles_are_whole == all(exist)
        # K.
        columns = 2 * config.num_pairs * config.order.chunks_per_slice * 64
        assert hidden_size <= columns < hidden_size + 2 * config.order.chunks_per_slice * 64
        # Parts: all pairs, four quarters, two halves, or one; their numbers tell which.
        assert 5 <= config.num_pairs <= 8
        assert config.parts == (config.num_pairs, 4, 2, 1)
        halves = config.order.half_pairs, config.num_pairs - config.order.half_pairs
        quarters = 1 + halves[0] // 2, 1 + halves[1] // 2  # one sum of the first, and each pair of the second
        assert [config.sums_of_halves(parts) for parts in config.parts] == [halves, quarters, (1, 1), (1, 0)]
        assert [config.num_sums(parts) for parts in config.parts] == [config.num_pairs, sum(quarters), 2, 1]
        assert [config.first_half(parts) for parts in config.parts] == [halves[0], quarters[0], None, None]
        assert 1 <= config.order.half_pairs < config.num_pairs
        assert config.order.half_pairs - (config.num_pairs - config.order.half_pairs) in (0, 1)
        # An SM.
        assert config.stages >= 2
        assert config.shared_bytes <= 227 * 1024 < config.shared_bytes + config.stage_bytes + 16
        assert config.num_threads == 384
        assert 128 * (240 + 240 + 24) <= 65536
        assert config.sum_registers + 40 <= 240
        assert config.stage_bytes < 1 << 20
        # Stages requested early are of the block's first tile, and there is room for them.
        chunks_of_pair = 2 * config.order.chunks_per_slice
        assert [config.early_stages(rows) for rows in (1, 256, 257, 1 << 17)] == [min(4, chunks_of_pair)] * 2 + [1] * 2
        assert config.stages >= 4


@given(hidden_sizes, expert_counts, st.integers(1, 16), st.sampled_from(TOKEN_TILES))
def test_k_is_cut_as_every_variant_cuts_it(hidden_size: int, num_experts: int, top_k: int, token_tile: int) -> None:
    order, variant = LogitsConfig(hidden_size, num_experts, 64).order, DecodeConfig(hidden_size, 32, top_k, token_tile)
    for name in ("chunks_per_slice", "num_slices", "half_pairs", "covered_columns"):
        assert getattr(order, name) == getattr(variant, name)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100a", "sm_103a", "sm_120a", ""])
def test_other_architectures_are_refused(architecture: str) -> None:
    words = rf"^architecture: expected one of \('sm_90a',\), got '{architecture}'$"
    with pytest.raises(ValueError, match=words):
        V4_PRO.check(architecture)
    with pytest.raises(ValueError, match=words):
        decode.compile_object(V4_PRO, architecture)
    assert logits_configs(7168, 384, architecture) == ()


def test_the_architecture_is_one_of_the_decode_kernel() -> None:
    assert logits_config.ARCHITECTURES == ("sm_90a",)
    assert set(logits_config.ARCHITECTURES) <= set(ARCHITECTURES)
    assert configs_of(7168, 384) == (replace(V4_PRO, expert_tile=64), V4_PRO)


@pytest.mark.parametrize(
    ("hidden_size", "num_experts", "words"),
    [
        (960, 256, "hidden_size from 1024 to 8192, a multiple of 64, got 960"),
        (8256, 256, "hidden_size .* got 8256"),
        (4128, 256, "hidden_size .* got 4128"),
        (4096, 28, "num_experts from 32 to 512, a multiple of 4, got 28"),
        (4096, 516, "num_experts .* got 516"),
        (4096, 255, "num_experts .* got 255"),
    ],
)
def test_unsupported_shapes_are_refused(hidden_size: int, num_experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogitsConfig(hidden_size, num_experts, 64).check("sm_90a")


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("REGISTERS_PER_SM", 64512, 64511, r"registers: 2 x 128 x 240 \+ 128 x 24 = 64512 > 64511"),
        ("REGISTERS_BESIDE_SUMS", 48, 49, r"registers: 192 of sums \+ 49 > 240"),
        ("CHUNK", 64, 63, "K coverage: 8 pairs of slices of 7 chunks x 63 = 7056 columns for 7168"),
        ("SWIZZLE_BYTES", 128, 64, "swizzle: rows of 64 x 2 = 128 bytes, not 64"),
        ("CLUSTER", 2, 32, r"alignment: copies of 96 and 128 / 32 rows of 128 bytes, not all multiples of 1024 bytes"),
        ("MAX_EXPERT_TILE", 96, 95, r"expert coverage: 4 tiles x 96 \(<= 95\) = 384 for 384"),
        ("MAX_TRANSACTION_BYTES", 28673, 28672, "transaction count: 28672 bytes on one barrier >= 28672"),
        ("EARLY_STAGES_OF_FEW", 4, 5, "early stages: 5 of 4 and 2 x 7 chunks"),
        # The sums beside as many stages as are requested early, and beside one.
        (
            "SHARED_MEMORY",
            {"sm_90a": 214080},
            {"sm_90a": 156703},
            r"shared memory: .* \+ 1 stages \(>= 2\) x .* 156703$",
        ),
    ],
)
def test_each_limit_is_checked(name: str, good: Any, bad: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_config, name, good)
    V4_PRO.check()
    monkeypatch.setattr(logits_config, name, bad)
    with pytest.raises(ValueError, match=words) as caught:
        V4_PRO.check()
    assert str(caught.value).startswith(f"{V4_PRO}: ")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_expert_tiles", 3, r"expert coverage: 3 tiles x 64 \(<= 96\) = 192 for 256"),
        ("num_pairs", 4, "parts: 4 pairs of slices, where 4 parts are quarters, 2 are halves and 1 is all of K"),
        ("num_pairs", 7, "K coverage: 7 pairs of slices of 4 chunks x 64 = 3584 columns for 4096"),
        ("num_pairs", 9, "K coverage: 9 pairs of slices of 4 chunks x 64 = 4608 columns for 4096"),
        ("shared_bytes", 232449, "shared memory: .* = 232449 bytes of 232448"),
        ("stages", 1, r"shared memory: .* \+ 1 stages \(>= 2\)"),
    ],
)
def test_each_size_is_checked(name: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    V4_FLASH.check()
    monkeypatch.setattr(LogitsConfig, name, property(lambda self: value))
    with pytest.raises(ValueError, match=words):
        V4_FLASH.check()


@pytest.mark.parametrize("expert_tile", [4, 60, 68])
def test_tiles_are_whole_patterns_of_the_swizzle(expert_tile: int) -> None:
    words = f"alignment: copies of {expert_tile} and 128 / 2 rows of 128 bytes, not all multiples of 1024 bytes"
    with pytest.raises(ValueError, match=words):
        replace(V4_FLASH, expert_tile=expert_tile).check()


# ---- which is the fastest, with K in how many parts


@pytest.mark.parametrize(
    ("num_tokens", "expert_tile", "parts"),
    [
        # Of Pro on 132 multiprocessors, 66 clusters. Small tiles make 3 clusters for each tile of rows and part, large
        # ones 2.
        (129, 64, 8),
        (256, 64, 8),  # 2 tiles of rows x 24 clusters: one round, of small tiles
        (257, 96, 8),  # 3 x 24 would be two, 3 x 16 are one
        (512, 96, 8),  # 4 x 16
        (513, 64, 4),  # 5 x 12: one round of two pairs, where pairs apart would take three or two
        (640, 64, 4),
        (641, 64, 2),  # 6 x 6: one round of four pairs; quarters by large tiles, 6 x 8, take longer
        (1408, 64, 2),  # 11 x 6
        (1409, 96, 2),  # 12 x 4
        (2048, 96, 2),  # 16 x 4
        (2049, 64, 1),  # 17 x 3
        (2816, 64, 1),  # 22 x 3
        (2817, 64, 2),  # 23 x 6: three rounds
        (4096, 64, 2),
        (16384, 64, 1),  # 128 x 3: six rounds
    ],
)
def test_the_fastest_of_pro(num_tokens: int, expert_tile: int, parts: int) -> None:
    """As measured on an H100 and an H200: ARCHITECTURE.md, "More rows, measured", runs 16 and 19."""
    expected = replace(V4_PRO, expert_tile=expert_tile), parts, num_tokens
    assert fastest(configs_of(7168, 384), num_tokens, 132, 0) == expected


@pytest.mark.parametrize(
    ("num_tokens", "parts"), [(512, 8), (513, 4), (1024, 4), (1025, 2), (2048, 2), (2304, 1), (4096, 1)]
)
def test_the_fastest_of_flash(num_tokens: int, parts: int) -> None:
    """Likewise; there is one kernel."""
    assert fastest(configs_of(4096, 256), num_tokens, 132, 0) == (V4_FLASH, parts, num_tokens)


@pytest.mark.parametrize(
    ("hidden_size", "num_experts", "whole", "most_left"),
    [
        # After whole rounds of tiles, on 66 clusters.
        (4096, 256, 2048, 128),  # 16 tiles of rows x 4, in halves
        (4096, 256, 4224, 128),  # 33 x 2, all of K
        (7168, 384, 1408, 128),  # 11 x 6, in halves
        (5120, 384, 1408, 90),
        (7168, 384, 2816, 128),  # 22 x 3, all of K
        (5120, 128, 4224, 128),  # 33 x 2, in halves
        # One round more, but of few pairs of slices: in quarters after pairs, in halves after quarters.
        (4096, 256, 512, 0),
        (4096, 256, 1024, 0),
        (7168, 384, 256, 0),
        (7168, 384, 640, 0),
        # Not one round more.
        (4096, 256, 1920, 0),
        (7168, 384, 1280, 0),
    ],
)
def test_rows_that_alone_begin_a_round_are_left(hidden_size: int, num_experts: int, whole: int, most_left: int) -> None:
    """As measured on an H200: ARCHITECTURE.md, "More rows, measured", runs 21 and 22."""
    configs = configs_of(hidden_size, num_experts)
    for rows in range(1, 129):
        num_rows = whole if rows <= most_left else whole + rows
        alone = fastest(configs, num_rows, 132, 0)
        assert fastest(configs, whole + rows, 132, 128) == alone
        assert alone.num_rows == num_rows


def test_no_more_rows_are_left_than_a_launch_takes() -> None:
    configs = configs_of(4096, 256)
    assert [fastest(configs, 2048 + rows, 132, 64).num_rows for rows in (64, 65)] == [2048, 2113]


@given(hidden_sizes, expert_counts, st.integers(1, 1 << 17), st.integers(1, 200), st.sampled_from([0, 64, 128]))
def test_the_fastest_costs_the_least(
    hidden_size: int, num_experts: int, num_tokens: int, num_multiprocessors: int, max_rows_left: int
) -> None:
    configs = configs_of(hidden_size, num_experts)
    config, parts, num_rows = fastest(configs, num_tokens, num_multiprocessors, max_rows_left)
    assert config in configs
    assert parts in config.parts
    assert 0 <= num_tokens - num_rows <= max_rows_left
    assert num_rows == num_tokens or num_rows % 128 == 0 < num_rows

    def least(num_rows: int) -> float:
        return min(each.cost(number, num_rows, num_multiprocessors) for each in configs for number in each.parts)

    cost = config.cost(parts, num_rows, num_multiprocessors)
    assert cost == least(num_rows) > 0
    launch = logits_config.DECODE_LAUNCH / config.order.chunks_per_slice
    assert num_rows == num_tokens or cost + launch < least(num_tokens)


@pytest.mark.parametrize(
    ("sizes", "expert_tile", "parts", "num_tokens", "expected"),
    [
        # Of 132 SMs, how many tiles leave free, and what the top-k has of blocks of four rows.
        ((4096, 256), 64, 8, 256, logits_config.AT_ONCE),  # 68 for 64
        ((4096, 256), 64, 8, 288, logits_config.AT_ONCE),  # 36 for 72
        ((4096, 256), 64, 8, 289, logits_config.AS_BLOCKS_END),  # 36 for 73
        ((4096, 256), 64, 8, 512, logits_config.AS_BLOCKS_END),  # 4 for 128
        ((7168, 384), 64, 8, 256, logits_config.AT_ONCE),  # 36 for 64
        ((7168, 384), 64, 4, 640, logits_config.AS_BLOCKS_END),  # 12 for 160
        ((5120, 128), 64, 8, 512, logits_config.AT_ONCE),  # 68 for 128
        ((5120, 128), 64, 8, 513, logits_config.AS_BLOCKS_END),  # 52 for 129
        ((7168, 384), 64, 2, 2688, logits_config.AS_BLOCKS_END),  # 252 tiles
        ((7168, 384), 64, 2, 2689, logits_config.AFTER_PRODUCTS),  # 264
    ],
)
def test_dependents_come_at_once_where_they_find_room(
    sizes: tuple[int, int], expert_tile: int, parts: int, num_tokens: int, expected: int
) -> None:
    assert LogitsConfig(*sizes, expert_tile).dependents(parts, num_tokens, 132) == expected


def test_a_topk_block_has_as_many_rows_as_the_geometry_says() -> None:
    assert cublas._grid(4 * logits_config.TOPK_ROWS) == (4, 32 * logits_config.TOPK_ROWS)


@given(hidden_sizes, expert_counts, st.integers(1, 1 << 16), st.integers(1, 200))
def test_more_rows_cost_no_less(hidden_size: int, num_experts: int, num_tokens: int, num_multiprocessors: int) -> None:
    for config in configs_of(hidden_size, num_experts):
        for parts in config.parts:
            one_more = config.cost(parts, num_tokens + 1, num_multiprocessors)
            assert config.cost(parts, num_tokens, num_multiprocessors) < one_more
            assert config.cost(parts, num_tokens, num_multiprocessors + 2) <= one_more


# ---- the compiled kernel

# Of the models, and one with broken slices and tiles of experts and an odd number of pairs.
SIZES = [*((model.hidden_size, model.num_experts) for model in PRESETS.values()), (1088, 132)]
CONFIGS = {
    f"H{config.hidden_size}-E{config.num_experts}-tile{config.expert_tile}": config
    for sizes in SIZES
    for config in configs_of(*sizes)
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[LogitsConfig, str], Compiled]:
    """All of :data:`CONFIGS`."""
    return compile_jobs([(config, "sm_90a") for config in CONFIGS.values()], tmp_path_factory.mktemp("logits"))


@pytest.fixture(params=CONFIGS)
def kernel(request: pytest.FixtureRequest, compiled: dict[tuple[LogitsConfig, str], Compiled]) -> Compiled:
    return compiled[CONFIGS[request.param], "sm_90a"]


@pytest.fixture
def config(request: pytest.FixtureRequest, kernel: Compiled) -> LogitsConfig:
    """What ``kernel`` was compiled from."""
    return CONFIGS[request.node.callspec.params["kernel"]]


def test_configs_have_every_kind_of_tail() -> None:
    configs = CONFIGS.values()
    assert {config.num_expert_tiles // CLUSTER for config in configs} == {1, 2, 3}
    assert {config.order.chunks_per_slice for config in configs} == {2, 4, 5, 7}
    assert {config.num_pairs % 2 for config in configs} == {0, 1}
    assert any(config.order.covered_columns > config.hidden_size for config in configs)
    assert any(config.num_expert_tiles * config.expert_tile > config.num_experts for config in configs)
    assert {(config.expert_tile, config.sums_in_shared) for config in configs} == {
        (40, False),
        (64, False),
        (72, True),
        (96, True),
    }


def test_registers_and_no_local_memory(kernel: Compiled, config: LogitsConfig) -> None:
    (registers,) = kernel.attributes("REGCOUNT")
    # At the start, the same for all; then a warpgroup gives its own away or takes more.
    assert registers * config.num_threads <= 65536
    assert re.findall(r"USETMAXREG\.\w+\.CTAPOOL (?:UP\d, )?(0x\w+)", kernel.sass) == ["0x18", "0xf0"]
    assert set(kernel.attributes("FRAME_SIZE")) == {0}
    assert set(kernel.attributes("MIN_STACK_SIZE")) == {0}
    assert kernel.count("LDL") == kernel.count("STL") == 0, "spills"


def test_products(kernel: Compiled, config: LogitsConfig) -> None:
    """A pair's: two slices, and four steps of 16 columns for each of a slice's chunks; and no others."""
    chunks = config.order.chunks_per_slice
    name = f"HGMMA.64x{config.expert_tile}x16.F32.BF16"
    assert kernel.opcodes[name] == kernel.count("HGMMA") == 2 * chunks * 4
    assert kernel.count("HMMA") == 0


def test_products_do_not_wait_for_one_another(kernel: Compiled, config: LogitsConfig) -> None:
    """There is a wait for each stage, a chunk of four products: when the next one's have been issued."""
    waits = kernel.count("WARPGROUP") - kernel.opcodes["WARPGROUP.ARRIVE"]
    assert kernel.opcodes["WARPGROUP.DEPBAR.LE"] == waits == 2 * config.order.chunks_per_slice


def test_operands_come_by_tensor_copies(kernel: Compiled) -> None:
    """One of each operand in the loop over chunks; a block of the cluster copies its rows for both."""
    assert kernel.opcodes["UTMALDG.2D.MULTICAST"] == 2, "hidden states, of early stages and of others"
    assert kernel.opcodes["UTMALDG.2D"] == 2, "gate weight, before the wait and after it"
    assert kernel.count("UTMALDG") == 4


def test_sums_are_stored_once(kernel: Compiled, config: LogitsConfig) -> None:
    # A store of two sums for each 8 experts and 8 rows of 16; the first half's are read again, as they are by now.
    pairs = config.expert_tile // 8 * 2
    assert kernel.opcodes["STG.E.64"] == kernel.count("STG") + kernel.count("ST") == pairs
    assert kernel.opcodes["LDG.E.64"] == kernel.count("LDG") == pairs
    assert kernel.count("LD") == kernel.count("LDGSTS") == 0


def test_each_stage_is_released(kernel: Compiled, config: LogitsConfig) -> None:
    """A pair's: one for each chunk of a slice."""
    releases = sum(number for name, number in kernel.opcodes.items() if re.match(r"SYNCS\.ARRIVE\..*\.ART0$", name))
    assert releases == 2 * config.order.chunks_per_slice


def test_sums_are_added_one_by_one(kernel: Compiled, config: LogitsConfig) -> None:
    """In a pair: two sums of quarters for each slice, one of slices, and the total; at the end that of two halves."""
    adds = kernel.count("FADD") + 2 * kernel.count("FADD2")
    elements = config.expert_tile // 2  # of a thread, in a product of 64 rows
    assert adds == (2 * 3 + 1 + 1 + 1) * elements
    assert kernel.count("FFMA") == kernel.count("FMUL") == 0


def test_dependent_launch_and_cluster(kernel: Compiled) -> None:
    assert kernel.count("ACQBULK") >= 1
    assert kernel.count("PREEXIT") == 2, "at once and after the last products"
    assert kernel.count("UCGABAR_ARV") == kernel.count("UCGABAR_WAIT") == 1
    # Nothing is read before the wait but the gate weight of the first stages, if it is constant.
    copies = re.findall(r"ACQBULK|UTMALDG\S*", kernel.sass)
    assert copies[:2] == ["UTMALDG.2D", "ACQBULK"]
    assert sorted(copies[2:]) == ["UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMALDG.2D.MULTICAST"]


def test_its_name_tells_the_sizes(kernel: Compiled, config: LogitsConfig) -> None:
    (name,) = re.findall(r"^\.text\.(\S+):$", kernel.sass, re.MULTILINE)
    assert name.startswith(f"dense_logits_H{config.hidden_size}_E{config.num_experts}_tile{config.expert_tile}_")


def test_block_and_shared_memory(kernel: Compiled, config: LogitsConfig) -> None:
    """The launch asks for what ``LogitsConfig`` has checked: enough for every part, and no more."""
    one = r"\s+%\S+ = .*\s+store i32 1, .*"
    block = rf"store i32 (\d+), ptr .*{one}{one}\s+%\S+ = .*\s+store i64 (\d+), ptr"
    launches = set(re.findall(block, kernel.host))
    assert len(launches) == 1, "the host code looks different now"
    threads, shared = map(int, launches.pop())
    assert threads == config.num_threads
    parts = config.sums_bytes + config.stages * (config.stage_bytes + 16)
    assert parts <= shared <= config.shared_bytes <= 232448


def test_compiling_takes_seconds(compiled: dict[tuple[LogitsConfig, str], Compiled]) -> None:
    slowest = max(compiled, key=lambda job: compiled[job].seconds)
    assert compiled[slowest].seconds < MOST_SECONDS, slowest


def test_object_files_are_for_this_machine(kernel: Compiled) -> None:
    assert kernel.code[:4] == b"\x7fELF"
    assert kernel.code.count(b"\x7fELF") == 2, "the object file, and the cubin in it"
    assert len(kernel.code) < 1 << 20


def test_link_gives_a_function(kernel: Compiled) -> None:
    """Without a GPU: the cubin is loaded at the first call."""
    function = decode.link(kernel.code)
    with pytest.raises(TypeError, match=r"Expects 12 parameters .*hidden_states: int64, .*stream"):
        function()


def test_argument_kinds_are_those_of_the_kernel() -> None:
    from cutlass import Int32, Int64

    from dsv4_router.kernels.dense_logits import DenseLogitsKernel

    parameters = list(inspect.signature(DenseLogitsKernel.__call__).parameters.values())
    assert (parameters[0].name, parameters[-1].name) == ("self", "stream")
    kinds = {Int64: "address", Int32: "int"}
    assert tuple(kinds[parameter.annotation] for parameter in parameters[1:-1]) == decode._LOGITS_ARGUMENTS


# ---- the cache


def test_no_other_kernel_has_its_cache_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by nothing, into a cache of the test's own."""
    asked: list[decode.Config] = []

    def compile_object(config: decode.Config, target: str) -> tuple[bytes, Any]:
        asked.append(config)
        return f"{config} for {target}".encode(), None

    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(decode, "compile_object", compile_object)
    configs: list[decode.Config] = [V4_FLASH, V4_PRO, replace(V4_PRO, num_experts=256), replace(V4_PRO, expert_tile=64)]
    configs += decode_config.variants(7168, 384, 6, "sm_90a")
    for _ in range(2):
        for config in configs:
            assert decode.object_code(config, "sm_90a") == f"{config} for sm_90a".encode()
    assert asked == configs
    assert len(list(tmp_path.glob("*.o"))) == len(configs)
