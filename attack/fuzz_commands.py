"""Every command of the help with the extremes of each of its options, in one process and on tiny models."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import typer
from safetensors.torch import save

import fastgrad_dsl as fg
from attack.checkpoints import write_folder
from attack.fuzz import Fuzz
from attack.fuzz_files import SPEC
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_dsl.commands import cli

_CALLS = {
    "check": "tiny.tfg",
    "compile": "tiny.tfg --target torch -o out",
    "advise": "tiny.tfg",
    "stages": "tiny.tfg",
    "graph": "tiny.tfg -o tiny.svg",
    "report": "tiny.tfg --dim n=16",
    "heads": "tiny.tfg --data random --dim n=8",
    "train": "tiny.tfg --target torch --text text.txt --steps 1 --seq 8 --sample 1",
    "convert": "soft.tfg --weights soft.safetensors --data text.txt --target torch --seq 8 --transfer-steps 1 "
    "--steps 1 --near 2 --far-dim 2 -o converted",
    "generate": "tiny.tfg --target torch --weights weights.safetensors --prompt a --tokens 2",
    "bench": "--quick --n 8 --heads 1 --repeats 1 --target torch",
    "tune": "tiny.tfg --dry-run",
    "fmt": "tiny.tfg",
    "import": "checkpoint -o imported.tfg",
    "export": "known.tfg --weights known.safetensors -o back",
}
SOUND = {command: call.split() for command, call in _CALLS.items()}
"""A call of each command that does its work; a test asserts that none is missing."""

NUMBERS = (
    "0", "-0", "-1", "1", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "1" + "0" * 400,
    "9" * 5000, "1e3", "1e308", "1e309", "nan", "inf", "-inf", "0x10", "1_000", "\N{ARABIC-INDIC DIGIT THREE}",
)  # fmt: skip
TEXTS = (
    "", " ", "x", "=", "a=b", "n=0", "n=-1", "n=8", "n=9999999999", "n=nan", "b=2147483647", "n=8=8", "none", "true",
    "random",
    "a\nb", "\x1b[31m", "\udcff", "<script>", "*", "-", "--", "--help", "'", '"', "$(touch pwned)", "x" * 10_000,
)  # fmt: skip
PATHS = (
    "missing", "missing/below", "folder", ".", "taken", "taken/below", "empty", "binary", "pipe", "locked", "loop",
    "/dev/null", "/dev/full", "/proc/self/mem", "/proc/none", "\udcff.tfg", "it's.tfg", "x" * 300, "text.txt",
    "tiny.tfg", "broken.safetensors", "build", "hollow",
)  # fmt: skip
FRAME = re.compile(r'/(fastgrad_\w+/.*?", line \d+)')
ENDLESS = {
    ("train", "--steps"), ("train", "--sample"), ("generate", "--tokens"), ("convert", "--steps"),
    ("convert", "--transfer-steps"),
}  # fmt: skip
"""Options that ask for as much work as their number says: only numbers that are refused, or small ones, are tried."""

MEASURES = "bench"
"""Without options it does all that it can, long lengths too: that takes as long as it takes."""

SERVES = "--serve"
"""Runs until it is interrupted; tests/dsl/test_serve.py attacks what it answers."""

LARGE = ("2147483647", "2147483648", "9223372036854775807", "1_000")


def fuzz_commands(fuzz: Fuzz, first: int, pairs: int, folder: Path) -> None:
    """Each option of each command with each value; then so many pairs of options, drawn."""
    prepare(folder / "sound")
    calls = enumerate(itertools.chain(single(), drawn(fuzz.seed, pairs)))
    for number, arguments in itertools.islice(calls, first, None):
        place = folder / "place"
        copy(folder / "sound", place)
        with contextlib.chdir(place):
            line = " ".join(each if len(each) < 60 else f"{each[:20]}..." for each in arguments)
            fuzz.case(
                f"command {number}: {line}",
                lambda arguments=arguments: run(arguments),  # type: ignore[misc]
                lambda arguments=arguments: repr(arguments).encode(),  # type: ignore[misc]
            )


class Told(Exception):
    """A command ended neither well nor with a diagnostic: what it said, its kind on the first line."""


def run(arguments: list[str]) -> str:
    """Run a command line as `main` does; any traceback is Told."""
    told = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fastgrad", *arguments]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(told),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
    err = told.getvalue()
    silent = status == 2 and not ("error[FG" in err or "Error: " in err)
    if status not in (0, 2) or "Traceback" in err or silent:
        place = (FRAME.findall(err) or ["nowhere"])[-1]
        last = next((line for line in reversed(err.splitlines()) if ": " in line and "bug" not in line), "")
        raise Told(f"status {status}, {place}, {last[:60]}\n{err[-3000:]}")
    return f"status {status}"


def options(command: str) -> Iterator[tuple[str, list[str]]]:
    """The options of a command, each with values, a flag with none; "" is its first argument."""
    for parameter in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        name = "" if parameter.param_type_name == "argument" else parameter.opts[0]
        if getattr(parameter, "is_flag", False):
            flags = (*parameter.opts, *parameter.secondary_opts)
            yield from ((flag, []) for flag in flags if flag != SERVES)
        else:
            numbers = (each for each in NUMBERS if each not in LARGE or (command, name) not in ENDLESS)
            yield name, [*numbers, *TEXTS, *PATHS]


def single() -> Iterator[list[str]]:
    """Each value of each option, after what else the command needs."""
    for command, sound in SOUND.items():
        if command != MEASURES:
            yield [command]
        yield [command, *sound]
        for name, values in options(command):
            if not values:
                yield [command, *sound, name]
            for value in values:
                yield with_value(command, name, value)


def with_value(command: str, name: str, value: str) -> list[str]:
    """The sound call with one option set, or with its first argument replaced."""
    sound = SOUND[command]
    if name:
        return [command, *sound, name, value]
    return [command, value, *sound[1:]]


def drawn(seed: int, count: int) -> Iterator[list[str]]:
    """Calls with two options at once."""
    chance = random.Random(seed)
    for _ in range(count):
        command = chance.choice(list(SOUND))
        known = list(options(command))
        line = [command, *SOUND[command]]
        for name, values in chance.sample(known, min(2, len(known))):
            if name:
                line += [name, *([chance.choice(values)] if values else [])]
        yield line


def prepare(folder: Path, build: bool = True) -> None:
    """What the paths name: sound and broken files, a build, a folder that is none, a pipe, a loop of links."""
    folder.mkdir()
    for name in ("tiny.tfg", "\udcff.tfg", "it's.tfg"):
        (folder / name).write_text(SPEC, encoding="utf-8")
    soft = SPEC[: SPEC.index("budget")].replace(", gain = 1.0", "")
    (folder / "soft.tfg").write_text(soft, encoding="utf-8")
    (folder / "text.txt").write_bytes(bytes(range(256)) * 4)
    (folder / "taken").write_text("a file")
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(random.Random(0).randbytes(3000))
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for name in ("folder", "hollow", "locked"):
        (folder / name).mkdir()
    for name in ("model.py", "__init__.py", "plan.json"):
        (folder / "hollow" / name).write_text("")
    write_folder(folder / "checkpoint")
    if build:
        import_checkpoint(folder / "checkpoint", folder / "known.tfg")
        for spec, file in (("tiny.tfg", "weights.safetensors"), ("soft.tfg", "soft.safetensors")):
            weights = fg.compile(folder / spec, target="torch", validate=False).module().state_dict()
            (folder / file).write_bytes(save(weights))
        with contextlib.chdir(folder):
            run(["compile", *SOUND["compile"][:-1], "build"])


def copy(sound: Path, place: Path) -> None:
    """A fresh place to work in, with what cannot be copied."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    (place / "locked").chmod(0)
