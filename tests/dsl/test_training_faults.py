"""Nothing is lost: every operation on a run's files fails once, and the process is killed at every one of them.

Afterwards the old state or the new one is whole, `--resume` ends with the very weights of a run that was not disturbed,
and the log has each step once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.text_data import TextData
from fastgrad_dsl.training.checkpoint import read_checkpoint
from fastgrad_dsl.training.folder import CHECKPOINT, LOG, claimed, publish, spec_files
from fastgrad_dsl.training.loop import Context, Options, train
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.file_faults import Faults, Killed, failing
from tests.dsl.training_model import Bigram, loss, text_data

OPTIONS = Options(
    steps=3, tokens=8, batch=2, warmup=1, validate_every=2, validation_batches=1, checkpoint_every=2
)
SLOW = pytest.mark.slow
FIRST = [1, *(pytest.param(first, marks=SLOW) for first in (0, 2, 3))]
"""Of each four operations in a row, one fails in `make test`, the others in `make test-all`."""
SPEC = """
dim b
dim n <= 64
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 256] = normal(std = 0.02)
    return embedding(table, tokens)
}
"""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    made = fg.compile(SPEC, target="torch")
    made.__dict__["files"] = {
        "model.py": made.modules["model.py"]
    }  # one stands for all: `compile` has its own test
    return made


@pytest.fixture(scope="module")
def data() -> TextData:
    return text_data()


def run(
    folder: Path, data: TextData, compiled: Compiled, *, resume: bool = False, force: bool = False
) -> None:
    texts = spec_files(compiled.source)
    context = Context({"the text": data.digest}, publish=lambda: publish(compiled, texts, folder))
    with claimed(folder, resume=resume, force=force):
        list(train(Bigram(), loss, data, OPTIONS, folder, resume=resume, context=context))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: TextData, compiled: Compiled) -> dict[str, Tensor]:
    """The weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, data, compiled)
    return load_file(folder / "weights.safetensors")


def outcome(begin: Callable[[], None]) -> TfgError | Killed | None:
    """How a run ends: None where the operation that fails harms nothing, such as removing what is gone."""
    try:
        begin()
    except (TfgError, Killed) as stopped:
        return stopped
    return None


def events(folder: Path) -> list[dict[str, object]]:
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def assert_whole(folder: Path) -> bool:
    """That every file that is there is whole; whether there is a run to resume."""
    if (folder / "weights.safetensors").exists():
        load_file(folder / "weights.safetensors")
    if not (folder / CHECKPOINT).exists():
        return False
    read_checkpoint(folder / CHECKPOINT)
    return True


def assert_ends_as(
    folder: Path, data: TextData, compiled: Compiled, whole: dict[str, Tensor], *, force: bool = False
) -> None:
    with failing(Faults(folder)):
        resume = assert_whole(folder)
        run(folder, data, compiled, resume=resume, force=force and not resume)
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    found = [(e["step"], "validation_loss" in e) for e in events(folder)]
    assert found == [(1, False), (2, False), (2, True), (3, False), (3, True)]
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "model" / "model.py").read_text() == compiled.files["model.py"]
    assert (folder / "spec" / "spec.tfg").read_text() == SPEC


def operations(folder: Path, data: TextData, compiled: Compiled) -> list[str]:
    with failing(Faults(folder)) as faults:
        run(folder, data, compiled)
    return faults.seen


def test_faults_are_seen_at_every_file(tmp_path: Path, data: TextData, compiled: Compiled) -> None:
    seen = operations(tmp_path / "run", data, compiled)
    for what in ("checkpoint", "weights", "log.jsonl", "spec.tfg", "model.py"):
        of_file = {each.split()[0] for each in seen if what in each}
        renamed = set() if what == "model.py" else {"replace"}  # whose folder takes its place as a whole
        assert of_file >= {"open", "write", "fsync"} | renamed, what
    assert "open .lock" in seen
    assert "write log.jsonl" in seen
    assert len(seen) > 50


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize(
    "error", [errno.ENOSPC, pytest.param(errno.EIO, marks=SLOW), None], ids=["full", "broken", "killed"]
)
def test_every_operation_fails_once(
    tmp_path: Path,
    data: TextData,
    compiled: Compiled,
    whole: dict[str, Tensor],
    error: int | None,
    first: int,
) -> None:
    count = len(operations(tmp_path / "count", data, compiled))
    for at in range(first, count, len(FIRST)):
        folder = tmp_path / f"run{at}"
        with failing(Faults(folder, at, error)) as faults:
            stopped = outcome(partial(run, folder, data, compiled))
        if isinstance(stopped, TfgError):
            (diagnostic,) = stopped.diagnostics
            assert diagnostic.code == "FG421", faults.seen[-1]
            assert os.strerror(error or 0) in diagnostic.message
            assert str(folder) in diagnostic.message
            assert "unlink" in faults.seen[at] or not list(folder.rglob("*.tmp")), faults.seen[-1]
            step = read_checkpoint(folder / CHECKPOINT).progress.step if assert_whole(folder) else None
            if diagnostic.help and step is not None:
                assert f"the checkpoint of step {step} is whole" in diagnostic.help[0], faults.seen[-1]
        assert_ends_as(folder, data, compiled, whole)


@pytest.mark.medium
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("error", [pytest.param(errno.ENOSPC, marks=SLOW), None], ids=["full", "killed"])
def test_every_operation_of_a_resumed_run_and_of_a_replacement_fails_once(
    tmp_path: Path,
    data: TextData,
    compiled: Compiled,
    whole: dict[str, Tensor],
    error: int | None,
    first: int,
) -> None:
    begun = tmp_path / "begun"
    seen = operations(tmp_path / "seen", data, compiled)
    begins = next(at for at, each in enumerate(seen) if each.startswith("replace .checkpoint"))
    with failing(Faults(begun, seen.index("write log.jsonl", begins) + 2)), pytest.raises(Killed):
        run(begun, data, compiled)
    assert read_checkpoint(begun / CHECKPOINT).progress.step == 0
    assert [event["step"] for event in events(begun)] == [1]
    for resume in (True, False):
        shutil.copytree(begun, tmp_path / "count" / str(resume))
        with failing(Faults(tmp_path)) as counted:
            run(tmp_path / "count" / str(resume), data, compiled, resume=resume, force=not resume)
        for at in range(first, len(counted.seen), len(FIRST)):
            folder = tmp_path / f"{resume}{at}"
            shutil.copytree(begun, folder)
            with failing(Faults(folder, at, error)):
                outcome(partial(run, folder, data, compiled, resume=resume, force=not resume))
            assert_ends_as(folder, data, compiled, whole, force=not resume)


PROGRAM = """
import sys
from pathlib import Path
import fastgrad_dsl as fg
from tests.dsl import test_training_faults as here
from tests.dsl.file_faults import Faults, failing
folder, at = Path(sys.argv[1]), int(sys.argv[2])
compiled = fg.compile(here.SPEC, target="torch")
compiled.__dict__["files"] = {"model.py": compiled.modules["model.py"]}
with failing(Faults(folder, at, None, real=True)):
    here.run(folder, here.text_data(), compiled)
"""


@pytest.mark.medium
@pytest.mark.parametrize("share", [0.6, pytest.param(0.3, marks=SLOW), pytest.param(0.9, marks=SLOW)])
def test_a_process_that_ends_within_an_operation(
    tmp_path: Path, data: TextData, compiled: Compiled, whole: dict[str, Tensor], share: float
) -> None:
    at = int(share * len(operations(tmp_path / "count", data, compiled)))
    folder = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", PROGRAM, folder, str(at)], check=False, capture_output=True)
    assert ended.returncode == 9, ended.stderr
    assert_ends_as(folder, data, compiled, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, data: TextData, compiled: Compiled, whole: dict[str, Tensor]) -> None:
    """A checkpoint of 36 kB fits once and not twice: the first stays whole, and the run goes on where there is room."""
    folder = small_disk / "run"
    with pytest.raises(TfgError) as full:
        run(folder, data, compiled)
    assert "[FG421]" in str(full.value)
    assert "No space left" in str(full.value)
    moved = small_disk.parent / "moved"
    shutil.copytree(folder, moved)
    assert_ends_as(moved, data, compiled, whole)
