# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The decode kernel compiles for every architecture, into the instructions it is made of. Needs no GPU."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled_kernels import MOST_SECONDS, Compiled, compile_jobs

import dsv4_router
from dsv4_router.backends import cuda_module, decode
from dsv4_router.config import PRESETS
from dsv4_router.decode_config import ARCHITECTURES, DecodeConfig, variant, variants
from dsv4_router.settings import CACHE_DIR_VARIABLE

Job = tuple[DecodeConfig, str]
SMALL = DecodeConfig(4096, 256, 6, 16)


def jobs() -> dict[str, Job]:
    """Every variant of every model for every architecture, and three of odd sizes, one of them by warpgroups.

    Those have an odd number of pairs of slices, columns past H, and groups of 16 experts.
    """
    found = {}
    for target in ARCHITECTURES:
        for name, model in PRESETS.items():
            for config in variants(model.hidden_size, model.num_experts, model.top_k, target):
                found[f"{name}-{config.token_tile}-{target}"] = config, target
    for tile in (8, 128):
        found[f"odd-{tile}-sm_90a"] = DecodeConfig(1088, 132, 8, tile), "sm_90a"
    found["odd-warpgroups-sm_90a"] = DecodeConfig(1088, 132, 8, 96, True), "sm_90a"
    return found


JOBS = jobs()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, Compiled]:
    """All jobs."""
    return compile_jobs(list(JOBS.values()), tmp_path_factory.mktemp("decode"))


# ---- what every compiled variant is


def test_jobs_cover_every_model_and_architecture() -> None:
    assert {target for _, target in JOBS.values()} == set(ARCHITECTURES)
    for target in ARCHITECTURES:
        configs = [config for config, made_for in JOBS.values() if made_for == target]
        ways = {
            (config.experts_are_rows, config.slices_per_block, config.partials_share_operands) for config in configs
        }
        assert ways >= {(True, 2, False), (False, 2, False), (False, 1, True)}
        for config in configs:
            config.check(target)
    odd = [config for config, _ in JOBS.values() if config.num_slices // 2 % 2]
    assert {config.slices_per_block for config in odd} == {1, 2}
    assert all(config.covered_columns > config.hidden_size and config.group_lanes < 32 for config in odd)
    tiles = {(config.token_tile, config.exchanges_sums) for config, _ in JOBS.values() if config.warpgroup_mma}
    assert tiles == {(32, False), (64, True), (96, True), (128, True)}


@pytest.mark.parametrize("name", JOBS)
def test_registers_and_no_local_memory(compiled: dict[Job, Compiled], name: str) -> None:
    config, _ = job = JOBS[name]
    kernel = compiled[job]
    (registers,) = kernel.attributes("REGCOUNT")
    assert 32 <= registers <= config.registers_per_thread
    assert set(kernel.attributes("FRAME_SIZE")) == {0}
    assert set(kernel.attributes("MIN_STACK_SIZE")) == {0}
    assert kernel.count("LDL") == kernel.count("STL") == 0, "spills"


@pytest.mark.parametrize("name", JOBS)
def test_instructions(compiled: dict[Job, Compiled], name: str) -> None:
    config, _ = job = JOBS[name]
    kernel = compiled[job]
    steps = config.chunks_per_slice
    few = config.token_tile == 8
    tiles = -(-config.expert_tile // (16 if few else 8))
    # The product: an m16n8k16 for each 16 rows, 8 experts and chunk of a warp, of 8 rows for 16 experts, or one of a
    # warpgroup for each quarter and chunk; and those of the loop of compute_row, of warps.
    by_warps = 0 if config.warpgroup_mma else steps * config.warp_m_tiles
    assert kernel.opcodes["HMMA.16816.F32.BF16"] == kernel.count("HMMA") >= (by_warps + 1) * tiles
    wide = kernel.opcodes[f"HGMMA.64x{config.expert_tile}x16.F32.BF16"]
    assert wide == kernel.count("HGMMA") == (4 * steps if config.warpgroup_mma else 0)
    # A gate fragment of a chunk is some ldmatrix of two or four matrices, 8 experts by 8 columns each; a fragment of 16
    # rows one of four.
    assert kernel.opcodes["LDSM.16.M88.2"] + kernel.opcodes["LDSM.16.M88.4"] == kernel.count("LDSM")
    matrices = 2 * kernel.opcodes["LDSM.16.M88.2"] + 4 * kernel.opcodes["LDSM.16.M88.4"]
    assert matrices >= (4 if few else 2) * tiles * ((steps if by_warps else 0) + 1) + (0 if few else 4 * by_warps)
    # The gate tile comes by tensor copies; rows do so or, if a launch has the fewest, by copies of their own.
    # Of several chunks: a slice of the gate tile, in compute_row too, and the rows of one stage; else a copy a stage.
    at_once = 2 * config.slices_per_block + (config.hidden_stages == 1)
    assert kernel.opcodes["UTMALDG.3D"] == at_once
    assert kernel.count("UTMALDG") == at_once + (config.hidden_stages if config.hidden_stages > 1 else 0)
    assert (kernel.count("UBLKCP") > 0) == few
    # A packet is one access, never two halves: a load for each part of K in a half, and nothing else of 128 bits.
    packets = {name for name in kernel.opcodes if re.match(r"(LDG|STG|LD|ST)\..*(64|128).*STRONG", name)}
    assert packets == {"LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU"}
    half_parts = config.half_pairs * 2 // config.slices_per_block
    loads = kernel.opcodes["LDG.E.128.STRONG.GPU"]
    assert loads >= half_parts
    assert loads % half_parts == 0
    # The ticket is an addition whose result is used.
    assert kernel.opcodes["ATOMG.E.ADD.64.STRONG.GPU"] == 1
    # Dependent launch: the waits and the trigger, at one of two places where that is the usher's choice.
    assert kernel.count("ACQBULK") >= 1 + config.has_usher
    assert kernel.count("PREEXIT") == 1 + config.has_usher
    # No fence beyond the block, for packets carry all that their reader uses.
    assert {name for name in kernel.opcodes if name.startswith("MEMBAR")} <= {"MEMBAR.ALL.CTA"}
    # The score: one exponential, one square root, for sums that were collected, at once or not, and computed alone.
    assert 2 <= kernel.opcodes["MUFU.EX2"] == kernel.opcodes["MUFU.SQRT"] <= 3
    # Candidates are counted one by one: an addition that is gathered over the warp takes longer. Once for rows whose
    # sums were collected, and once for rows computed alone, whose code, from its fence on, lies behind the others'.
    assert kernel.count("ATOMS") == kernel.opcodes["ATOMS.INC"] == 2
    assert kernel.sass.index("MEMBAR.ALL.CTA") > kernel.sass.index("MUFU.RCP") > kernel.sass.index("ATOMS.INC")


@pytest.mark.parametrize("name", JOBS)
def test_grid_block_and_shared_memory(compiled: dict[Job, Compiled], name: str) -> None:
    """The launch asks for what ``DecodeConfig`` has checked: enough for every part, and no more."""
    config, _ = job = JOBS[name]
    launches = re.findall(
        r"store i64 (\d+), ptr %\S+, align 8\s+store <4 x i32> <i32 (\d+), i32 1, i32 1, i32 (\d+)>", compiled[job].host
    )
    assert len(set(launches)) == 1, "the host code looks different now"
    shared, blocks, threads = map(int, launches[0])
    assert (blocks, threads) == (config.num_blocks, config.num_threads)
    if config.partials_share_operands:
        operands = max(config.operand_bytes, config.partial_bytes)
    else:
        operands = config.operand_bytes + config.partial_bytes
    parts = config.barrier_bytes + 8 + operands + config.selection_bytes + config.padding_bytes
    assert parts <= shared <= config.shared_bytes
    assert not config.warpgroup_mma or 2 * (shared + 1024) > 233472, "nothing keeps a second block off the SM"


@pytest.mark.parametrize(("rows", "num_experts"), [(32, 384), (64, 256), (96, 128), (128, 384)])
def test_warpgroups_store_each_sum_once(rows: int, num_experts: int) -> None:
    """By where a lane begins; the steps from there are those of ``store_sums``."""
    from dsv4_router.kernels.warpgroup_product import WarpgroupProduct

    product = WarpgroupProduct()
    config = product.config = variant(7168, num_experts, 6, rows, "sm_90a")
    assert config.warpgroup_mma
    pairs = config.expert_tile // 2
    behind, step = ((0, 4, 8, 12), 8) if config.exchanges_sums else ((0, 8), 4)
    stored: Counter[tuple[int, int]] = Counter()
    for warp in range(config.warpgroup_warps):
        for row, pair in (product.first_packet(warp, lane) for lane in range(32)):
            # Of 96 rows the second warpgroup has 32 that the first one stores.
            mine = [row + further for further in behind if warp < 4 or row + further >= 64]
            stored.update((each, pair + other) for each in mine for other in range(0, pairs, step))
    assert stored == Counter((row, pair) for row in range(max(rows, 64)) for pair in range(pairs))


def test_compiling_takes_seconds(compiled: dict[Job, Compiled]) -> None:
    """The first of a process too, which imports CuTe DSL."""
    slowest = max(compiled, key=lambda job: compiled[job].seconds)
    assert compiled[slowest].seconds < MOST_SECONDS, slowest


def test_object_files_are_for_this_machine(compiled: dict[Job, Compiled]) -> None:
    for kernel in compiled.values():
        assert kernel.code[:4] == b"\x7fELF"
        assert kernel.code.count(b"\x7fELF") == 2, "the object file, and the cubin in it"
        assert len(kernel.code) < 1 << 20


def test_a_spill_would_be_seen() -> None:
    lines = (
        "        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;",
        "        /*1b20*/                   LDL R4, [R1] ;",
        "        /*0030*/               @UP1 UTMALDG.2D [UR8], [UR4] ;",
        "        /*0004*/ \t.word\tindex@(kernel)",
    )
    kernel = Compiled(b"", 0.0, "", "\n".join(lines))
    assert kernel.opcodes == {"STL.64": 1, "LDL": 1, "UTMALDG.2D": 1}
    assert kernel.count("STL") == kernel.count("LDL") == 1
    frame = (
        "//----- nvinfo : EIATTR_FRAME_SIZE\n .align 4\n.L_1:\n /*0004*/ .word index@(f)\n /*0008*/ .word 0x00000010\n"
    )
    assert Compiled(b"", 0.0, "", 2 * frame).attributes("FRAME_SIZE") == [16, 16]


# ---- linking


def test_link_gives_a_function(compiled: dict[Job, Compiled]) -> None:
    """Without a GPU: the cubin is loaded at the first call."""
    import tvm_ffi

    functions = [decode.link(compiled[JOBS[name]].code) for name in ("v4-flash-8-sm_90a", "v4-flash-128-sm_100a")]
    for function in functions:
        assert isinstance(function, tvm_ffi.Function)
        with pytest.raises(TypeError, match=r"Expects 21 parameters .*hidden_states: int64, .*stream"):
            function()
        with pytest.raises(TypeError, match="argument #0"):
            function(*["text"] * 21)


def test_argument_kinds_are_those_of_the_kernel() -> None:
    from cutlass import Float32, Int32, Int64

    parameters = list(inspect.signature(dsv4_router.DenseRouterDecodeKernel.__call__).parameters.values())
    assert (parameters[0].name, parameters[-1].name) == ("self", "stream")
    kinds = {Int64: "address", Int32: "int", Float32: "float"}
    assert tuple(kinds[parameter.annotation] for parameter in parameters[1:-1]) == decode._ARGUMENTS


def test_the_kernel_is_public() -> None:
    from dsv4_router.kernels.dense_router_decode import DenseRouterDecodeKernel

    assert dsv4_router.DenseRouterDecodeKernel is DenseRouterDecodeKernel
    assert DenseRouterDecodeKernel(SMALL).config is SMALL


def test_score_has_the_constants_of_the_cuda_kernels() -> None:
    """So that both paths give the same score."""
    from dsv4_router.kernels import decode_ptx

    text = re.sub(r"//.*", "", (cuda_module.kernel_folder() / "router_math.cuh").read_text())
    numbers = {float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]?\d+)?(?=f)", text)}
    numbers |= {float(number) for number in re.findall(r"\b\d+e-?\d+(?=f)", text)}
    ours = {*decode_ptx._LOG1P, decode_ptx._HALF_LOG2E, decode_ptx._HALF_LOG2E_REST, decode_ptx._LN2}
    ours |= {decode_ptx._LARGEST_SCORE, decode_ptx._WEIGHT_FLOOR}
    assert len(ours) == 14
    assert ours <= numbers
    polynomial = re.findall(r"float p = (\S+)f;|__fmaf_rn\(p, t, (\S+)f\);", text)
    assert tuple(float(first or second) for first, second in polynomial) == decode_ptx._LOG1P


# ---- the cache


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What is compiled from here on, by nothing, into a cache of the test's own."""
    asked: list[Job] = []

    def compile_object(config: DecodeConfig, target: str) -> tuple[bytes, Any]:
        asked.append((config, target))
        return f"{config} for {target}".encode(), None

    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(decode, "compile_object", compile_object)
    return asked


def test_a_second_call_compiles_nothing(compilations: list[Job]) -> None:
    wanted = [(config, target) for config in (SMALL, replace(SMALL, token_tile=32)) for target in ARCHITECTURES]
    for _ in range(2):
        for config, target in wanted:
            assert decode.object_code(config, target) == f"{config} for {target}".encode()
    assert compilations == wanted


@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda code: b"", lambda code: bytes(len(code))])
def test_a_damaged_entry_is_compiled_again(compilations: list[Job], tmp_path: Path, damage: Any) -> None:
    expected = decode.object_code(SMALL, "sm_90a")
    (entry,) = (tmp_path / "cache").glob("*.o")
    entry.write_bytes(damage(entry.read_bytes()))
    for _ in range(2):
        assert decode.object_code(SMALL, "sm_90a") == expected
    assert compilations == [(SMALL, "sm_90a")] * 2


def test_what_the_compiler_refuses_is_not_kept(compilations: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: DecodeConfig, target: str) -> tuple[bytes, Any]:
        raise RuntimeError("ptxas rejected the PTX")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "compile_object", refuse)
        with pytest.raises(RuntimeError, match="ptxas"):
            decode.object_code(SMALL, "sm_90a")
    assert decode.object_code(SMALL, "sm_90a")
    assert compilations == [(SMALL, "sm_90a")]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cache keys that are asked for from here on."""
    asked: list[str] = []
    monkeypatch.setattr(decode.jit_cache, "load_or_build", lambda key, suffix, build: asked.append(key))
    return asked


def test_key_depends_on_every_field_and_the_target(keys: list[str]) -> None:
    configs = [SMALL, DecodeConfig(4160, 256, 6, 16), DecodeConfig(4096, 260, 6, 16), DecodeConfig(4096, 256, 5, 16)]
    configs += [replace(SMALL, token_tile=32), replace(SMALL, warpgroup_mma=True)]
    for config in configs:
        for target in ARCHITECTURES:
            decode.object_code(config, target)
    assert len(set(keys)) == len(configs) * len(ARCHITECTURES)
    decode.object_code(replace(SMALL), "sm_90a")
    assert keys[-1] == keys[0]


def test_key_depends_on_every_source(keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(decode.__file__).parents[1]
    copies = {name: cuda_module.kernel_folder() / name for name in decode.SOURCES}
    for name in ("decode_config.py", "logits_config.py"):
        copies[name] = package / name
    copies["backends/decode.py"] = package / "backends" / "decode.py"
    (tmp_path / "backends").mkdir()
    for name, path in copies.items():
        (tmp_path / name).write_text(path.read_text())
    monkeypatch.setattr(cuda_module, "kernel_folder", lambda: tmp_path)
    monkeypatch.setattr(decode, "__file__", str(tmp_path / "backends" / "decode.py"))
    decode.object_code(SMALL, "sm_90a")
    for name in copies:
        (tmp_path / name).write_text(copies[name].read_text() + "# changed\n")
        decode.object_code(SMALL, "sm_90a")
    assert len(set(keys)) == 1 + len(copies)


def test_sources_are_all_that_the_kernel_imports() -> None:
    folder = cuda_module.kernel_folder()
    assert {path.name for path in folder.glob("*.py")} - {"__init__.py"} == set(decode.SOURCES)
    imported = set()
    for name in decode.SOURCES:
        imported |= set(re.findall(r"^(?:from|import) (dsv4_router\S*)", (folder / name).read_text(), re.MULTILINE))
    parts = {f"dsv4_router.kernels.{Path(name).stem}" for name in decode.SOURCES}
    sizes = {"dsv4_router.decode_config", "dsv4_router.logits_config"}
    assert sizes <= imported <= {"dsv4_router", "dsv4_router.kernels"} | sizes | parts
    assert decode._sources().keys() == {*decode.SOURCES, "decode_config.py", "logits_config.py", "decode.py"}


def test_key_depends_on_the_processor(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decode.object_code(SMALL, "sm_90a")
    monkeypatch.setattr(decode, "_host", lambda: {"machine": "aarch64", "features": "[]"})
    decode.object_code(SMALL, "sm_90a")
    assert len(set(keys)) == 2


@pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "apache-tvm-ffi"])
def test_key_depends_on_the_toolchain(keys: list[str], monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    known = importlib.metadata.version
    decode.object_code(SMALL, "sm_90a")
    for other in ("99.0", None):

        def version(name: str, other: str | None = other) -> str:
            if name != package:
                return known(name)
            if other is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return other

        monkeypatch.setattr(importlib.metadata, "version", version)
        decode._toolchain.cache_clear()
        decode.object_code(SMALL, "sm_90a")
    decode._toolchain.cache_clear()
    assert len(set(keys)) == 3
