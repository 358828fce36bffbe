"""Code is loaded from the cache only where nobody else could have put it there; what killed builds leave is removed."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import importlib.util
import marshal
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from fastgrad_compiler.runtime import private_files, triton_kernels
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.native_attention import NativeAttention, NativeWarning
from fastgrad_compiler.runtime.private_files import cache_folder, why_unsafe
from tests.native.compilers import NEEDS_COMPILER, Builder
from tests.native.test_build import BUILD, TEXT, build_one

STRANGER = 54321
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
PLANT = """
#include <cstdio>
__attribute__((constructor)) static void run() { std::puts("code of a stranger ran"); std::fflush(stdout); }
"""
LOAD = f"""
import warnings
from fastgrad_compiler.runtime.native import NativeError, load
warnings.simplefilter("always")
for variant in ("float32", "float64"):
    try:
        load("attention_x", {TEXT!r}, variant)
    except NativeError as error:
        print(error)
"""


def plant(builder: Builder) -> Path:
    """Put another library in the place of a kernel's, under a name that carries its own checksum."""
    real = build_one()
    source, library = builder.folder / "plant.cpp", builder.folder / "plant.so"
    source.write_text(PLANT)
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    checksum = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    planted = real.with_name(f"{real.stem.rpartition('-')[0]}-{checksum}.so")
    real.unlink()
    shutil.copy(library, planted)
    return planted


def spoil(builder: Builder, planted: Path, how: str) -> None:
    """Give a planted library, or its folder, to a stranger in one of the ways that he can have it."""
    what, _, change = how.partition(": ")
    path = {"folder": builder.cache, "file": planted, "parent": builder.folder}[what]
    if change == "another's":
        os.chown(path, STRANGER, -1)
    else:
        path.chmod(0o777)


def restore(builder: Builder) -> None:
    builder.folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(builder.folder, 0, -1)


@pytest.mark.sampled(2)
@NEEDS_COMPILER
@pytest.mark.parametrize(
    "how",
    [
        "folder: all may write",
        "file: all may write",
        "parent: all may write",
        pytest.param("folder: another's", marks=AS_ROOT),
        pytest.param("file: another's", marks=AS_ROOT),
        pytest.param("parent: another's", marks=AS_ROOT),
    ],
)
def test_a_planted_library_is_not_loaded(builder: Builder, how: str) -> None:
    planted = plant(builder)
    spoil(builder, planted, how)
    result = builder.run(LOAD)
    restore(builder)
    assert "stranger" not in result.stdout
    if "file" in how:  # it is removed, and the kernel built again
        assert not planted.exists()
        assert result.stderr == ""
    else:
        assert planted.exists()
        assert result.stderr.count("Warning: ") == 1, result.stderr
        assert "others may change" in result.stderr
        assert "FASTGRAD_CACHE" in result.stderr


@NEEDS_COMPILER
def test_a_link_to_a_library_is_not_loaded(builder: Builder) -> None:
    planted = plant(builder)
    planted.rename(builder.folder / "elsewhere.so")
    planted.symlink_to(builder.folder / "elsewhere.so")
    assert "stranger" not in builder.run(LOAD).stdout


class FromMemory:
    """Where the text of a kernel comes from."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_data(self, path: str) -> bytes:
        return self.text.encode()


@NEEDS_COMPILER
@pytest.mark.usefixtures("builder")
def test_a_library_without_our_operations_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(torch.ops.fastgrad), "native_warning", raising=False)
    module = ModuleSpec("x", FromMemory(TEXT))  # type: ignore[arg-type]
    attention = NativeAttention("attention_x", module, KernelSpec(3, 4, (1.0, 1.0)))
    x = torch.ones(1, 1, 8, 3)
    with pytest.warns(NativeWarning, match="has not the operations of attention_x"):
        assert attention.forward(x, x, x, *[None] * 5) is None


def test_folders_are_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "a" / "b" / "c"))
        assert cache_folder() == tmp_path / "a" / "b" / "c"
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o755)
    assert cache_folder() == tmp_path / "cache"
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("folder", "parent", "safe"),
    [
        (0o700, 0o700, True), (0o755, 0o755, True), (0o700, 0o1777, True),
        (0o777, 0o700, False), (0o1777, 0o700, False), (0o700, 0o777, False), (0o702, 0o700, False),
    ],
)  # fmt: skip
def test_modes_of_a_folder_and_its_parents(tmp_path: Path, folder: int, parent: int, safe: bool) -> None:
    inner = tmp_path / "parent" / "folder"
    inner.mkdir(parents=True)
    inner.chmod(folder)
    inner.parent.chmod(parent)
    assert (why_unsafe(inner) is None) == safe


def test_a_group_may_write_if_nobody_else_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each user has a group of the same name, and the umask is 002."""
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o770)
    assert (why_unsafe(folder) is None) == private_files._is_private_group(os.getegid())
    for private in (False, True):
        monkeypatch.setattr(private_files, "_is_private_group", lambda gid, private=private: private)
        assert (why_unsafe(folder) is None) == private
    folder.chmod(0o777)
    assert why_unsafe(folder) is not None


def test_whose_group_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.getpwuid(os.geteuid())

    def group(name: str, members: list[str]) -> None:
        monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))

    for name, members, gid, private in (
        (user.pw_name, [], user.pw_gid, True),
        (user.pw_name, [user.pw_name], user.pw_gid, True),
        (user.pw_name, ["mallory"], user.pw_gid, False),
        ("users", [], user.pw_gid, False),
        (user.pw_name, [], user.pw_gid + 1, False),
    ):  # fmt: skip
        group(name, members)
        assert private_files._is_private_group(gid) == private, (name, members, gid)


def test_another_user_uses_no_folder_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root with the HOME of another, or the other way round; what root owns is trusted."""
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    expected = None if tmp_path.stat().st_uid == 0 else "owner"
    assert (why_unsafe(tmp_path) is None) == (expected is None)


@AS_ROOT
def test_links_on_the_way_are_followed_before_anything_is_checked(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", STRANGER, -1)
    (tmp_path / "link").symlink_to("theirs")
    assert why_unsafe(tmp_path / "link") is not None


def test_a_temporary_folder_that_others_may_change_is_not_used(builder: Builder) -> None:
    builder.cache.mkdir()
    builder.cache.chmod(0o777)
    temporary = builder.folder / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    result = builder.run(LOAD, environment={"TMPDIR": str(temporary)})
    assert builder.compilations == []
    assert result.stdout.count("others may change what is loaded") == 2
    assert list(temporary.iterdir()) == []


def test_bytecode_beside_triton_kernels_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies in the cache from a time when others could write there."""
    spec = ModuleSpec("package.module", FromMemory("VALUE = 'ours'\n"))  # type: ignore[arg-type]
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "cache"))
    path = triton_kernels._file("kernels", spec)
    assert path.parent == tmp_path / "cache"
    planted = Path(importlib.util.cache_from_source(str(path)))
    planted.parent.mkdir()
    code = marshal.dumps(compile("VALUE = 'of a stranger'", str(path), "exec"))
    times = int(path.stat().st_mtime).to_bytes(4, "little") + path.stat().st_size.to_bytes(4, "little")
    planted.write_bytes(importlib.util.MAGIC_NUMBER + bytes(4) + times + code)
    module = triton_kernels.import_kernels("kernels", spec)
    del sys.modules["package.kernels"]
    assert module.VALUE == "ours"


# ---------------------------------------------------------------- what killed processes leave


@pytest.fixture
def temporary(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, where this process has none yet."""
    folder = builder.folder / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    for function in (private_files.private_folder, private_files.remove_dead_folders):
        function.cache_clear()
    yield folder
    for function in (private_files.private_folder, private_files.remove_dead_folders):
        function.cache_clear()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@NEEDS_COMPILER
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_killed_build_is_cleaned_up_and_a_live_one_is_not(builder: Builder, temporary: Path) -> None:
    body = 'case " $* " in *" -c "*) echo $$ > "$0.started"; sleep 60 & wait;; esac'
    processes, compilers = [], []
    started = builder.folder / "compiler.started"
    for number in range(2):
        builder.write_compiler(body)
        processes.append(builder.start(BUILD.replace("42", f"42 + {number}")))
        wait_for(started, processes[-1])
        time.sleep(0.1)
        compilers.append(int(started.read_text()))
        started.unlink()
    assert len(list(temporary.iterdir())) == 2
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    assert running(compilers[0])  # an orphan
    builder.write_compiler()
    build_one(TEXT.replace("42", "43 + 0"))
    assert not running(compilers[0])
    assert running(compilers[1])
    assert processes[1].poll() is None
    assert len(list(temporary.iterdir())) == 2  # of this process and of the live one
    for pid in (processes[1].pid, compilers[1]):
        os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
