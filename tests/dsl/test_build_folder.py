"""What a compile does to the folder that it writes: its own files are replaced, the user's are kept or it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.documents.files import Files
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.storage import build_folder
from fastgrad_dsl.storage.build_folder import recover, write_build
from fastgrad_dsl.storage.build_manifest import MANIFEST, read_manifest
from tests.dsl.test_cli import SPEC

OLD = {"model.py": "old = 1\n", "plan.json": "{}\n", "gone.py": "gone = 1\n", "stages/00-a.txt": "a\n"}
NEW = {"model.py": "new = 2\n", "plan.json": "[]\n", "stages/00-a.txt": "b\n", "stages/01-b.txt": "c\n"}


@pytest.fixture(params=["exchanged", "renamed twice"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the old build, where folders can be exchanged at once and where they cannot."""
    if request.param == "renamed twice":
        monkeypatch.setattr(build_folder, "exchange", lambda first, second: False)
    write_build(tmp_path / "inside" / "build", OLD)
    return tmp_path / "inside" / "build"


def content(folder: Path) -> dict[str, str]:
    """Each file of a folder but its manifest, links as what they say."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text(errors="replace")
        for name, path in paths.items()
        if name != MANIFEST and (path.is_symlink() or path.is_file())
    }


def refused(folder: Path, code: str = "FG428", files: dict[str, str] = NEW) -> str:
    """What is said where a build is refused and nothing changes."""
    before = content(folder.parent)
    with pytest.raises(fg.TfgError) as caught:
        write_build(folder, files)
    assert content(folder.parent) == before
    (found,) = caught.value.diagnostics
    assert found.code == code
    return found.message


def test_a_build_replaces_a_build(folder: Path) -> None:
    assert content(folder) == OLD
    write_build(folder, NEW)
    assert content(folder) == NEW
    assert sorted(read_manifest(folder) or {}) == sorted(NEW)
    assert os.listdir(folder.parent) == ["build"]
    write_build(folder, NEW)
    (folder / "model.py").unlink()  # what is missing is written again
    write_build(folder, NEW)
    assert content(folder) == NEW


def test_files_of_the_user_are_kept(folder: Path) -> None:
    (folder / "weights.safetensors").write_text("mine")
    (folder / "runs" / "deep").mkdir(parents=True)
    (folder / "runs" / "deep" / "log").write_text("mine")
    (folder / "runs" / "empty").mkdir()
    (folder / "stages" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    (folder / "runs").chmod(0o750)
    folder.chmod(0o711)
    inode = (folder / "runs" / "deep" / "log").stat().st_ino
    with (folder / "weights.safetensors").open("a") as stream:
        write_build(folder, NEW)
        stream.write(", all of it")
    expected = {
        "weights.safetensors": "mine, all of it", "runs/deep/log": "mine", "stages/notes.txt": "mine",
        "link": "-> /etc/passwd",
    }  # fmt: skip
    assert content(folder) == NEW | expected
    assert (folder / "runs" / "deep" / "log").stat().st_ino == inode
    assert (folder / "runs" / "empty").is_dir()
    assert (folder / "pipe").is_fifo()
    assert [(folder / name).stat().st_mode & 0o777 for name in (".", "runs")] == [0o711, 0o750]
    assert os.listdir(folder.parent) == ["build"]


def test_files_of_the_user_are_copied_where_there_are_no_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    (folder / "mine").write_text("mine")
    (folder / "link").symlink_to("model.py")
    monkeypatch.setattr(os, "link", no)
    write_build(folder, NEW)
    assert content(folder) == NEW | {"mine": "mine", "link": "-> model.py"}
    os.mkfifo(folder / "pipe")
    assert "not permitted" in refused(folder, "FG421")


def test_bytecode_is_not_carried_over(folder: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.pyc").write_text("stale")
    write_build(folder, NEW)
    assert content(folder) == NEW


def test_a_file_that_appears_at_the_last_moment_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that an editor replaces then."""
    (folder / "mine").write_text("first")
    put = build_folder._put

    def late(new: Path, real: Path) -> None:
        (real / "late").write_text("mine")
        (real / "runs").mkdir()
        (real / "runs" / "late").write_text("mine")
        (real / "aside").write_text("second")
        (real / "aside").replace(real / "mine")
        put(new, real)

    monkeypatch.setattr(build_folder, "_put", late)
    write_build(folder, NEW)
    assert content(folder) == NEW | {"late": "mine", "runs/late": "mine", "mine": "second"}


# ---------------------------------------------------------------- what is refused


def test_a_folder_of_the_users_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    write_build(folder, OLD)  # an empty one is free
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.py").write_text("mine")
    (folder / "notes").write_text("mine")
    assert "is not replaced" in refused(folder)
    write_build(folder, NEW, force=True)
    assert content(folder) == NEW | {"notes": "mine"}


@pytest.mark.parametrize("name", ["model.py", "gone.py", "stages/00-a.txt"])
def test_a_file_that_was_changed_by_hand_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("changed")
    assert name in refused(folder)
    write_build(folder, NEW, force=True)
    assert content(folder) == NEW


def test_a_file_of_the_users_in_the_way_is_refused(folder: Path) -> None:
    (folder / "stages" / "01-b.txt").write_text("mine")
    assert "stages/01-b.txt is not of the build there" in refused(folder)


def test_a_folder_in_the_place_of_a_file_is_refused_by_force_too(folder: Path) -> None:
    (folder / "model.py").unlink()
    (folder / "model.py").mkdir()
    (folder / "model.py" / "mine").write_text("mine")
    with pytest.raises(fg.TfgError, match=r"model\.py is a folder"):
        write_build(folder, NEW, force=True)
    assert (folder / "model.py" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "manifest",
    [
        "[]", '["model.py"]', "{}", "null", "x", "[" * 10_000, '{"format": 2}', '{"format": 2, "files": []}',
        '{"format": 2, "files": {"model.py": 1}}', '{"format": 2, "files": {"model.py": "abc"}}',
        '{"format": "2", "files": {}}', "\xff", '{"format": 2, "files": {"a": "' + "0" * (1 << 20),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "build"
    write_build(folder, OLD)
    (folder / MANIFEST).write_text(manifest, encoding="latin-1")
    assert "is not replaced" in refused(folder)
    write_build(folder, NEW, force=True)
    assert content(folder) == NEW | {"gone.py": "gone = 1\n"}


# ---------------------------------------------------------------- strangers' folders


def forge(folder: Path, *names: str) -> None:
    """A manifest that names files with the hashes that they have, through links too."""
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / MANIFEST).write_text(json.dumps({"format": format_of(Files), "files": hashes}))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "name", ["../victim", "stages/../../victim", "ABSOLUTE", "./model.py", "link", "inner/victim"]
)
def test_a_foreign_name_removes_nothing(folder: Path, name: str, force: bool) -> None:
    victim = folder.parent / "victim"
    victim.write_text("precious")
    name = str(victim) if name == "ABSOLUTE" else name
    (folder / "link").symlink_to("../victim")
    (folder / "inner").symlink_to("..")
    forge(folder, "model.py", name)
    if not force:
        refused(folder)
        return
    write_build(folder, NEW, force=True)
    assert victim.read_text() == "precious"
    assert content(folder).keys() >= NEW.keys()


@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_the_place_of_a_folder_is_not_followed(folder: Path, force: bool) -> None:
    """`stages` led outside, and the stages were written there."""
    outside = folder.parent / "outside"
    shutil.move(folder / "stages", outside)
    (folder / "stages").symlink_to("../outside")
    if not force:
        assert "stages" in refused(folder)
    else:
        write_build(folder, NEW, force=True)
        assert not (folder / "stages").is_symlink()
        assert content(folder) == NEW
    assert content(outside) == {"00-a.txt": "a\n"}


@pytest.mark.parametrize("name", ["model.py", MANIFEST, "plan.json"])
def test_a_link_in_the_place_of_a_file_is_not_followed(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    before = outside.read_bytes()
    (folder / name).symlink_to("../outside")
    refused(folder)
    write_build(folder, NEW, force=True)
    assert outside.read_bytes() == before
    assert not (folder / name).is_symlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.py", MANIFEST])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(fg.TfgError):
        write_build(folder, NEW)
    write_build(folder, NEW, force=True)
    assert content(folder).keys() >= NEW.keys()


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to("build")
    write_build(link, NEW)
    assert link.is_symlink()
    assert content(folder) == NEW


def test_planted_leftovers_are_links_or_not_ours(folder: Path) -> None:
    """Names of leftovers beside the folder lead to nothing that is removed, if they are links."""
    victim = folder.parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    inode = victim.stat().st_ino
    for name in (f".build.{inode}.new", ".build.12345678.tmp", ".build.77.old"):
        (folder.parent / name).symlink_to("victim")
    (folder.parent / ".build.more.55.new").mkdir()
    write_build(folder, NEW)
    assert (victim / "file").read_text() == "precious"
    assert (folder.parent / ".build.more.55.new").is_dir()


# ---------------------------------------------------------------- places


def test_places_that_cannot_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it is a file" in refused(folder / "model.py", "FG421")
    for inside in (folder, folder / "stages"):
        monkeypatch.chdir(inside)
        assert "current folder" in refused(folder, "FG421")
    monkeypatch.undo()
    assert "root of the file system" in refused_root()


def refused_root() -> str:
    with pytest.raises(fg.TfgError) as caught:
        write_build(Path("/"), NEW)
    return caught.value.diagnostics[0].message


def test_compiles_at_once_into_one_folder_leave_one_of_them(folder: Path) -> None:
    (folder / "mine").write_text("mine")
    builds = [{name: f"{text}{number}" for name, text in NEW.items()} for number in range(8)]
    threads = [threading.Thread(target=write_build, args=(folder, build)) for build in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = content(folder)
    assert found.pop("mine") == "mine"
    assert found in builds
    assert os.listdir(folder.parent) == ["build"]


def test_a_folder_that_was_renamed_away_is_put_back(folder: Path) -> None:
    """As after a kill between two renames; loading puts it back too."""
    aside = folder.parent / f".build.{folder.stat().st_ino}.old"
    folder.rename(aside)
    with pytest.raises(fg.TfgError, match=r"it has no model|its plan"):
        fg.load(folder)
    assert content(folder) == OLD
    folder.rename(aside)
    recover(folder)
    assert content(folder) == OLD
    assert os.listdir(folder.parent) == ["build"]


# ---------------------------------------------------------------- the command


@pytest.mark.medium
def test_the_command_refuses_before_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.tfg").write_text(SPEC)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", "compile", "tiny.tfg", "-o", "project", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    Path("project").mkdir()
    Path("project/model.py").write_text("mine")
    compile_: Callable[..., object] = fg.compile
    monkeypatch.setattr("fastgrad_dsl.api.compiled.compile", None)
    status, err = run()
    assert (status, "error[FG428]" in err, Path("project/model.py").read_text()) == (2, True, "mine")
    monkeypatch.setattr("fastgrad_dsl.api.compiled.compile", compile_)
    assert run("--force") == (0, "")
    assert run() == (0, "")
    with Path("project/model.py").open("a") as stream:
        stream.write("# mine\n")
    assert run()[0] == 2
    with pytest.raises(fg.TfgError, match="was changed"):
        fg.compile("tiny.tfg", out="project")
    fg.compile("tiny.tfg", out="project", force=True)
    fg.compile("tiny.tfg", out="project")
