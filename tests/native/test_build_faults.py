"""A build of a C++ kernel that fails, or is killed, at any step gives a whole library, now or at the next run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fastgrad_compiler.runtime import native, private_files
from fastgrad_compiler.runtime.native import NativeError, build
from tests.faults import KINDS, each_fault
from tests.native.compilers import Builder

LIBRARY = b"a library, whole\n" * 100
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then [ "$2" = - ] || cp "$0.library" "$2"; fi; shift; done
"""


WIDE = [pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS]
REASONS = (
    "whole",
    "No space left on device",
    "compiler, is not there",
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "stride"), [*((kind, 31) for kind in KINDS), *WIDE])
def test_a_library_is_whole_or_not_there(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stride: int
) -> None:
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler.library").write_bytes(LIBRARY)
    temporary = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    native.find_compiler()

    def prepare() -> None:
        for folder in (builder.cache, temporary):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir()
        private_files.private_folder.cache_clear()
        private_files.remove_dead_folders.cache_clear()

    def run() -> str:
        try:
            path = build("attention_x", "text", "float32", lambda what: None)
        except NativeError as error:
            return str(error)
        return "whole" if path.read_bytes() == LIBRARY else "damaged"

    for outcome in each_fault(kind, prepare, run, stride):
        if not outcome.killed:
            assert any(reason in outcome.said for reason in REASONS), outcome
        assert all(path.read_bytes() == LIBRARY for path in builder.libraries())
        assert run() == "whole"
        assert [path.read_bytes() for path in builder.libraries()] == [LIBRARY]
        names = [path.name for path in (*builder.cache.iterdir(), *temporary.iterdir())]
        assert [name for name in names if name.endswith(".tmp")] == [], outcome
        assert len(list(temporary.iterdir())) <= 1, outcome  # of this process
