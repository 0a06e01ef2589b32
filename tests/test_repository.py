# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Documents name what exists, and the code keeps its own rules of size."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("profiling/*.md")])
SOURCES = sorted(path for folder in ("src", "kernels", "tests", "profiling") for path in (ROOT / folder).rglob("*.py"))
KERNELS = sorted([*(ROOT / "kernels").glob("*.cu*"), *(ROOT / "tests").rglob("*.cu")])


def named_paths(text: str) -> set[str]:
    """What looks like a path of this repository: in backticks or a link, with a slash or a known ending."""
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"\]\(([^)#\s]+)", text)
    words = {word.strip(".,:;") for span in spans for word in span.split()}
    path = re.compile(r"^[\w.-]+(/[\w.*-]+)*/?$")
    ending = re.compile(r"\.(py|cu|cuh|md|toml|json|jsonl|txt|in|sh)$|/")
    return {word for word in words if path.match(word) and ending.search(word)}


def exists(name: str, beside: Path = ROOT) -> bool:
    places = [ROOT, ROOT / "src" / "dsv4_router", beside]
    return any(list(place.glob(name.rstrip("/"))) for place in places)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_exist(document: Path) -> None:
    names = named_paths(document.read_text())
    assert names, "a document that names no file at all"
    examples = {"config.json", "layer.safetensors", "model.safetensors.index.json"}  # of users, not of this repository
    assert not sorted(name for name in names - examples if not exists(name, document.parent))


def test_a_dead_pointer_would_be_seen() -> None:
    names = named_paths("see `src/dsv4_router/no_such_file.py` and [this](kernels/none.cu), `torch.mm`, `a / b`")
    assert names == {"src/dsv4_router/no_such_file.py", "kernels/none.cu"}
    assert not any(exists(name) for name in names)


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"`?make ([\w-]+)", (ROOT / "README.md").read_text()))
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= rules


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_no_place_of_a_machine(document: Path) -> None:
    assert not re.findall(r"(?<![\w.~])/(?:home|root|work|tmp|opt|usr)/\S*", document.read_text())


@pytest.mark.parametrize("path", SOURCES + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 800
    assert "SPDX-License-Identifier: Apache-2.0" in text.splitlines()[0]
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno <= 150, node.name


def test_environment_is_read_in_one_module() -> None:
    readers = {
        path.name for path in (ROOT / "src").rglob("*.py") if re.search(r"\benviron\b|\bgetenv\b", path.read_text())
    }
    assert readers == {"settings.py"}
    variables = set(re.findall(r'"([A-Z][A-Z0-9_]{3,})"', (ROOT / "src/dsv4_router/settings.py").read_text()))
    assert len(variables) <= 5


def test_no_build_output_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout; this is an unpacked archive")
    assert not re.findall(r"\.(?:pyc|so|cubin|o|whl)$", listed.stdout, re.MULTILINE)
