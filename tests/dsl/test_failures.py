"""One layer for errors: a diagnostic and status 2 for what is wrong outside, a report and status 1 for a bug."""

from __future__ import annotations

import math
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastgrad_dsl as fg
from fastgrad_dsl.calibration.pace import default_pace
from fastgrad_dsl.commands import cli, failures
from fastgrad_dsl.commands.failures import run_command
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import rewrite, try_file, try_folder
from fastgrad_dsl.storage.staged import text_writer, write_together
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from tests.grids import wide

ROOT = Path(__file__).parent.parent.parent
SPEC = """dim b
model tiny(x: float[b, 4]) -> float[b, 4] {
    weight w: float[4, 4] = xavier()
    return x @ w
}
"""
UGLY = "dim  b\n"
PRETTY = "dim b\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fastgrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder that holds tiny.tfg and text.txt; gives status, stdout and stderr."""
    (tmp_path / "tiny.tfg").write_text(SPEC)
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def shell(line: str, folder: Path) -> tuple[int, str]:
    """Status and stderr of a command line in which FASTGRAD stands for the command."""
    code = "from fastgrad_dsl.commands.cli import main; main()"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "compiler", ROOT / "grammar")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "CODE": code}
    line = line.replace("FASTGRAD", '"$PYTHON" -c "$CODE"')
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


# ---------------------------------------------------------------- the standard streams


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("FASTGRAD check tiny.tfg > /dev/full", 2, "No space left on device"),
        ("FASTGRAD check tiny.tfg >&-", 2, "Bad file descriptor"),
        ("FASTGRAD check tiny.tfg 2>&-", 0, ""),
        ("FASTGRAD check none.tfg 2> /dev/full", 2, ""),
        ("FASTGRAD check none.tfg >&- 2>&-", 2, ""),
    ],
)
def test_a_stream_that_cannot_be_written(tmp_path: Path, line: str, status: int, said: str) -> None:
    (tmp_path / "tiny.tfg").write_text(SPEC)
    found, err = shell(line, tmp_path)
    expected = f"error[FG425]: the standard output: {said}\n" if said else ""
    assert (found, err) == (status, expected)


@pytest.mark.medium
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    weights = "".join(f"    weight w{i}: float[4, 4] = xavier()\n    x = x @ w{i}\n" for i in range(400))
    (tmp_path / "long.tfg").write_text(SPEC.replace("    return", weights + "    return"))
    status, err = shell("FASTGRAD stages long.tfg | head -1 > /dev/null; exit ${PIPESTATUS[0]}", tmp_path)
    assert (status, err) == (failures.NO_READER, "")


def test_text_that_the_terminal_lacks_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "\udcff.tfg").write_text(SPEC)
    assert shell("PYTHONIOENCODING=ascii FASTGRAD check $'\\xff.tfg'", tmp_path) == (0, "")


# ---------------------------------------------------------------- outputs are tried first

OUTPUTS = [
    (("report", "tiny.tfg"), "--json", "fastgrad_dsl.api.report.make_report"),
    (("report", "tiny.tfg"), "--html", "fastgrad_dsl.api.report.make_report"),
    (("advise", "tiny.tfg"), "--json", "fastgrad_dsl.commands.advise.make_advice"),
    (("generate", "tiny.tfg"), "--json", "fastgrad_dsl.commands.generate.generate_text"),
    (("generate", "tiny.tfg"), "--save-state", "fastgrad_dsl.commands.generate.generate_text"),
    (("bench",), "--json", "fastgrad_dsl.commands.bench.run_bench"),
    (("bench",), "--svg", "fastgrad_dsl.commands.bench.run_bench"),
    (("compile", "tiny.tfg"), "-o", "fastgrad_dsl.api.compiled.compile"),
    (("train", "tiny.tfg", "--text", "text.txt"), "-o", "fastgrad_dsl.api.compiled.compile"),
]


@pytest.mark.parametrize(("command", "option", "work"), OUTPUTS)
def test_outputs_are_tried_before_the_work(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], option: str, work: str
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(work, too_late)
    wrong = ["taken/below", "taken/far/below"] + (["taken"] if option == "-o" else ["folder", "."])
    for path in wrong:
        status, out, err = fastgrad(*command, option, path)
        assert (status, out) == (2, ""), path
        assert err.startswith(f"error[FG421]: cannot write {path}: ")
        assert len(err.splitlines()) == 1
    assert Path("taken").read_text() == "a file"


@pytest.mark.parametrize(("command", "option", "work"), OUTPUTS)
def test_work_that_fails_leaves_no_output(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], option: str, work: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TfgError([Diagnostic("FG416", "not today")])

    monkeypatch.setattr(work, fails)
    before = sorted(Path().rglob("*"))
    for path in ("new", "far/below/new", *(["taken"] if option != "-o" else [])):
        status, _, err = fastgrad(*command, option, path)
        assert (status, err) == (2, "error[FG416]: not today\n")
    assert sorted(Path().rglob("*")) == before
    assert Path("taken").read_text() == "a file"


def test_a_full_disk_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fastgrad_dsl.storage.outputs.tempfile.TemporaryFile", lambda dir: Full())
    for tried in (try_file, try_folder):
        with pytest.raises(TfgError, match=r"FG421.*no/where: No space left on device"):
            tried(tmp_path / "no/where")


def test_no_writer_replaces_a_device() -> None:
    """Not even as root, whom nothing keeps from it: /dev/null would be a file from then on."""
    write_atomically(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(TfgError, match=r"FG421.*device"):
        write_together({Path("/dev/null"): text_writer("text")}, force=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_device_is_written_as_it_is(fastgrad: Run, option: str) -> None:
    mode = os.stat("/dev/full").st_mode
    status, out, err = fastgrad("report", "tiny.tfg", "--no-measure", option, "/dev/full")
    assert (status, err) == (2, "error[FG425]: /dev/full: No space left on device\n")
    assert "model tiny" in out  # what was found is not lost
    assert os.stat("/dev/full").st_mode == mode
    assert fastgrad("report", "tiny.tfg", "--no-measure", option, "/dev/null")[0] == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "target",
    wide(
        ("/dev/stdout > printed", "/dev/fd/3 3> printed", ">(cat > printed)"), few=["/dev/stdout > printed"]
    ),
)
def test_an_output_may_be_the_standard_output_or_a_pipe(target: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.tfg").write_text(SPEC)
    line = f"set -e; rm -f printed; FASTGRAD report tiny.tfg --no-measure --json {target}; sleep 0.2"
    assert shell(f'{line}; grep -q \'"format": "fastgrad-report\' printed', tmp_path) == (0, "")


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address") as found:
        write_atomically(tmp_path / "pipe", "text")
    assert found.value.filename == str(tmp_path / "pipe")


# ---------------------------------------------------------------- files that are there


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for mode in (0o600, 0o664, 0o755):
        file.write_text("old")
        file.chmod(mode)
        write_atomically(file, "new")
        assert stat.S_IMODE(file.stat().st_mode) == mode
        assert file.read_text() == "new"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    os.chown(file, 1234, 1235)
    write_atomically(file, "new")
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 1235)


def test_an_error_of_writing_names_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "taken/below", tmp_path / "folder"):
        with pytest.raises(OSError, match=path.name) as found:
            write_atomically(path, "text")
        assert found.value.filename == str(path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "taken"]


def test_formatting_keeps_links_and_modes(fastgrad: Run) -> None:
    Path("folder/real.tfg").write_text(UGLY)
    Path("folder/real.tfg").chmod(0o640)
    Path("link.tfg").symlink_to("folder/real.tfg")
    Path("chain.tfg").symlink_to("link.tfg")
    assert fastgrad("fmt", "chain.tfg") == (0, "formatted chain.tfg\n", "")
    assert Path("chain.tfg").readlink() == Path("link.tfg")
    assert Path("link.tfg").readlink() == Path("folder/real.tfg")
    assert Path("folder/real.tfg").read_text() == PRETTY
    assert stat.S_IMODE(Path("folder/real.tfg").stat().st_mode) == 0o640


def test_formatting_keeps_hard_links(fastgrad: Run) -> None:
    Path("one.tfg").write_text(UGLY)
    Path("other.tfg").hardlink_to("one.tfg")
    assert fastgrad("fmt", "one.tfg")[0] == 0
    assert Path("other.tfg").read_text() == PRETTY


def test_a_read_only_file_is_left_and_others_are_formatted(fastgrad: Run) -> None:
    for name in ("fixed.tfg", "free.tfg"):
        Path(name).write_text(UGLY)
    Path("fixed.tfg").chmod(0o444)
    status, out, err = fastgrad("fmt", "fixed.tfg", "folder", "free.tfg")
    assert (status, out) == (2, "formatted free.tfg\n")
    assert "error[FG425]: fixed.tfg: it is marked as read-only" in err
    assert "error[FG001]: cannot read folder: it is a folder" in err
    assert Path("fixed.tfg").read_text() == UGLY
    assert fastgrad("fmt", "--check", "fixed.tfg")[:2] == (2, "would format fixed.tfg\n")
    Path("fixed.tfg").write_text(PRETTY)
    assert fastgrad("fmt", "fixed.tfg") == (0, "", "")


def test_what_cannot_be_rewritten_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def full(number: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


# ---------------------------------------------------------------- what is told of an exception


def raising(error: BaseException) -> Callable[[], int]:
    """A command that ends so."""

    def command() -> int:
        raise error

    return command


def test_a_bug_is_reported_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyError("surprise"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "KeyError: 'surprise'\nfastgrad: this is a bug in fastgrad" in err
    assert f"torch {torch.__version__}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TfgError([Diagnostic("FG001", "gone")]), 2, "error[FG001]: gone"),
        (PermissionError(13, "Permission denied", "a/file"), 2, "error[FG425]: a/file: Permission denied"),
        (PermissionError(13, "Permission denied", b"a/file"), 2, "error[FG425]: a/file: Permission denied"),
        (OSError("in its own words"), 2, "error[FG425]: the system refused: in its own words"),
        (OSError(), 2, "error[FG425]: the system refused: OSError"),
        (BrokenPipeError(32, "Broken pipe", "pipe"), 2, "error[FG425]: pipe: Broken pipe"),
        (MemoryError(), 2, "error[FG426]: not enough memory: an allocation failed"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "error[FG426]: not enough memory: CUDA"),
        (RecursionError("maximum recursion depth exceeded"), 2, "error[FG106]: "),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_an_exception_from_outside_is_a_diagnostic(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    assert run_command(raising(error)) == status
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("shape", [(1 << 45,), (1 << 40, 1 << 40)])
def test_an_allocation_that_pytorch_refuses_is_no_bug(
    capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    def command() -> int:
        torch.empty(shape)
        return 0

    assert run_command(command) == 2
    assert capsys.readouterr().err.startswith("error[FG426]: not enough memory: ")


def test_what_was_printed_stands_before_the_error(tmp_path: Path) -> None:
    line = "FASTGRAD fmt --check ugly.tfg none.tfg > both 2>&1; cat both >&2"
    (tmp_path / "ugly.tfg").write_text(UGLY)
    assert shell(line, tmp_path)[1].startswith("would format ugly.tfg\nerror[FG001]")


@pytest.mark.parametrize(
    "line",
    [
        "check tiny.tfg",
        "stages tiny.tfg",
        "compile tiny.tfg -o folder --weights taken",
        "advise tiny.tfg --weights taken --json taken",
        "report tiny.tfg --weights taken --text taken --json taken --html taken",
        "train tiny.tfg --text taken -o folder",
        "tune tiny.tfg",
        "bench --json taken --svg taken --target none",
        "fmt none.tfg tiny.tfg",
    ],
)
def test_whether_a_file_can_be_read_is_left_to_what_reads_it(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Typer would refuse the command line, without a code, and `fmt` would format none of the other files."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    more = [] if line.startswith(("bench", "fmt")) else ["-I", "folder", "--model", "none"]
    status, out, err = fastgrad(*line.split(), *more)
    assert (status, out) == (2, "")
    assert err.startswith("error[FG")


def test_nothing_but_an_error_of_the_command_line_is_told_by_typer(fastgrad: Run) -> None:
    status, _, err = fastgrad("check")
    assert status == 2
    assert err.startswith("Usage: fastgrad check")


# ---------------------------------------------------------------- numbers of the command line

NUMBERS = [
    ("--rate", "nan", "inf", "-1", "x", "1e39", "1e308"),
    ("--clip", "nan", "inf", "-1", "1e39"),
    ("--seed", "-1", str(1 << 70), "1.5", "nan"),
    ("--steps", "-1", str(1 << 70), "1e3"),
    ("--seq", "0", str(1 << 40), "-5"),
    ("--batch", "0", str(1 << 40)),
    ("--every", "0", str(1 << 40)),
    ("--sample", "-1", str(1 << 70)),
]


@pytest.mark.parametrize(("option", "value"), [(first, value) for first, *rest in NUMBERS for value in rest])
def test_numbers_out_of_range_are_refused(fastgrad: Run, option: str, value: str) -> None:
    status, out, err = fastgrad("train", "tiny.tfg", "--text", "text.txt", option, value)
    assert (status, out) == (2, "")
    assert f"Invalid value for '{option}'" in err


@pytest.mark.parametrize("seed", ["0", str((1 << 63) - 1)])
def test_every_seed_in_range_is_taken(fastgrad: Run, seed: str) -> None:
    assert fastgrad("report", "tiny.tfg", "--seed", seed)[0] == 0


@pytest.mark.parametrize(
    "size",
    ["n=1e3", "n=0", "n=-1", "n=nan", "n=", "n", "=3", "b=999999999999999999999999", "b=" + "9" * 5000],
)
def test_sizes_that_are_none_are_refused(fastgrad: Run, size: str) -> None:
    status, _, err = fastgrad("report", "tiny.tfg", "--dim", size)
    assert status == 2
    assert err.startswith("error[FG4")


@pytest.mark.parametrize(
    "command", [("report", "tiny.tfg"), ("compile", "tiny.tfg", "-o", "out", "--calibrate", "random")]
)
def test_a_batch_larger_than_memory_is_refused(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fastgrad_dsl.models.batches.memory_bytes", lambda: 1 << 34)
    status, _, err = fastgrad(*command, "--dim", "b=2147483647")
    assert status == 2
    assert err.startswith("error[FG426]: not enough memory: a batch of b = 2147483647 takes ")


def test_a_model_larger_than_memory_is_refused(fastgrad: Run) -> None:
    Path("tiny.tfg").write_text(
        SPEC.replace("w: float[4, 4]", "w: float[4, 4] = xavier()\n    weight large: float[4000000, 4000000]")
    )
    status, _, err = fastgrad("report", "tiny.tfg")
    assert status == 2
    assert err.startswith("error[FG426]: not enough memory: the model takes 64,000,000,000,064 bytes")


def test_a_thousand_million_repeats_take_no_time() -> None:
    from fastgrad_dsl.bench.contenders import Inputs
    from fastgrad_dsl.bench.timing import time_together

    one = torch.ones(1, 1, 1, 1, requires_grad=True)
    found = time_together(
        {"one": lambda q, k, v: q + k + v}, Inputs(one, one.clone(), one.clone(), one), 10**9, 0.01
    )
    assert found["one"].repeats < 10**6


LEARNT = """use std
dim b
dim n <= 64
model tiny(tokens: int[b, n]) -> float[b, n, 8] {
    weight table: float[8, 4] = normal(std = 0.02)
    x = embedding(table, tokens)
    x = x + std.attention(x; heads = 1, qk_dim = 2, gain = 1.0)
    return x @ table.T
}
objective loss(logits: float[b, n, 8], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.1
}
"""


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("command", [("report", "tiny.tfg"), ("advise", "tiny.tfg", "--calibrate", "random")])
def test_weights_that_are_not_finite_are_refused(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], number: float
) -> None:
    monkeypatch.setattr("fastgrad_dsl.calibration.replan.machine_pace", default_pace)
    Path("tiny.tfg").write_text(LEARNT)
    weights = fg.compile("tiny.tfg", target="torch", validate=False).module().state_dict()
    save_file({name: torch.full_like(each, number) for name, each in weights.items()}, "w.safetensors")
    status, _, err = fastgrad(*command, "--dim", "n=8", "--weights", "w.safetensors", "--json", "out.json")
    assert status == 2
    assert err.startswith("error[FG427]: the exact model gives numbers that are not finite on this batch")
    assert not Path("out.json").exists()


TOKENS = torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"tokens": TOKENS + 8, "targets": TOKENS}, "tokens holds 8: its ids lie from 0 to 7"),
        ({"tokens": TOKENS, "targets": TOKENS - 1}, "targets holds -1: its ids lie from 0 to 7"),
        ({"tokens": TOKENS.double(), "targets": TOKENS}, "tokens is float[1, 8], not int[b, n]"),
        ({"tokens": TOKENS[0].clone(), "targets": TOKENS}, "tokens is int[8], not int[b, n]"),
        ({"tokens": TOKENS, "targets": TOKENS[:, :4].clone()}, "targets has the size 4 where n is 8"),
        ({"tokens": TOKENS[:0], "targets": TOKENS[:0].clone()}, "tokens has a size of 0"),
        ({"tokens": TOKENS.repeat(1, 9), "targets": TOKENS.repeat(1, 9)}, "the file declares n at most 64"),
        ({"tokens": TOKENS.to(torch.complex64), "targets": TOKENS}, "tokens is complex64[1, 8], not int[b, n]"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_batch_are_refused(
    fastgrad: Run, batch: dict[str, torch.Tensor], said: str
) -> None:
    Path("tiny.tfg").write_text(LEARNT)
    save_file(batch, "batch.safetensors")
    status, _, err = fastgrad("compile", "tiny.tfg", "-o", "out", "--calibrate", "batch.safetensors")
    assert status == 2
    assert err.startswith(f"error[FG423]: batch.safetensors: {said}")
    compiled = fg.compile("tiny.tfg", target="torch", validate=False)
    tensors = [batch["tokens"], batch["targets"]]
    with pytest.raises(ValueError, match=re.escape(said)):
        compiled.calibrate(batches=[tensors], measured_pace=False)
    with pytest.raises(ValueError, match=re.escape(said)):
        compiled.report(compiled.module(), tensors)


@pytest.mark.parametrize("given", [[], [TOKENS] * 3, [None, None]])
def test_what_is_no_list_of_tensors_is_a_value_error(fastgrad: Run, given: list[torch.Tensor]) -> None:
    compiled = fg.compile(LEARNT, target="torch", validate=False)
    with pytest.raises(ValueError, match=r"tensors"):
        compiled.report(compiled.module(), given)


def test_ints_of_any_width_are_ids(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad_dsl.calibration.replan.machine_pace", default_pace)
    Path("tiny.tfg").write_text(LEARNT)
    save_file({"tokens": TOKENS.to(torch.uint8), "targets": TOKENS.to(torch.int16)}, "batch.safetensors")
    command = ("compile", "tiny.tfg", "-o", "out", "--target", "torch", "--calibrate", "batch.safetensors")
    assert fastgrad(*command)[0] == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.py", b"x ="), ("model.py", b"\xff"), ("model.py", b"1 / 0"), ("__init__.py", b"")],
)
def test_a_folder_whose_code_does_not_load(fastgrad: Run, name: str, content: bytes) -> None:
    fg.compile(LEARNT, target="torch", validate=False, out="built")
    Path("built", name).write_bytes(content)
    with pytest.raises(TfgError, match=r"\[FG419\] built does not load: "):
        fg.load("built")
    status, _, err = fastgrad("report", "built", "--dim", "n=8")
    assert status == 2
    assert err.startswith("error[FG419]: built does not load: ")


def test_what_is_no_file_is_no_part_of_a_package(fastgrad: Run) -> None:
    fg.compile(LEARNT, target="torch", validate=False, out="built")
    os.mkfifo("built/pipe.py")
    Path("built/folder.py").mkdir()
    Path("built/link.py").symlink_to("missing")
    assert fg.load("built").state_dict()
    Path("built/model.py").unlink()
    os.mkfifo("built/model.py")
    with pytest.raises(TfgError, match=r"\[FG419\]"):
        fg.load("built")


@pytest.mark.parametrize("file", ["pipe", "/dev/zero", "folder"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("train", "tiny.tfg", "--seq", "8", "--text"), "FG411"),
        (("report", "tiny.tfg", "--dim", "n=8", "--weights"), "FG418"),
    ],
)
def test_only_regular_files_are_read(fastgrad: Run, file: str, command: tuple[str, ...], code: str) -> None:
    Path("tiny.tfg").write_text(LEARNT.replace("8", "256"))
    os.mkfifo("pipe")
    status, _, err = fastgrad(*command, file)
    assert status == 2
    assert err.startswith(f"error[{code}]: cannot read ")
    assert "it is a" in err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "it is a folder"),
        (os.mkfifo, "it is a pipe, not a regular file"),
        (lambda path: path.symlink_to("gone"), "no such file"),
    ],
)
def test_what_stands_in_the_place_of_a_calibration_is_not_passed_over(
    fastgrad: Run, make: Callable[[Path], None], said: str
) -> None:
    fg.compile("tiny.tfg", target="torch", validate=False, out="built")
    make(Path("built", "calibration.json"))
    status, out, err = fastgrad("report", "built", "--no-measure")
    assert (status, out, err) == (2, "", f"error[FG001]: cannot read built/calibration.json: {said}\n")
