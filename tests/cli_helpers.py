# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What tests of the command line share; no GPU test does, so the record of a GPU run does not vouch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]  # the fixture below


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process: exit code, stdout, stderr."""
    from dsv4_router import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return code or 0, streams.out, streams.err

    return call


def assert_one_line_error(result: tuple[int, str, str], *expected: str) -> None:
    """What the command line printed is an error of one line, with some words."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("dsv4-router: error: ")
    assert all(text in err for text in expected), err
