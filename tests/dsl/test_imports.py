"""What a stranger's spec may read: regular files of its own folder, and of those that --include names."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_compiler.frontend.modules import MAX_CHAIN
from fastgrad_dsl.commands.cli import main
from fastgrad_grammar.read import MAX_BYTES

MODEL = "dim n\n\nmodel m(x: float[n, 4]) -> float[n, 4] {\n    return parts.twice(x)\n}\n"
PARTS = "block twice(x: float[n, 4]) -> float[n, 4] {\n    return x + x\n}\n"
SECRET = "root:x:0:0:very secret\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fastgrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder `spec` beside a folder `other` with blocks and a file of secrets."""
    for name in ("spec", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "parts.tfg").write_text(PARTS)
    (tmp_path / "other" / "secret").write_text(SECRET)
    monkeypatch.chdir(tmp_path / "spec")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def write_spec(used: str, name: str = "spec.tfg") -> None:
    Path(name).write_text(f'use "{used}" as parts\n\n{MODEL}')


def make_link(kind: str) -> str:
    """A link of a kind that leads out of the folder; the name to use."""
    if kind == "a link to a file":
        Path("inner").symlink_to("../other/secret")
        return "inner"
    if kind == "a link to a folder":
        Path("inner").symlink_to("../other")
        return "inner/secret"
    Path("first").symlink_to("second")  # a link to a link
    Path("second").symlink_to(Path("../other").resolve())
    return "first/secret"


@pytest.mark.parametrize("used", ["/etc/passwd", "../other/secret", "./../spec/../other/secret"])
def test_a_file_outside_is_not_read(fastgrad: Run, used: str) -> None:
    write_spec(used)
    status, out, err = fastgrad("check", "spec.tfg")
    assert status == 2
    assert "error[FG235]" in err
    assert "outside" in err
    assert "root:" not in out + err


def test_a_folder_whose_name_is_that_of_a_text_is_a_folder(fastgrad: Run) -> None:
    """`<text>` is the name of a text in memory, which uses files of the current folder."""
    Path("secret").write_text("root: x")
    Path("<text>").mkdir()
    write_spec("secret", "<text>/spec.tfg")
    status, out, err = fastgrad("check", "<text>/spec.tfg")
    assert (status, "error[FG235]" in err, "root:" in out + err) == (2, True, False)


@pytest.mark.parametrize("kind", ["a link to a file", "a link to a folder", "a link to a link"])
def test_a_link_that_leads_outside_is_not_followed(fastgrad: Run, kind: str) -> None:
    write_spec(make_link(kind))
    status, out, err = fastgrad("check", "spec.tfg")
    assert (status, "error[FG235]" in err, "root:" in out + err) == (2, True, False)


def test_whether_a_file_outside_exists_is_not_told(fastgrad: Run) -> None:
    said = []
    for used in ("../other/secret", "../other/absent"):
        write_spec(used)
        said.append(fastgrad("check", "spec.tfg")[2].replace(used, "NAME"))
    assert said[0] == said[1]


@pytest.mark.parametrize("used", ["../other/parts.tfg", "parts.tfg", "link/parts.tfg"])
def test_an_included_folder_may_be_used(fastgrad: Run, used: str) -> None:
    """By its path, by a name that is looked up in it, and through a link."""
    Path("link").symlink_to("../other")
    write_spec(used)
    assert fastgrad("check", "spec.tfg")[0] == 2
    status, _, err = fastgrad("check", "spec.tfg", "-I", "../other")
    assert status == 0, err


def test_every_command_and_function_takes_include(fastgrad: Run) -> None:
    write_spec("../other/parts.tfg")
    for command in (
        ("check",),
        ("stages",),
        ("compile", "-o", "build"),
        ("advise",),
        ("report", "--no-measure"),
    ):
        status, _, err = fastgrad(*command, "spec.tfg", "--include", "../other")
        assert status == 0, err
    assert fg.compile("spec.tfg", include=["../other"]).plan == ()


def test_a_used_file_uses_its_neighbours(fastgrad: Run) -> None:
    Path("inner").mkdir()
    Path("inner/parts.tfg").write_text(PARTS)
    Path("inner/middle.tfg").write_text(
        'use "parts.tfg" as deep\n' + PARTS.replace("x + x", "deep.twice(x)").replace("return", "return ")
    )
    write_spec("inner/middle.tfg")
    assert fastgrad("check", "spec.tfg")[0] == 0
    Path("inner/middle.tfg").write_text(
        Path("inner/middle.tfg").read_text().replace("parts", "../../other/parts")
    )
    assert fastgrad("check", "spec.tfg")[0] == 2
    assert fastgrad("check", "spec.tfg", "--include", "../other")[0] == 0


def test_text_uses_files_of_the_current_folder(fastgrad: Run) -> None:
    text = 'use "{}" as parts\n\n' + MODEL
    Path("parts.tfg").write_text(PARTS)
    assert fg.compile(text.replace("{}", "parts.tfg")).plan == ()
    with pytest.raises(fg.TfgError, match="outside"):
        fg.compile(text.replace("{}", "../other/parts.tfg"))


def make_special(kind: str, path: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    elif kind == "device":
        Path(path).symlink_to("/dev/zero")
    else:
        Path(path).mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_only_regular_files_are_read(fastgrad: Run, kind: str) -> None:
    make_special(kind, "special")
    for command in ("check", "stages", "fmt", "report", "compile -o build", "advise"):
        status, _, err = fastgrad(*command.split(), "special")
        assert status == 2, command
        assert "error[FG" in err, command
    if kind != "device":  # that one is a link that leads outside
        write_spec("special")
        status, _, err = fastgrad("check", "spec.tfg")
        assert status == 2
        assert "error[FG235]" in err


@pytest.mark.parametrize(
    ("data", "said"), [(b"\xff\xfe", "UTF-8"), (b"#" * (1 << 19), "256 KiB"), (b"\0", "FG104")]
)
def test_used_files_that_are_no_text(fastgrad: Run, data: bytes, said: str) -> None:
    Path("parts.tfg").write_bytes(data)
    write_spec("parts.tfg")
    status, _, err = fastgrad("check", "spec.tfg")
    assert status == 2
    assert said in err


def test_a_used_file_may_begin_with_a_byte_order_mark(fastgrad: Run) -> None:
    Path("parts.tfg").write_bytes(b"\xef\xbb\xbf" + PARTS.replace("\n", "\r\n").encode())
    write_spec("parts.tfg")
    assert fastgrad("check", "spec.tfg")[0] == 0


@pytest.mark.parametrize(
    "used", ["a\0b.tfg", "a" * 300, "a/" * 3000, "", ".", "..", "/", "~/x", "spec.tfg/x"]
)
def test_names_that_no_file_has(fastgrad: Run, used: str) -> None:
    write_spec(used)
    status, _, err = fastgrad("check", "spec.tfg")
    assert status == 2
    assert "error[FG2" in err


def test_an_included_folder_must_be_there(fastgrad: Run) -> None:
    status, _, err = fastgrad("check", "spec.tfg", "--include", "nowhere")
    assert (status, "[FG416]" in err) == (2, True)
    with pytest.raises(fg.TfgError, match="no such folder"):
        fg.compile(MODEL, include=["nowhere"])


def test_a_cycle_through_links_is_a_cycle(fastgrad: Run) -> None:
    Path("here").symlink_to(".")
    Path("a.tfg").write_text('use "here/here/b.tfg" as b\n')
    Path("b.tfg").write_text('use "here/a.tfg" as a\n')
    status, _, err = fastgrad("check", "a.tfg")
    assert status == 2
    assert "FG234" in err


def test_a_chain_of_uses_has_an_end(fastgrad: Run) -> None:
    for number in range(300):
        Path(f"s{number}.tfg").write_text(f'use "s{number + 1}.tfg" as parts\n')
    status, _, err = fastgrad("check", "s0.tfg")
    assert status == 2
    assert f"{MAX_CHAIN} files" in err


def test_used_files_have_a_size_together(fastgrad: Run) -> None:
    count = MAX_BYTES // (1 << 16) + 1
    for number in range(count):
        Path(f"s{number}.tfg").write_text("# long\n" * ((1 << 16) // 7))
    uses = "".join(f'use "s{number}.tfg" as s{number}\n' for number in range(count))
    Path("spec.tfg").write_text(uses + MODEL)
    status, _, err = fastgrad("check", "spec.tfg")
    assert status == 2
    assert "too large together" in err


def test_a_file_that_fails_is_read_once(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("broken.tfg").write_text("block {\n")
    Path("spec.tfg").write_text("".join(f'use "broken.tfg" as b{i}\n' for i in range(200)) + MODEL)
    status, _, err = fastgrad("check", "spec.tfg")
    assert status == 2
    assert err.count("unexpected `{`") == 1
