"""A compile that fails, or is killed, at any step leaves the old build or the new one, and the user's files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.storage import build_folder
from fastgrad_dsl.storage.build_folder import recover, write_build
from fastgrad_dsl.storage.files import write_atomically
from tests.dsl.test_build_folder import NEW, OLD, content
from tests.dsl.test_cli import SPEC
from tests.faults import KINDS, each_fault, fresh

MINE = {"mine": "mine", "runs/log": "mine", "stages/notes": "mine"}


@pytest.fixture(params=["exchanged", "renamed twice", "copied"])
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old build with files of the user's, for each way to replace it."""
    if request.param == "renamed twice":
        monkeypatch.setattr(build_folder, "exchange", lambda first, second: False)
    if request.param == "copied":
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", no_links, raising=False)
    write_build(tmp_path / "old" / "build", OLD)
    for name, text in MINE.items():
        (tmp_path / "old" / "build" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "old" / "build" / name).write_text(text)
    return tmp_path / "old" / "build"


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synchronised is not waited for: its effect shows only after a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def each(stride: int) -> pytest.MarkDecorator:
    """The kinds of faults, each at one operation in `stride`; at every one in the slow tests."""
    wide = [pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS]
    return pytest.mark.parametrize(("kind", "stride"), [*((kind, stride) for kind in KINDS), *wide])


@pytest.mark.sampled(4)
@each(41)
def test_a_build_is_replaced_whole_or_not_at_all(old: Path, tmp_path: Path, kind: str, stride: int) -> None:
    folder = tmp_path / "place" / "build"

    def run() -> str:
        write_build(folder, NEW)
        return "written"

    states = (OLD | MINE, NEW | MINE)
    failed = 0
    for outcome in each_fault(kind, lambda: fresh(old, folder), run, stride):
        if outcome.killed:
            recover(folder)
            assert content(folder) in states, outcome
        elif outcome.status == 2:
            failed += 1
            assert "[FG421] cannot write to" in outcome.said
            assert "No space left on device" in outcome.said
            assert content(folder) == states[0], outcome
        else:
            assert (outcome.status, outcome.said) == (0, "written"), outcome
            assert content(folder) == states[1], outcome
        write_build(folder, NEW)
        assert content(folder) == states[1], outcome
        assert os.listdir(folder.parent) == ["build"], outcome
    assert failed >= (5 if stride == 1 else 1) or "killed" in kind


@pytest.mark.sampled(2)
@each(7)
def test_a_first_build_is_whole_or_not_there(tmp_path: Path, kind: str, stride: int) -> None:
    folder = tmp_path / "place" / "build"

    def run() -> str:
        write_build(folder, NEW)
        return "written"

    for outcome in each_fault(kind, lambda: shutil.rmtree(folder.parent, ignore_errors=True), run, stride):
        assert outcome.status != 1, outcome.said
        assert not folder.exists() or content(folder) == NEW, outcome
        write_build(folder, NEW)
        assert content(folder) == NEW
        assert os.listdir(folder.parent) == ["build"], outcome


@each(3)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, kind: str, stride: int) -> None:
    file = tmp_path / "place" / "report.json"

    def prepare() -> None:
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
        file.write_text("old")

    def run() -> str:
        try:
            write_atomically(file, "new")
        except OSError as error:
            return str(error.strerror)
        return "written"

    for outcome in each_fault(kind, prepare, run, stride):
        assert outcome.status != 1, outcome.said
        assert file.read_text() == "new" if outcome.said == "written" else file.read_text() in ("old", "new")
        if outcome.said not in ("written", ""):
            assert (outcome.said, file.read_text()) == ("No space left on device", "old")
            assert os.listdir(file.parent) == ["report.json"]
        write_atomically(file, "new")
        assert os.listdir(file.parent) == ["report.json"], outcome


@contextlib.contextmanager
def small_disk(where: Path, kilobytes: int) -> Iterator[None]:
    """A file system of a size, mounted at a folder; the test is skipped where that is not permitted."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"nothing can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_keeps_the_build_that_is_there(tmp_path: Path) -> None:
    """At every amount of free space, by pages of 4 KiB, that is too small for the next build."""
    first, second = (fg.compile(SPEC.replace("512", str(size)), validate=False) for size in (512, 1024))
    need = sum(len(text.encode()) // 4096 + 1 for text in second.files.values()) + 3
    with small_disk(tmp_path / "disk", 4 * 4096):
        folder = tmp_path / "disk" / "build"
        write_build(folder, first.files)
        (folder / "weights.safetensors").write_text("mine")
        before = content(folder)
        free = os.statvfs(folder).f_bavail
        filler = tmp_path / "disk" / "filler"
        for left in (0, 1, 2, need // 4, need // 2, need - 8):
            filler.write_bytes(b"x" * 4096 * (free - left))
            with pytest.raises(fg.TfgError, match="No space left on device"):
                second.write(folder)
            assert content(folder) == before
            assert sorted(os.listdir(tmp_path / "disk")) == ["build", "filler"]
            filler.unlink()
        second.write(folder)
        assert content(folder) == {**second.files, "weights.safetensors": "mine"}


def test_a_folder_that_is_a_mount_point_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512):
        with pytest.raises(fg.TfgError, match="is a mount point"):
            write_build(tmp_path / "disk", NEW)
        write_build(tmp_path / "disk" / "build", NEW)
