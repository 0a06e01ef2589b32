# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiling ahead and warming up: what is compiled, what is kept, and that nothing is left for later calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4_router import (
    V4_1_FLASH_DRAFT,
    V4_FLASH,
    V4_PRO,
    BackendUnavailableError,
    RouterConfig,
    dispatch,
    startup,
    thresholds,
)
from dsv4_router.arguments import Options
from dsv4_router.backends import cublas, cuda_module, decode
from dsv4_router.config import PRESETS
from dsv4_router.decode_config import ARCHITECTURES, TOKEN_TILES, DecodeConfig, variants
from dsv4_router.dispatch import Availability
from dsv4_router.logits_config import LogitsConfig, logits_configs
from dsv4_router.settings import CACHE_DIR_VARIABLE

Compilation = tuple[decode.Config, str]
SMALL = RouterConfig(64, 16, 4, 1.5)
LARGE = RouterConfig(8192, 512, 16, 1.5)
GPU = 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(folder))
    return folder


@pytest.fixture
def compilations(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Compilation]:
    """What CuTe DSL compiles from here on, by nothing, as are the top-k's kernels."""
    asked: list[Compilation] = []

    def compile_object(config: decode.Config, target: str) -> tuple[bytes, Any]:
        asked.append((config, target))
        return f"{config} for {target}".encode(), None

    monkeypatch.setattr(decode, "compile_object", compile_object)
    monkeypatch.setattr(cuda_module, "_compile", lambda spec, target, log: f"{spec} for {target}".encode())
    return asked


def of(config: RouterConfig, target: str) -> list[decode.Config]:
    """The variants that fit and, after them on sm_90a, the kernels for more rows."""
    found: list[decode.Config] = [*variants(config.hidden_size, config.num_experts, config.top_k, target)]
    return [*found, *logits_configs(config.hidden_size, config.num_experts, target)]


def topk_of(config: RouterConfig, target: str) -> list[tuple[Any, ...]]:
    """The kernels of the top-k that bf16 calls of any number of tokens take, of sums of the paths' parts."""
    splits = [8, 2, 4, 1] if config == V4_FLASH else [8, 2, 1]
    # Pairs apart, and quarters; the halves, and K in one part, are like 2 splits and 1.
    parts = [(8, 4), (6, 3)] if target == "sm_90a" else []
    return [
        (config.num_experts, config.top_k, dtype, True, number, False, first_half, many_rows)
        for number, first_half in [*((number, None) for number in splits), *parts]
        for many_rows in ((False, True) if number <= 2 else (False,))
        for dtype in (torch.int32, torch.int64)
    ]


# compile_ahead


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_compile_ahead_fills_the_cache(
    compilations: list[Compilation], cache: Path, config: RouterConfig, target: str
) -> None:
    for _ in range(2):
        assert startup.compile_ahead(config, target) == of(config, target)
        assert compilations == [(variant, target) for variant in of(config, target)]
        assert len(list(cache.glob("*.o"))) == len(compilations)
        assert len(list(cache.glob("*.cubin"))) == len(topk_of(config, target))
    for variant in of(config, target):
        assert decode.object_code(variant, target) == f"{variant} for {target}".encode()
    assert len(compilations) == len(of(config, target)), "a later process would compile again"


def test_compile_ahead_needs_no_gpu(compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("compiling asked torch.cuda")

    for name in ("is_available", "device_count", "current_device", "get_device_capability", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert len(startup.compile_ahead(V4_FLASH, "sm_90a")) == len(TOKEN_TILES) + 1
    assert len(startup.compile_ahead(V4_FLASH, "sm_100a")) == len(TOKEN_TILES)


@pytest.mark.parametrize(
    ("config", "target", "words"),
    [
        (SMALL, "sm_90a", r"^config: the one-launch kernel needs hidden_size from 1024 to 8192, .*, got 64$"),
        (RouterConfig(4096, 255, 6, 1.5), "sm_90a", r"^config: the one-launch kernel needs num_experts .* got 255$"),
        (RouterConfig(4096, 1024, 6, 1.5), "sm_90a", r"^config: .* num_experts from 32 to 512, .* got 1024$"),
        (LARGE, "sm_120a", r"^config: .*shared memory: .* = 103040 bytes > 101376 of sm_120a$"),
    ],
)
def test_compile_ahead_of_what_cannot_be_served(
    compilations: list[Compilation], config: RouterConfig, target: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        startup.compile_ahead(config, target)
    assert compilations == []


def test_large_models_compile_for_large_gpus(compilations: list[Compilation]) -> None:
    variants = [DecodeConfig(8192, 512, 16, tile) for tile in (8, 16, 32, 64)]
    assert startup.compile_ahead(LARGE, "sm_90a") == [
        *variants,
        LogitsConfig(8192, 512, 64),
        LogitsConfig(8192, 512, 88),
    ]
    assert startup.compile_ahead(LARGE, "sm_100a") == variants


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_no_variant_serves_has_no_kernel_for_more_rows(target: str) -> None:
    assert decode.kernels_of(64, 16, 4, target) == []
    assert decode.kernels_of(4096, 255, 6, target) == []


def test_compile_ahead_without_cutlass(compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "missing_cutlass_dsl", lambda: "nvidia-cutlass-dsl is not installed")
    with pytest.raises(BackendUnavailableError, match="nvidia-cutlass-dsl is not installed"):
        startup.compile_ahead(V4_FLASH, "sm_90a")
    with pytest.raises(ValueError, match=r"^config: "):  # what would be wrong on any machine comes first
        startup.compile_ahead(SMALL, "sm_90a")
    assert compilations == []


def test_compile_ahead_says_what_the_compiler_says(
    compilations: list[Compilation], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = decode.compile_object

    def fail_at_64(config: decode.Config, target: str) -> tuple[bytes, Any]:
        if isinstance(config, DecodeConfig) and config.token_tile == 64:
            raise RuntimeError("ptxas rejected the PTX")
        return made(config, target)

    monkeypatch.setattr(decode, "compile_object", fail_at_64)
    with pytest.raises(RuntimeError, match="ptxas"):
        startup.compile_ahead(V4_FLASH, "sm_90a")
    assert len(list(cache.glob("*.o"))) == TOKEN_TILES.index(64) == 3, "what was compiled before is kept"


# warmup


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was prepared: the decode path's model, or a kernel of the top-k, after the device's index."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(decode, "warmup", lambda *sizes: asked.append(sizes))
    monkeypatch.setattr(cublas, "topk_kernel", lambda *spec: asked.append(spec))
    return asked


def pretend(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """A machine with H100s."""

    def availability(device: torch.device) -> Availability:
        return Availability(str(device), **({"compute_capability": (9, 0)} | found))

    monkeypatch.setattr(dispatch, "availability", availability)


@pytest.mark.parametrize("device", ["cuda:3", torch.device("cuda", 3)], ids=["name", "device"])
def test_warmup_prepares_the_device(
    warmed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, device: torch.device | str
) -> None:
    pretend(monkeypatch)
    plan = startup.warmup(V4_PRO, device)
    assert (plan.path, plan.availability.device, plan.request.num_tokens) == ("decode", "cuda:3", 1)
    assert warmed == [(3, 7168, 384, 6), *((3, *kernel) for kernel in topk_of(V4_PRO, "sm_90a"))]


def test_warmup_prepares_a_path_that_one_token_does_not_take(
    warmed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` may take it for more tokens, and calls that ask for it or for batch invariance take it anyway."""
    never = thresholds.DecodeThreshold("H100", (9, 0), 7168, 384, 0, "2026-11-23")
    pretend(monkeypatch, gpu="H100", tuned=(never,))
    assert startup.warmup(V4_PRO, "cuda:3").path == "cublas"
    assert warmed[0] == (3, 7168, 384, 6)


@pytest.mark.parametrize(
    ("config", "found", "path", "why"),
    [
        (RouterConfig(40, 16, 4, 1.5), {}, "cublas", "got 40"),
        (V4_PRO, {"missing_cutlass_dsl": "nvidia-cutlass-dsl is not installed"}, "cublas", "not installed"),
        (V4_PRO, {"compute_capability": (8, 0)}, "cublas", "sm_80"),
        (V4_PRO, {"compute_capability": (7, 0)}, "reference", "8.0 or later"),
        (V4_PRO, {"missing_device": "torch sees no CUDA GPU"}, "reference", "no CUDA GPU"),
    ],
)
def test_warmup_of_what_the_decode_path_does_not_serve(
    warmed: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    config: RouterConfig,
    found: dict[str, Any],
    path: str,
    why: str,
) -> None:
    """Only the top-k's kernels, if the cublas path serves it."""
    pretend(monkeypatch, **found)
    plan = startup.warmup(config, "cuda:0")
    assert plan.path == path
    assert plan.rejected[0][0] == "decode"
    assert why in plan.rejected[0][1]
    splits = [1] if config.hidden_size == 40 else [8, 2, 1]  # of 40 columns no pieces of 16-byte words can be made
    ways = {8: [False], 2: [False, True], 1: [False, True]}
    expected = [(0, splits_of, way) for splits_of in splits for way in ways[splits_of] for _ in range(2)]
    assert [(kernel[0], kernel[5], kernel[8]) for kernel in warmed] == ([] if path == "reference" else expected)


def test_warmup_on_a_cpu_does_nothing(warmed: list[tuple[Any, ...]], compilations: list[Compilation]) -> None:
    assert startup.warmup(V4_FLASH, "cpu") == dispatch.explain(V4_FLASH, 1, "cpu")
    assert warmed == compilations == []


class FakeGpu:
    """Device ``GPU`` without one: what is linked, which workspaces are made, and which kernels of the top-k."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self.linked: list[bytes] = []
        self.workspaces: list[tuple[int, int]] = []
        self.launches: list[tuple[bytes, tuple[Any, ...]]] = []
        self.selections: list[tuple[Any, ...]] = []
        monkeypatch.setattr(decode, "_models", {})
        monkeypatch.setattr(decode, "link", self.link)
        monkeypatch.setattr(decode.workspaces, "address", lambda *launch: self.of_stream(*launch[:2]))
        monkeypatch.setattr(decode.workspaces, "of_stream", self.of_stream)
        monkeypatch.setattr(decode.cuda_module, "capture_allowed", nullcontext)
        monkeypatch.setattr(decode.cublas, "topk_kernel", lambda *spec: self.selections.append(spec))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)

    def link(self, code: bytes) -> Callable[..., None]:
        self.linked.append(code)
        return lambda *args: self.launches.append((code, args))

    def of_stream(self, device_index: int, stream: int) -> int:
        self.workspaces.append((device_index, stream))
        return 1 << 40


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_after_warmup_no_call_compiles(
    compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    gpu, target = FakeGpu(monkeypatch, capability), dispatch.architecture(capability)
    pretend(monkeypatch, compute_capability=capability)
    startup.warmup(V4_1_FLASH_DRAFT, f"cuda:{GPU}")
    kernels = of(V4_1_FLASH_DRAFT, target)
    assert compilations == [(kernel, target) for kernel in kernels]
    assert len(kernels) == len(TOKEN_TILES) + (target == "sm_90a")
    assert gpu.linked == [f"{kernel} for {target}".encode() for kernel in kernels]
    assert gpu.workspaces == [(GPU, 77)]
    model = decode._model(GPU, 5120, 128, 3)
    for rows in range(1, model.max_rows + 1):
        model.kernel(rows)
    for many in model.many_rows:
        model.logits_kernel(many)
    assert len(gpu.linked) == len(compilations) == len(kernels)
    assert gpu.selections == [(GPU, *kernel) for kernel in topk_of(V4_1_FLASH_DRAFT, target)]


@pytest.mark.parametrize("num_tokens", [129, 600, 5000])
def test_calls_of_more_rows_select_by_what_warmup_has_loaded(
    compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    gpu = FakeGpu(monkeypatch, (9, 0))
    pretend(monkeypatch)
    startup.warmup(V4_1_FLASH_DRAFT, f"cuda:{GPU}")
    loaded = {spec[1:] for spec in gpu.selections}
    gpu.selections.clear()
    monkeypatch.setattr(decode.cublas.cuda_module, "launch", lambda *args: None)
    hidden, gate = torch.zeros(num_tokens, 5120, dtype=torch.bfloat16), torch.zeros(128, 5120, dtype=torch.bfloat16)
    weights, ids = torch.zeros(num_tokens, 3), torch.zeros(num_tokens, 3, dtype=torch.int32)
    decode.route((hidden, gate, None, 3, 1.5, weights, ids), None, Options())
    assert {spec[1:] for spec in gpu.selections} < loaded
    assert len(gpu.selections) == 1


def test_warmup_of_unsupported_sizes_makes_no_kernel(
    compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, (9, 0))
    decode.warmup(GPU, 64, 16, 4)
    assert compilations == []
    assert gpu.linked == gpu.selections == []


def test_each_device_links_its_own(compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, (9, 0))
    for device_index in (0, 1, 0):
        decode.warmup(device_index, 5120, 128, 3)
    assert len(compilations) == len(TOKEN_TILES) + 1
    assert len(gpu.linked) == 2 * len(compilations)


@pytest.mark.parametrize(
    ("num_tokens", "launches"), [(1, [1]), (9, [9]), (128, [128]), (129, [128, 1]), (300, [128, 128, 44])]
)
def test_long_calls_are_cut_into_launches(
    compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch, num_tokens: int, launches: list[int]
) -> None:
    """Where no kernel makes logits of many rows.

    Addresses of a launch are those of its first row; the variant is the smallest for its rows.
    """
    gpu = FakeGpu(monkeypatch, (10, 0))
    hidden = torch.zeros(num_tokens, 5184, dtype=torch.bfloat16)[:, :5120]
    gate, bias = torch.zeros(128, 5120, dtype=torch.bfloat16), torch.zeros(128)
    weights, ids = torch.zeros(num_tokens, 3), torch.zeros(num_tokens, 3, dtype=torch.int64)
    logits, mask = torch.zeros(num_tokens, 128), torch.ones(num_tokens, dtype=torch.bool)
    options = Options(mask, num_tokens - 1, -7, True, False)
    decode.route((hidden, gate, bias, 3, 2.5, weights, ids), logits, options)
    assert [args[14] for _, args in gpu.launches] == launches
    first = 0
    for code, args in gpu.launches:
        rows = args[14]
        config = DecodeConfig(5120, 128, 3, next(tile for tile in TOKEN_TILES if rows <= tile))
        assert code == f"{config} for sm_100a".encode()
        stride = 5184 if num_tokens > 1 else 5120
        assert args[:6] == (hidden[first].data_ptr(), stride, gate.data_ptr(), 5120, bias.data_ptr(), 1 << 40)
        assert args[6:9] == (weights[first].data_ptr(), ids[first].data_ptr(), True)
        assert args[9:12] == (logits[first].data_ptr(), mask[first].data_ptr(), 0)
        assert args[12:14] == (num_tokens - 1, first)
        assert args[15:] == (-7, 2.5, False, decode.MAX_LOOKS, True, 77)
        assert len(args) == len(decode._ARGUMENTS) + 1
        first += rows
    assert first == num_tokens


def test_absent_tensors_are_null(compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every launch, not only the first: nothing is added to a null address."""
    gpu = FakeGpu(monkeypatch, (10, 0))
    hidden, gate = torch.zeros(200, 5120, dtype=torch.bfloat16), torch.zeros(128, 5120, dtype=torch.bfloat16)
    weights, ids = torch.zeros(200, 3), torch.zeros(200, 3, dtype=torch.int32)
    options = Options(launch_with_pdl=False)
    decode.route((hidden, gate, None, 3, 1.5, weights, ids), None, options)
    assert len(gpu.launches) == 2
    for _, args in gpu.launches:
        assert (args[4], args[8], *args[9:12], args[12]) == (0, False, 0, 0, 0, 200)


# more rows than a launch takes, on sm_90a


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of the CUDA top-k from here on, which does nothing."""
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(decode.cublas, "activation_topk", lambda *args, **how: asked.append((args, how)))
    return asked


@pytest.mark.parametrize("optional", [True, False], ids=["every-option", "no-option"])
@pytest.mark.parametrize(
    ("num_tokens", "rows_at_once", "launches"),
    [
        (128, 1 << 16, []),
        (129, 1 << 16, [(129, 8)]),
        (1024, 1 << 16, [(1024, 8)]),
        (2048, 1 << 16, [(2048, 4)]),
        (2049, 1 << 16, [(2049, 2)]),
        (33 * 128, 1 << 16, [(33 * 128, 2)]),
        (34 * 128 + 1, 1 << 16, [(34 * 128 + 1, 1)]),
        (2060, 2055, [(2055, 2), (5, 8)]),
        (300, 100, [(100, 8)] * 3),
    ],
)
def test_more_rows_take_a_launch_for_the_logits_and_a_selection(
    compilations: list[Compilation],
    selections: list[tuple[tuple[Any, ...], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    rows_at_once: int,
    launches: list[tuple[int, int]],
    optional: bool,
) -> None:
    """Of each piece of the call, whose addresses are those of its first row; K in 8, 4, 2 or 1 parts."""
    gpu = FakeGpu(monkeypatch, (9, 0))
    monkeypatch.setattr(decode, "_ROWS_AT_ONCE", rows_at_once)
    hidden = torch.zeros(num_tokens, 5184, dtype=torch.bfloat16)[:, :5120]
    gate, bias = torch.zeros(128, 5120, dtype=torch.bfloat16), torch.zeros(128) if optional else None
    weights, ids = torch.zeros(num_tokens, 3), torch.zeros(num_tokens, 3, dtype=torch.int64)
    logits = torch.zeros(num_tokens, 128) if optional else None
    mask = torch.ones(num_tokens, dtype=torch.bool)
    options = Options(mask, num_tokens - 1, -7, True, False) if optional else Options(launch_with_pdl=False)
    decode.route((hidden, gate, bias, 3, 2.5, weights, ids), logits, options)
    if not launches:
        assert [args[14] for _, args in gpu.launches] == [num_tokens]
        assert selections == []
        return
    assert gpu.linked == [f"{LogitsConfig(5120, 128, 64)} for sm_90a".encode()]
    assert gpu.workspaces == [], "no tickets, no packets"
    first = 0
    for (_, args), (selected, how), (rows, parts) in zip(gpu.launches, selections, launches, strict=True):
        partial_logits = selected[0]
        sums, first_half = {8: (8, 4), 4: (6, 3), 2: (2, None), 1: (1, None)}[parts]
        assert (partial_logits.shape, partial_logits.dtype) == ((sums, rows, 128), torch.float32)
        addresses = hidden[first].data_ptr(), 5184, gate.data_ptr(), 5120, partial_logits.data_ptr()
        early = 0 if optional else 4 if rows <= 256 else 1
        dependents = LogitsConfig(5120, 128, 64).dependents(parts, rows, 132)
        assert args == (*addresses, rows, parts, 66, early, dependents, optional, 77)
        assert len(args) == len(decode._LOGITS_ARGUMENTS) + 1
        assert how == {"first_half": first_half}
        assert selected[1] is bias
        assert selected[2:4] == (3, 2.5)
        assert [selected[i].data_ptr() for i in (4, 5)] == [weights[first].data_ptr(), ids[first].data_ptr()]
        assert len(selected[4]) == len(selected[5]) == rows
        if optional:
            of_logits, of_options = selected[6:]
            assert (of_logits.data_ptr(), len(of_logits)) == (logits[first].data_ptr(), rows)  # type: ignore[index]
            assert (of_options.token_mask.data_ptr(), len(of_options.token_mask)) == (mask[first].data_ptr(), rows)
            assert of_options[1:] == (num_tokens - 1 - first, -7, True, False)
        else:
            assert selected[6:] == (None, options)
        first += rows
    assert first == num_tokens


@pytest.mark.parametrize("rows", [1, 9, 128])
@pytest.mark.parametrize("optional", [True, False], ids=["every-option", "no-option"])
def test_rows_that_alone_begin_a_round_take_a_launch_of_the_decode_kernel(
    compilations: list[Compilation],
    selections: list[tuple[tuple[Any, ...], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    optional: bool,
) -> None:
    """After both launches for the others. The selection's tensors are the call's; its rows are those of the logits."""
    whole = 33 * 128
    num_tokens = whole + rows
    gpu = FakeGpu(monkeypatch, (9, 0))
    hidden, gate = torch.zeros(num_tokens, 5120, dtype=torch.bfloat16), torch.zeros(128, 5120, dtype=torch.bfloat16)
    weights, ids = torch.zeros(num_tokens, 3), torch.zeros(num_tokens, 3, dtype=torch.int64)
    logits = torch.zeros(num_tokens, 128) if optional else None
    mask = torch.ones(num_tokens, dtype=torch.bool)
    options = Options(mask, num_tokens - 1, -7, True, False) if optional else Options(launch_with_pdl=False)
    decode.route((hidden, gate, None, 3, 2.5, weights, ids), logits, options, max_looks=5)
    (many, of_many), (one, of_one) = gpu.launches
    assert many == f"{LogitsConfig(5120, 128, 64)} for sm_90a".encode()
    assert of_many[5:] == (whole, 2, 66, 0 if optional else 1, 0, optional, 77)
    ((selected, how),) = selections
    assert selected[0].shape == (2, whole, 128)
    assert how == {"first_half": None}
    assert [selected[i] is given for i, given in ((4, weights), (5, ids), (6, logits), (7, options))] == [True] * 4
    config = decode.variant(5120, 128, 3, next(tile for tile in TOKEN_TILES if rows <= tile), "sm_90a")
    assert one == f"{config} for sm_90a".encode()
    assert of_one[:6] == (hidden[whole].data_ptr(), 5120, gate.data_ptr(), 5120, 0, 1 << 40)
    assert of_one[6:9] == (weights[whole].data_ptr(), ids[whole].data_ptr(), True)
    if optional:
        assert logits is not None
        assert of_one[9:14] == (logits[whole].data_ptr(), mask[whole].data_ptr(), 0, num_tokens - 1, whole)
        assert of_one[14:] == (rows, -7, 2.5, False, 5, True, 77)
    else:
        assert of_one[9:14] == (0, 0, 0, num_tokens, whole)
        assert of_one[14:] == (rows, -1, 2.5, True, 5, False, 77)


def test_parts_of_an_odd_number_of_pairs(
    compilations: list[Compilation],
    selections: list[tuple[tuple[Any, ...], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first half is the larger one."""
    gpu = FakeGpu(monkeypatch, (9, 0))
    hidden, gate = torch.zeros(150, 1088, dtype=torch.bfloat16), torch.zeros(132, 1088, dtype=torch.bfloat16)
    for _ in range(2):
        decode.route((hidden, gate, None, 3, 1.0, torch.zeros(150, 3), torch.zeros(150, 3).int()), None, Options())
    assert [args[5:7] for _, args in gpu.launches] == [(150, 5)] * 2
    assert [(selected[0].shape, how) for selected, how in selections] == [((5, 150, 132), {"first_half": 3})] * 2
    assert len(gpu.linked) == 1
