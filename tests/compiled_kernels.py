# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""CuTe DSL kernels compiled for tests, and what they are made of. Needs no GPU."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from dsv4_router.backends import decode

Config = TypeVar("Config", bound=decode.Config)
MOST_SECONDS = 15.0  # of processor time to compile a kernel: a busy machine takes longer, but not of that

# A process compiles its share, as a server would: one kernel after the other.
_COMPILE = """
import pickle, sys, time
from pathlib import Path
from dsv4_router.backends import decode

share, results = map(Path, sys.argv[1:])
done = {}
for config, target in pickle.loads(share.read_bytes()):
    started = time.process_time()
    code, compiled = decode.compile_object(config, target)
    seconds = time.process_time() - started
    compiled.export_to_c(f"{share}.ll", function_name="route")
    done[config, target] = code, seconds, Path(f"{share}.ll").read_text()
results.write_bytes(pickle.dumps(done))
"""


@dataclass(frozen=True)
class Compiled:
    """A kernel's object file, its host code as LLVM IR, its kernel as SASS, and its seconds of processor time."""

    code: bytes
    seconds: float
    host: str
    sass: str

    @property
    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs, by its full name."""
        return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", self.sass, re.MULTILINE))

    def count(self, instruction: str) -> int:
        """Of an instruction with any modifiers."""
        return sum(number for name, number in self.opcodes.items() if name.split(".")[0] == instruction)

    def attributes(self, name: str) -> list[int]:
        """What the cubin says of each of its functions, such as ``"FRAME_SIZE"``."""
        entries = re.findall(rf"EIATTR_{name}\n.*?\.word\s+index@.*?\.word\s+(0x[0-9a-f]+)", self.sass, re.DOTALL)
        return [int(value, 16) for value in entries]


def nvdisasm() -> str:
    """The disassembler, from the wheel that the test extra names."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    if not found:
        pytest.fail("these tests need nvidia-cuda-nvdisasm: pip install -e '.[test]'")
    return found[0]


def disassemble(tool: str, folder: Path, numbered: tuple[int, bytes]) -> str:
    number, code = numbered
    cubin = folder / f"{number}.cubin"
    cubin.write_bytes(code[code.index(b"\x7fELF", 4) :])  # inside the object file
    done = subprocess.run([tool, str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_jobs(jobs: Sequence[tuple[Config, str]], folder: Path) -> dict[tuple[Config, str], Compiled]:
    """Kernels for architectures, compiled by as many processes as there are processors."""
    tool = nvdisasm()
    workers = min(os.cpu_count() or 1, 8, len(jobs))

    def work(number: int) -> dict[tuple[Config, str], tuple[bytes, float, str]]:
        share, results = folder / f"share{number}", folder / f"results{number}"
        share.write_bytes(pickle.dumps(jobs[number::workers]))
        command = [sys.executable, "-P", "-c", _COMPILE, str(share), str(results)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        made: dict[tuple[Config, str], tuple[bytes, float, str]] = pickle.loads(results.read_bytes())
        return made

    with ThreadPoolExecutor(workers) as pool:
        made = {job: parts for share in pool.map(work, range(workers)) for job, parts in share.items()}
        objects = enumerate(code for code, _, _ in made.values())
        listings = pool.map(partial(disassemble, tool, folder), objects)
        return {job: Compiled(*parts, sass) for (job, parts), sass in zip(made.items(), listings, strict=True)}
