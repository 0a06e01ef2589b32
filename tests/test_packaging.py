# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Wheel, sdist and import: every kernel file arrives, and importing is cheap and touches no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsv4_router.backends import cuda_module
from dsv4_router.profiling import report

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh", ".py"))


def run(*command: str, **variables: str) -> str:
    result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel is built from the sdist, as an index would get it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def test_wheel_holds_every_kernel_file(distributions: dict[str, Path]) -> None:
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert len(KERNELS) >= 4
    assert sorted(name for name in names if "/kernels/" in name) == [f"dsv4_router/kernels/{name}" for name in KERNELS]
    assert "dsv4_router/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "profiling/"))]


def test_sdist_holds_what_a_checkout_holds(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"kernels/{name}" for name in KERNELS}
    wanted |= {"README.md", "ARCHITECTURE.md", "LICENSE", "Makefile", "tests/conftest.py", "profiling/bench.py"}
    wanted |= {"tests/gpu/late_writer.cu", "tests/gpu_evidence.json", "constraints.txt"}
    assert wanted <= names


def test_installed_wheel_compiles_a_kernel(distributions: dict[str, Path], tmp_path: Path) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path),
        str(distributions["wheel"]),
    )
    code = (
        "import torch, dsv4_router; from dsv4_router.backends import cublas, cuda_module\n"
        "print(dsv4_router.__file__, cuda_module.kernel_folder())\n"
        "print(len(cuda_module.cubin(cublas.topk_spec(256, 6, torch.int32, True), 'sm_90a')))"
    )
    python = [sys.executable, "-P", "-c", code]
    out = run(*python, PYTHONPATH=str(tmp_path), DSV4_ROUTER_CACHE_DIR=str(tmp_path / "cache")).split()
    assert all(Path(path).is_relative_to(tmp_path) for path in out[:2]), out
    assert int(out[2]) > 1000


def test_kernels_are_imported_under_their_own_name() -> None:
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"dsv4_router\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Every public name but the kernel's own class, which is CuTe DSL.
IMPORT = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import dsv4_router
for name in dsv4_router.__all__:
    if name != "DenseRouterDecodeKernel":
        getattr(dsv4_router, name)
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
loaded = new & {"cutlass", "cuda", "tvm_ffi", "transformers", "rich", "safetensors"}
print(seconds, torch.cuda.is_initialized(), sorted(loaded))
"""


def test_import_is_cheap_and_touches_no_gpu() -> None:
    """The least of three, since a busy machine only ever adds."""
    runs = [run(sys.executable, "-c", IMPORT).split(maxsplit=2) for _ in range(3)]
    assert min(float(seconds) for seconds, _, _ in runs) < 0.3
    assert {initialised for _, initialised, _ in runs} == {"False"}
    assert {loaded.strip() for _, _, loaded in runs} == {"[]"}


def test_every_public_name_exists() -> None:
    import dsv4_router

    assert len(set(dsv4_router.__all__)) == len(dsv4_router.__all__)
    for name in dsv4_router.__all__:
        assert getattr(dsv4_router, name) is not None
    assert set(dsv4_router.__all__) <= set(dir(dsv4_router))
    with pytest.raises(AttributeError, match="no_such_name"):
        dsv4_router.no_such_name  # noqa: B018


def test_the_hash_of_sources_is_that_of_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whose folder of kernels lies elsewhere, behind the package's own in the order of paths."""
    in_checkout, kernels = report.source_hash(), tmp_path / "site-packages" / "kernels"
    shutil.copytree(cuda_module.kernel_folder(), kernels)
    monkeypatch.setattr(cuda_module, "kernel_folder", lambda: kernels)
    assert report.source_hash() == in_checkout
    next(kernels.glob("*.cu")).rename(kernels / "another.cu")
    assert report.source_hash() != in_checkout
