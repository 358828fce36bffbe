"""Building C++ kernels: once for all processes, whole or not at all, with or without a cache."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastgrad_compiler.runtime import native, private_files
from fastgrad_compiler.runtime.native import NativeError, build
from tests.native.compilers import NEEDS_COMPILER, Builder

TEXT = 'extern "C" int answer() { return 42; }\n'
BUILD = (
    f"from fastgrad_compiler.runtime.native import build; print(build('attention_x', {TEXT!r}, 'float32'))"
)

pytestmark = NEEDS_COMPILER


def build_one(text: str = TEXT, variant: str = "float32") -> Path:
    return build("attention_x", text, variant)


def test_second_build_is_the_first(builder: Builder) -> None:
    path = build_one()
    assert path.parent == builder.cache
    assert path.name.startswith("attention_x_float32-")
    assert build_one() == path
    assert builder.run(BUILD).stdout.strip() == str(path)
    assert len(builder.compilations) == 1
    assert [file for file in builder.cache.iterdir() if file.suffix not in (".so", ".lock")] == []


def test_a_build_is_known_by_all_that_it_depends_on(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {build_one(), build_one(TEXT + "\n"), build_one(variant="bfloat16")}
    monkeypatch.setenv("CXX", f"{builder.environment['CXX']} -mno-avx")
    paths.add(build_one())
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g0"))
    paths.add(build_one())
    monkeypatch.setattr("torch.__version__", "0.0")
    paths.add(build_one())
    assert len(paths) == len(builder.compilations) == 6


def test_names_and_variants_reach_the_text(builder: Builder) -> None:
    text = '#define STRING_(x) #x\n#define STRING(x) STRING_(x)\nstatic_assert(FASTGRAD_VARIANT == {}, "");\n'
    text += 'static_assert(sizeof(STRING(FASTGRAD_KERNEL)) == sizeof("attention_x_{}"), "");\n'
    for number, variant in enumerate(("float32", "float64", "bfloat16")):
        build_one(text.replace("{}", str(number), 1).replace("{}", variant), variant)


@pytest.mark.medium
def test_processes_that_start_at_once_compile_once(builder: Builder) -> None:
    builder.write_compiler("sleep 1")
    processes = [builder.start(BUILD) for _ in range(4)]
    outputs = [process.communicate() for process in processes]
    assert len({out for out, _ in outputs}) == 1, outputs
    assert len(builder.compilations) == 1


class Operations(NamedTuple):
    forward: object


def test_kernels_of_a_model_are_built_at_the_same_time(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each compilation waits for another one to begin."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    log = builder.folder / "compilations"
    builder.write_compiler(f'while [ "$(wc -l < "{log}")" -lt 2 ]; do sleep 0.05; done')
    loader, file = SourceFileLoader("model.code", ""), str(builder.folder / "model.py")
    specs = [ModuleSpec(name, loader, origin=file) for name in ("model.code", "model.more", "other.code")]
    for name in "abc":
        (builder.folder / f"{name}.cpp").write_text(TEXT)
    told: list[str] = []
    first, *others = [
        native.Library(name, spec, Operations, told.append) for name, spec in zip("abc", specs, strict=True)
    ]
    assert first.of(torch.float32) is None
    assert "has not the operations" in told[0]
    assert {line.split("KERNEL=")[1][0] for line in builder.compilations} == {"a", "b"}
    assert [library.of(torch.float32) for library in others] == [None, None]
    assert len(builder.compilations) == len(builder.libraries()) == 3


def test_what_is_not_built_together_is_built_alone(builder: Builder) -> None:
    loader, file = SourceFileLoader("package.code", ""), str(builder.folder / "model.py")
    told: list[str] = []
    kernels = [
        native.Library(
            name,
            ModuleSpec("package.code", loader, origin=file),
            Operations,
            told.append,
            together=name != "c",
        )
        for name in "abc"
    ]
    for name in "abc":
        (builder.folder / f"{name}.cpp").write_text(TEXT)
    assert kernels[2].of(torch.float32) is None
    assert "has not the operations" in told[0]
    assert len(builder.compilations) == 1


def test_a_lock_dies_with_its_process(builder: Builder) -> None:
    """And nothing that a killed build leaves behind is taken for a library."""
    builder.write_compiler('case " $* " in *" -c "*) echo > "$0.started"; exec sleep 60;; esac')
    process = builder.start(BUILD)
    started = builder.folder / "compiler.started"
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    builder.write_compiler()
    before = time.monotonic()
    assert build_one() in builder.libraries()
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_library_cut_short_is_built_again(builder: Builder, size: int) -> None:
    path = build_one()
    whole = path.read_bytes()
    assert len(whole) > size
    path.write_bytes(whole[:size])
    assert builder.run(BUILD).stdout.strip() in map(str, builder.libraries())
    assert [len(library.read_bytes()) for library in builder.libraries()] == [len(whole)]
    assert len(builder.compilations) == 2


def test_what_a_crash_left_is_removed_and_what_is_being_written_is_not(builder: Builder) -> None:
    builder.cache.mkdir(mode=0o700)
    old, new = builder.cache / ".old.so.01234567.tmp", builder.cache / ".new.so.01234567.tmp"
    for file in (old, new):
        file.write_bytes(b"half a lib")
    with new.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        build_one()
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("kind", ["below a file", "/proc", "no home"])
def test_without_a_cache_builds_last_as_long_as_the_process(builder: Builder, kind: str) -> None:
    """/proc stands for a folder that can be read only, for root too."""
    (builder.folder / "file").write_text("")
    given = {"below a file": str(builder.folder / "file" / "cache"), "/proc": "/proc", "no home": ""}[kind]
    environment = {"FASTGRAD_CACHE": given, "HOME": "", "XDG_CACHE_HOME": str(builder.folder / "file")}
    code = f"{BUILD}\nimport ctypes, sys\npath = build('attention_x', {TEXT!r}, 'float32')\n"
    code += "assert ctypes.CDLL(str(path)).answer() == 42"
    path = Path(builder.run(code, environment=environment).stdout.strip())
    assert path.name.startswith("attention_x_float32-")
    assert not path.parent.exists()


def test_a_full_disk_leaves_nothing_behind(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert build_one().parent != builder.cache
    assert [file for file in builder.cache.iterdir() if file.suffix != ".lock"] == []


def test_a_cache_that_can_be_read_only_is_used(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_one()
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode.startswith("r"):
            return opened(self, mode, *rest, **options)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert build_one() == path


def test_no_compiler(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(NativeError, match=r"CXX names, /nonexistent/c[+][+], is not there"):
        build_one()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeError, match=r"no C\+\+ compiler: install g\+\+ \(Debian"):
        build_one()
    monkeypatch.setenv("CXX", str(builder.folder))
    with pytest.raises(NativeError, match="is not there"):
        build_one()


def test_the_first_error_of_a_compiler_is_told(builder: Builder) -> None:
    with pytest.raises(NativeError, match=r"failed with status 1: .*attention_x.*:2:9: error: expected"):
        build_one("int one = 1;\nint x = ;\nint y = ;\n")
    assert builder.libraries() == []


def test_a_compiler_that_fails_to_link_or_to_start(builder: Builder) -> None:
    builder.write_compiler(
        'case " $* " in *" -shared "*) echo "ld: cannot find -ltorch_cpu" >&2; exit 3;; esac'
    )
    with pytest.raises(NativeError, match="status 3: ld: cannot find"):
        build_one()
    (builder.folder / "compiler").write_text("no script")
    with pytest.raises(NativeError, match=r"cannot be run|failed with status"):
        build_one(TEXT + "\n")


def test_flags_that_a_compiler_does_not_take_are_left_out(builder: Builder) -> None:
    builder.write_compiler(
        'case " $* " in *" -fno-trapping-math "*) echo "error: unknown argument" >&2; exit 1;; esac'
    )
    assert build_one() in builder.libraries()
    first, second = builder.compilations
    assert "-fno-trapping-math" in first
    assert "-fno-trapping-math" not in second
    assert "-fno-math-errno" in second


def test_a_build_is_announced_once(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    build("attention_x", TEXT, "float32", heard.append)
    build("attention_x", TEXT, "float32", heard.append)
    assert heard == ["attention_x (float32)"]
    for quiet, expected in (
        ("1", ""),
        ("0", "fastgrad: building attention_x (float32), once for this machine\n"),
    ):
        result = builder.run(BUILD.replace("42", f"42 + {quiet}"), environment={"FASTGRAD_QUIET": quiet})
        assert result.stderr == expected


def test_folders_of_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "chosen"))
    assert private_files.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("FASTGRAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(private_files, "_APPLE", False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert private_files.cache_folder() == tmp_path / "xdg" / "fastgrad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert private_files.cache_folder() == tmp_path / ".cache" / "fastgrad"
    monkeypatch.setattr(private_files, "_APPLE", True)
    assert private_files.cache_folder() == tmp_path / "Library" / "Caches" / "fastgrad"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert private_files.cache_folder() == tmp_path / "local" / "fastgrad"
