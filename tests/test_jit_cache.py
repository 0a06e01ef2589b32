# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The cache of compiled kernels: hits, damage, folders that cannot be used, processes that start together."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dsv4_router import jit_cache
from dsv4_router.settings import CACHE_DIR_VARIABLE, cache_dir

PAYLOAD = bytes(range(256)) * 5
PARTS = {"source": "void f() {}", "options": "-O3", "architecture": "sm_90", "compiler": "13.0", "macros": "E=256"}
KEY = jit_cache.entry_key(PARTS)
NUM_PROCESSES = 4


class Builder:
    """Counts its calls."""

    def __init__(self, payload: bytes = PAYLOAD) -> None:
        self.payload = payload
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.payload


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some" / "cache"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(path))
    return path


def entry(folder: Path) -> Path:
    return folder / f"{KEY}.cubin"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "dsv4_router.jit_cache" and record.levelno == logging.WARNING
    ]


@pytest.mark.parametrize("payload", [PAYLOAD, b"", b"x" * 31, b"x" * 33], ids=len)
def test_miss_then_hit(folder: Path, payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Builder(payload), Builder(b"never")
    assert jit_cache.load_or_build(KEY, ".cubin", first) == payload
    assert entry(folder).is_file()
    assert jit_cache.load_or_build(KEY, ".cubin", second) == payload
    assert (first.calls, second.calls) == (1, 0)
    assert warnings_of(caplog) == []


def test_nothing_but_entry_and_lock_is_left(folder: Path) -> None:
    jit_cache.load_or_build(KEY, ".cubin", Builder())
    assert {path.name for path in folder.iterdir()} <= {f"{KEY}.cubin", f"{KEY}.cubin.lock"}


def test_entries_are_as_readable_as_any_new_file(folder: Path) -> None:
    """What root compiles in an image, a server that is not root shall find."""
    before = os.umask(0o027)
    try:
        jit_cache.load_or_build(KEY, ".cubin", Builder())
    finally:
        os.umask(before)
    assert entry(folder).stat().st_mode & 0o777 == 0o640


def test_suffix_and_key_separate_entries(folder: Path) -> None:
    builders = [Builder(b"a"), Builder(b"b"), Builder(b"c")]
    other = jit_cache.entry_key({"source": "other"})
    for _ in range(2):
        assert jit_cache.load_or_build(KEY, ".cubin", builders[0]) == b"a"
        assert jit_cache.load_or_build(KEY, ".ptx", builders[1]) == b"b"
        assert jit_cache.load_or_build(other, ".cubin", builders[2]) == b"c"
    assert [builder.calls for builder in builders] == [1, 1, 1]


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flip(content, 0),
        lambda content: flip(content, 31),
        lambda content: flip(content, 32),
        lambda content: flip(content, len(content) - 1),
        lambda content: content[:-1],
        lambda content: content[:32],
        lambda content: content[:7],
        lambda content: b"",
        lambda content: content + b"\0",
    ],
    ids=["digest", "digest-end", "first", "last", "truncated", "only-digest", "half-digest", "empty", "longer"],
)
def test_damaged_entry_is_built_again(
    folder: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    jit_cache.load_or_build(KEY, ".cubin", Builder())
    good = entry(folder).read_bytes()
    entry(folder).write_bytes(damage(good))
    again = Builder()
    assert jit_cache.load_or_build(KEY, ".cubin", again) == PAYLOAD
    assert again.calls == 1
    assert entry(folder).read_bytes() == good
    assert any("damaged" in message and str(entry(folder)) in message for message in warnings_of(caplog))
    assert jit_cache.load_or_build(KEY, ".cubin", again) == PAYLOAD
    assert again.calls == 1


@pytest.mark.parametrize("below", ["", "deeper/still"], ids=["file", "below-a-file"])
def test_unusable_folder_costs_compilations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, below: str
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(blocker / below))
    builder = Builder()
    for calls in (1, 2):
        caplog.clear()
        assert jit_cache.load_or_build(KEY, ".cubin", builder) == PAYLOAD
        assert builder.calls == calls
        assert any("not usable" in message and str(blocker) in message for message in warnings_of(caplog))
    assert blocker.read_text() == "not a folder"


def test_entry_that_cannot_be_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (entry(folder) / "in the way").mkdir(parents=True)  # a folder with content cannot be replaced by a file
    builder = Builder()
    assert jit_cache.load_or_build(KEY, ".cubin", builder) == PAYLOAD
    assert builder.calls == 1
    assert any("not written" in message for message in warnings_of(caplog))
    assert list(folder.glob(".*.part")) == [], "a failed write left its temporary file"


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert jit_cache.load_or_build(KEY, ".cubin", Builder()) == PAYLOAD
    assert any("No space left on device" in message for message in warnings_of(caplog))
    assert list(folder.glob(".*.part")) == [], "a failed write left its temporary file"


def test_lock_held_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(jit_cache, "_LOCK_SECONDS", 0.1)
    folder.mkdir(parents=True)
    builder = Builder()
    with FileLock(f"{entry(folder)}.lock"):
        assert jit_cache.load_or_build(KEY, ".cubin", builder) == PAYLOAD
    assert builder.calls == 1
    assert not entry(folder).exists()
    assert any("not usable" in message for message in warnings_of(caplog))


def test_file_system_without_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(lock: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert jit_cache.load_or_build(KEY, ".cubin", Builder()) == PAYLOAD
    assert any("not usable" in message and "flock" in message for message in warnings_of(caplog))
    with pytest.raises(OSError, match="flock"):
        jit_cache.locked(folder / "thresholds.jsonl")


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_build_error_propagates_and_stores_nothing(folder: Path, error: type[BaseException]) -> None:
    def fail() -> bytes:
        raise error("error: expected a ';'")

    with pytest.raises(error, match="expected a ';'"):
        jit_cache.load_or_build(KEY, ".cubin", fail)
    assert {path.name for path in folder.iterdir()} <= {f"{KEY}.cubin.lock"}
    builder = Builder()
    assert jit_cache.load_or_build(KEY, ".cubin", builder) == PAYLOAD  # the lock was released
    assert builder.calls == 1


# Each process reports that it is ready, waits for the others, and builds; fresh interpreters, as ranks are.
_PROCESS = """
import sys, time
from dsv4_router import jit_cache

key, counter = sys.argv[1:]

def build():
    with open(counter, "ab", buffering=0) as file:
        file.write(b"x")
    time.sleep(0.3)
    return bytes(range(256)) * 5

print("ready", flush=True)
sys.stdin.readline()
print(jit_cache.load_or_build(key, ".cubin", build) == bytes(range(256)) * 5, flush=True)
"""


def test_processes_that_start_together_build_once(folder: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    command = [sys.executable, "-c", _PROCESS, KEY, str(counter)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(NUM_PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert answers == ["True\n"] * NUM_PROCESSES
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES
    assert counter.read_bytes() == b"x"
    assert entry(folder).is_file()


def test_threads_build_once(folder: Path) -> None:
    calls: list[int] = []
    answers: list[bytes] = []
    barrier = threading.Barrier(NUM_PROCESSES)

    def build() -> bytes:
        calls.append(1)
        time.sleep(0.1)
        return PAYLOAD

    def work() -> None:
        barrier.wait()
        answers.append(jit_cache.load_or_build(KEY, ".cubin", build))

    threads = [threading.Thread(target=work) for _ in range(NUM_PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [PAYLOAD] * NUM_PROCESSES
    assert len(calls) == 1


@pytest.mark.parametrize("part", PARTS)
def test_key_depends_on_every_part(part: str) -> None:
    changed = {**PARTS, part: PARTS[part] + " "}
    missing = {name: value for name, value in PARTS.items() if name != part}
    renamed = {**missing, part + "_": PARTS[part]}
    assert len({KEY, *(jit_cache.entry_key(parts) for parts in (changed, missing, renamed))}) == 4


def test_key_is_a_plain_hash_of_names_and_values() -> None:
    assert jit_cache.entry_key(dict(reversed(PARTS.items()))) == KEY
    assert len(KEY) == 64
    assert set(KEY) <= set("0123456789abcdef")
    assert jit_cache.entry_key({"a": "b", "c": "d"}) != jit_cache.entry_key({"a": "d", "c": "b"})
    assert jit_cache.entry_key({"a": 'b", "c": "d'}) != jit_cache.entry_key({"a": "b", "c": "d"})


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "dsv4-router"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "dsv4-router"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "chosen"))
    assert cache_dir() == tmp_path / "chosen"


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container run with a number for a user: a call must still work."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_DIR_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert jit_cache.load_or_build(KEY, ".cubin", Builder()) == PAYLOAD
