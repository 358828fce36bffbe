"""Building the kernels of a model ahead of its first call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrad_compiler.runtime import native
from fastgrad_dsl.api import native_build

FILES = {"attention_a.cpp": "a", "rows_b.cpp": "b", "model.py": "no kernel", "attention_a.py": "no kernel"}


def quiet(what: str) -> None:
    """Nothing."""


def test_kernels_are_built_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "enabled", lambda: True)
    monkeypatch.setattr(native_build.os, "cpu_count", lambda: 2)  # type: ignore[attr-defined]
    together, built = threading.Barrier(2, timeout=30), []

    def build(name: str, text: str, variant: str, announce: Callable[[str], None]) -> Path:
        together.wait()
        built.append((name, text, variant))
        return Path()

    monkeypatch.setattr(native, "build", build)
    assert native_build.build_kernels(FILES, quiet) is None
    assert sorted(built) == [("attention_a", "a", "float32"), ("rows_b", "b", "float32")]


def test_one_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "enabled", lambda: True)

    def build(name: str, text: str, variant: str, announce: Callable[[str], None]) -> Path:
        if name == "rows_b":
            raise native.NativeError("out of luck")
        return Path()

    monkeypatch.setattr(native, "build", build)
    warning = native_build.build_kernels(FILES, quiet)
    assert warning is not None
    assert (warning.code, warning.severity) == ("FG422", "warning")
    assert "out of luck" in warning.message
