# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Every CUDA kernel compiles for every architecture, without spills or local memory. Needs NVRTC, but no GPU."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dsv4_router.backends import cublas, cuda_hash, cuda_module
from dsv4_router.backends.cuda_module import KernelSpec
from dsv4_router.config import PRESETS

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
INT, LONG = torch.int32, torch.int64

TOPK = {
    f"E{e}-k{k}-{splits}-{'vector' if vector else 'scalar'}": cublas.topk_spec(e, k, ids, vector, splits)
    for e, k, ids, vector, splits in [
        *((c.num_experts, c.top_k, INT, True, splits) for c in PRESETS.values() for splits in (1, 2, 8)),
        (132, 4, LONG, True, 8),
        (512, 6, INT, True, 8),
        (516, 6, INT, True, 8),
        (255, 8, INT, False, 8),
        (1024, 16, LONG, True, 8),
        (1024, 16, INT, False, 1),
        (16, 16, INT, True, 1),
        (1, 1, INT, False, 1),
    ]
}
TOPK |= {f"{name}-logits": cublas.topk_spec(e, 6, INT, True, 8, True) for name, e in (("E256", 256), ("E384", 384))}
# Sums in two halves, of pairs of slices of K.
TOPK |= {
    f"E{e}-k{k}-{splits}-half{half}{'-logits' if store else ''}": cublas.topk_spec(e, k, INT, True, splits, store, half)
    for e, k, splits, half in [(384, 6, 8, 4), (132, 8, 5, 3)]
    for store in (False, True)
}
# The way for many rows.
TOPK |= {
    f"E{e}-k{k}-{n}-many{'-logits' if store else ''}": cublas.topk_spec(e, k, ids, vector, n, store, None, True)
    for e, k, ids, vector, n, store in [
        *((c.num_experts, c.top_k, INT, True, splits, False) for c in PRESETS.values() for splits in (1, 2)),
        (384, 6, INT, True, 1, True),
        (255, 8, LONG, False, 2, True),
        (1024, 16, INT, False, 1, False),
        (16, 16, INT, True, 1, False),
        (1, 1, INT, False, 2, False),
    ]
}
HIDDEN = {
    f"H{h}-k{k}-{size}-{'vector' if vector else 'scalar'}": cuda_hash.hidden_spec(h, k, size, vector, LONG, table, ids)
    for h, k, size, vector, table, ids in [
        *((c.hidden_size, c.top_k, 2, True, LONG, INT) for c in PRESETS.values()),
        (8192, 6, 2, True, INT, LONG),
        (8192, 16, 2, True, LONG, INT),
        (8192, 7, 2, True, LONG, INT),
        (7168, 6, 4, True, LONG, INT),
        (8192, 16, 4, True, LONG, INT),
        (7168, 6, 2, False, LONG, INT),
        (8192, 16, 4, False, LONG, INT),
        (1001, 3, 2, False, LONG, INT),
        (20001, 16, 4, False, LONG, INT),
        (8, 1, 2, True, LONG, INT),
    ]
}
TABLE = {
    f"{entry}-k{k}": cuda_hash.table_spec(entry, k, token, table, ids)
    for entry in ("hash_gather", "hash_from_logits")
    for k, token, table, ids in [(6, LONG, LONG, INT), (1, INT, INT, LONG), (16, INT, LONG, LONG)]
}


def resources(log: str, entry: str) -> dict[str, int]:
    """Registers, stack bytes and spilled bytes of a kernel, from the assembler's log."""
    section = re.search(rf"Function properties for {entry}\b(.*?)Used (\d+) registers", log, re.DOTALL)
    assert section is not None, f"the log says nothing of {entry}:\n{log}"
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section[1])
    assert numbers is not None, section[1]
    return {"registers": int(section[2]), "stack": int(numbers[1]), "spills": int(numbers[2]) + int(numbers[3])}


def check(spec: KernelSpec, architecture: str, most_registers: int) -> None:
    cubin, log = cuda_module.compile_with_log(spec, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert "warning" not in log, log
    used = resources(log, spec.entry)
    assert used["stack"] == 0, (used, log)
    assert used["spills"] == 0, (used, log)
    assert used["registers"] <= most_registers, used


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TOPK)
def test_activation_topk_compiles(name: str, architecture: str) -> None:
    spec = TOPK[name]
    macros = dict(spec.macros)
    # V4's own shapes must leave room for all rows of a call at once, of up to 4096 tokens: 32 warps an SM, or of 1024,
    # which have 8 parts: 8.
    registers = {"1": 64, "2": 64, "4": 128}.get(macros["NUM_SPLITS"], 255)
    check(spec, architecture, registers if int(macros["NUM_EXPERTS"]) <= 384 else 255)


@pytest.mark.parametrize("first_half", [0, 6])
def test_a_first_half_that_is_none_of_the_splits_does_not_compile(first_half: int) -> None:
    spec = cublas.topk_spec(132, 8, INT, True, 5, False, 3)
    wrong = tuple({**dict(spec.macros), "FIRST_HALF": str(first_half)}.items())
    with pytest.raises(Exception, match="first half out of range"):
        cuda_module.compile_with_log(KernelSpec(spec.file, spec.entry, wrong), "sm_90a")


def test_a_first_half_is_all_splits_unless_told() -> None:
    for splits in (1, 8):
        assert cublas.topk_spec(132, 8, INT, True, splits) == cublas.topk_spec(132, 8, INT, True, splits, False, splits)
    assert dict(cublas.topk_spec(132, 8, INT, True, 8, False, 4).macros)["FIRST_HALF"] == "4"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", HIDDEN)
def test_hash_from_hidden_compiles(name: str, architecture: str) -> None:
    spec = HIDDEN[name]
    check(spec, architecture, 65536 // (32 * int(dict(spec.macros)["NUM_WARPS"])))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TABLE)
def test_hash_gathers_compile(name: str, architecture: str) -> None:
    check(TABLE[name], architecture, 32)


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 1), "sm_121a")]
)
def test_architecture_of_a_device(capability: tuple[int, int], architecture: str) -> None:
    assert cuda_module.architecture(capability) == architecture
    assert cuda_module.missing_architecture(capability) is None


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    why = cuda_module.missing_architecture((19, 7))
    assert why is not None
    assert "sm_197a" in why


def test_every_kernel_file_is_compiled_here() -> None:
    compiled = {spec.file for spec in (*TOPK.values(), *HIDDEN.values(), *TABLE.values())}
    assert compiled == {path.name for path in cuda_module.kernel_folder().glob("*.cu")}
    assert set(cuda_module.HEADERS) == {path.name for path in cuda_module.kernel_folder().glob("*.cuh")}


def test_local_memory_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local.cu").write_text(
        'extern "C" __global__ void local(int* p, int n) { int a[64]; for (int i = 0; i < 64; i++) a[i] = p[i];\n'
        "  for (int i = 0; i < n; i++) a[p[i] & 63] += i; for (int i = 0; i < 64; i++) p[i] = a[i]; }\n"
    )
    monkeypatch.setattr(cuda_module, "kernel_folder", lambda: tmp_path)
    with pytest.raises(AssertionError, match="stack"):
        check(KernelSpec("local.cu", "local", (("UNUSED", "1"),)), "sm_90a", 255)


def test_a_header_change_is_another_cache_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = cublas.topk_spec(16, 1, INT, False)
    for name in (spec.file, *cuda_module.HEADERS):
        (tmp_path / name).write_text((cuda_module.kernel_folder() / name).read_text())
    monkeypatch.setattr(cuda_module, "kernel_folder", lambda: tmp_path)
    keys = []
    monkeypatch.setattr(cuda_module.jit_cache, "load_or_build", lambda key, suffix, build: keys.append(key))
    cuda_module.cubin(spec, "sm_90a")
    cuda_module.cubin(spec, "sm_80")
    header = tmp_path / cuda_module.HEADERS[0]
    header.write_text(header.read_text() + "// changed\n")
    cuda_module.cubin(spec, "sm_90a")
    assert len(set(keys)) == 3


def test_an_option_change_is_another_cache_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(cuda_module.jit_cache, "load_or_build", lambda key, suffix, build: keys.append(key))
    cuda_module.cubin(cublas.topk_spec(16, 1, INT, False), "sm_90a")
    monkeypatch.setitem(cuda_module.COMPILE_OPTIONS, "lineinfo", False)
    cuda_module.cubin(cublas.topk_spec(16, 1, INT, False), "sm_90a")
    assert len(set(keys)) == 2


def test_threads_that_come_first_together_get_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second kernel object would be unloaded while its launch is in flight."""
    made = []

    def load(spec: KernelSpec, device_index: int) -> object:
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    monkeypatch.setattr(cuda_module, "_load", load)
    monkeypatch.setattr(cuda_module, "_loaded", {})
    spec = cublas.topk_spec(16, 1, INT, False)
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: cuda_module.load(spec, 0), range(8)))
    assert len(made) == 1
    assert all(kernel is made[0] for kernel in kernels)


def test_warps_of_a_block_fit_every_hidden_size() -> None:
    for hidden_size in range(8, 20001, 8):
        for top_k, operand_bytes in ((1, 2), (6, 2), (16, 2), (6, 4)):
            warps = cuda_hash.num_warps(hidden_size, top_k, operand_bytes)
            chunks = hidden_size // (16 // operand_bytes)
            rounds = -(-chunks // (32 * warps))
            assert 1 <= warps <= 28
            assert 32 * warps * rounds - chunks < 32 * rounds, "a round leaves less than a warp idle"
