"""A folder that a run is to use: nothing of a stranger's in it is lost, and no link of it is followed."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.training.folder import claimed, publish, spec_files
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source

SPEC = "model tiny(x: float[2]) -> float[2] {{\n    return {factor} * x\n}}\n"


def claim(folder: Path, *, resume: bool = False, force: bool = False) -> None:
    with claimed(folder, resume=resume, force=force):
        pass


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_refused_keeps_what_looks_temporary(tmp_path: Path) -> None:
    names = (
        ".notes.deadbeef.tmp",
        ".model.1.new",
        "spec/.x.deadbeef.tmp",
        ".log.jsonl.deadbeef.tmp",
        "thesis",
    )
    (tmp_path / "spec").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    with pytest.raises(TfgError, match="FG431"):
        claim(tmp_path)
    assert {name: text for name, text in contents(tmp_path).items() if name != ".lock"} == dict(
        zip(names, names, strict=True)
    )


def test_only_temporary_files_of_a_run_are_removed(tmp_path: Path) -> None:
    for name in (".notes.deadbeef.tmp", ".log.jsonl.deadbeef.tmp", ".checkpoint.safetensors.deadbeef.tmp"):
        (tmp_path / name).write_text(name)
    claim(tmp_path, force=True)
    assert contents(tmp_path).keys() == {".notes.deadbeef.tmp", ".lock"}


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("kind", ["file", "link", "folder", "hanging link"])
def test_a_lock_that_is_none_is_not_written_over(tmp_path: Path, kind: str, how: dict[str, bool]) -> None:
    lock, outside = tmp_path / "run" / ".lock", tmp_path / "outside"
    lock.parent.mkdir()
    outside.write_text("process 1 on host\n")
    if kind == "file":
        lock.write_text("process 1 on host\nwith more than a lock says\n")
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(outside if kind == "link" else tmp_path / "nothing")
    before = contents(tmp_path)
    with pytest.raises(TfgError, match=r"FG421(.|\n)*\.lock"):
        claim(lock.parent, **how)
    assert contents(tmp_path) == before


def test_a_lock_that_was_left_is_taken(tmp_path: Path) -> None:
    for text in ("", "process 1 on host\n"):
        (tmp_path / ".lock").write_text(text)
        claim(tmp_path)


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / ".x.deadbeef.tmp").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec").symlink_to(tmp_path / "outside")
    claim(tmp_path / "run", resume=True)
    assert (tmp_path / "outside" / ".x.deadbeef.tmp").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_model_that_is_a_link_to_another_build_is_refused(tmp_path: Path, force: bool) -> None:
    fg.compile(SPEC.format(factor=2), target="torch", out=tmp_path / "other")
    before = contents(tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "other")
    compiled = fg.compile(SPEC.format(factor=3), target="torch")
    with pytest.raises(TfgError, match=r"FG421(.|\n)*model is a link"):
        publish(compiled, spec_files(compiled.source), tmp_path / "run", force=force)
    assert contents(tmp_path / "other") == before


def test_used_files_of_one_name_are_all_kept(tmp_path: Path) -> None:
    for number, name in enumerate(("inc/a/x.tfg", "inc/b/x.tfg", "spec/x.tfg", "inc/main.tfg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"param p = {number}\n")
    uses = [f"{tmp_path}/inc/a/x.tfg", f"{tmp_path}/inc/b/x.tfg", "x.tfg", f"{tmp_path}/inc/main.tfg"]
    text = "".join(f'use "{name}" as u{number}\n' for number, name in enumerate(uses))
    (tmp_path / "spec/main.tfg").write_text(text)
    found = spec_files(read_source(tmp_path / "spec/main.tfg", include=[tmp_path / "inc"]))
    assert found.pop("main.tfg") == text
    assert list(found.values()) == [f"param p = {number}\n" for number in range(4)]
