# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiled kernels on disk, shared by processes.

An entry is one file, named by the hash of everything that its content depends on. Its first 32 bytes are the SHA-256
of the rest, so a truncated or damaged file is a miss and is compiled again. Files appear by rename, under a lock
per entry, so that eight ranks that start together compile once. A cache that cannot be written costs compilations,
never a call.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from filelock import FileLock

from . import settings

_log = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_LOCK_SECONDS = 60.0  # longer than any compilation; after that, compile without waiting


def versions_of(packages: Iterable[str], missing: str = "unknown") -> dict[str, str]:
    """The version of each distribution, or ``missing``: what lies on the path need not have been installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = missing
    return found


def entry_key(parts: Mapping[str, str]) -> str:
    """The SHA-256, in hexadecimal, of named strings; the order of names does not matter."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        _log.warning("damaged cache entry %s: compiling again", path)
        return None
    return payload


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: it is the old one or the whole new one at any time.

    Its mode is that of any new file, so that what root prepares in an image serves a server that is not root.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def locked(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
    """The lock beside a file, held until the end of a ``with`` statement.

    Args:
        path: of the file, which need not exist.
        timeout: seconds to wait for another process; without it, as long as it takes.

    Raises:
        OSError: the folder cannot be written, its file system has no locks, or the time has passed.
    """
    try:
        return FileLock(f"{path}.lock", timeout=timeout).acquire()
    except NotImplementedError as error:  # of some versions, where the file system has no locks
        raise OSError(f"{path}.lock: {error}") from None


def load_or_build(key: str, suffix: str, build: Callable[[], bytes]) -> bytes:
    """The payload of entry ``key``, built and stored when it is missing or damaged.

    Args:
        key: from :func:`entry_key`.
        suffix: the file's ending, for people who look into the folder, such as ``".cubin"``.
        build: makes the payload; whatever it raises goes to the caller, and nothing is stored.
    """
    path = settings.cache_dir() / f"{key}{suffix}"
    if (payload := _read(path)) is not None:
        return payload
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = locked(path, _LOCK_SECONDS)
    except OSError as error:
        _log.warning("kernel cache %s not usable (%s): compiling without it", path.parent, error)
        return build()
    with held:
        if (payload := _read(path)) is None:
            payload = build()
            try:
                replace_file(path, hashlib.sha256(payload).digest() + payload)
            except OSError as error:
                _log.warning("kernel cache %s not written: %s", path, error)
        return payload
