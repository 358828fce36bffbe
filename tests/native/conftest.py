"""A folder to build in, with a compiler that counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.compilers import Builder


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """This process builds there too."""
    made = Builder(tmp_path)
    made.write_compiler()
    for name in ("CXX", "FASTGRAD_CACHE", "FASTGRAD_NATIVE", "FASTGRAD_QUIET"):
        monkeypatch.setenv(name, made.environment[name])
    return made


@pytest.fixture
def alone(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel but that of a step, within `counted`: nothing else is built."""
    monkeypatch.setenv("FASTGRAD_NATIVE", "0")
