"""The folder of a training run: whose it is, who trains in it, and what lies in it.

    model/                    the compiled model, as `fastgrad compile` writes it
    spec/                     the spec under its own name, and the files that it uses
    weights.safetensors       the weights at the last checkpoint
    tokenizer.json            the tokenizer of the text, if it was not read as bytes
    checkpoint.safetensors    all that training needs to go on; checkpoint/ where several processes trained
    log.jsonl                 one JSON object for each step and for each validation

One process at a time trains in a folder: it holds a lock, which ends with the process however that ends.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EEXIST, ELOOP
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from fastgrad_compiler.frontend.modules import Module, load, standard_library
from fastgrad_compiler.frontend.reporter import Reporter
from fastgrad_compiler.runtime.private_files import remove_dead_files
from fastgrad_dsl.api.loader import MODEL, WEIGHTS
from fastgrad_dsl.report.reproduce import IN_MEMORY
from fastgrad_dsl.storage.build_folder import recover
from fastgrad_dsl.storage.build_manifest import MANIFEST
from fastgrad_dsl.storage.files import write_atomically, writing
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled
    from fastgrad_dsl.models.text_data import TextData
    from fastgrad_dsl.models.tokenizer import Tokenizer
    from fastgrad_grammar.source import Source

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
SPEC, LOCK, TOKENIZER = "spec", ".lock", "tokenizer.json"
SHARDED = "checkpoint"  # the folder of a checkpoint of several processes
_FILES = (CHECKPOINT, WEIGHTS, LOG)  # in the order in which a run that is replaced is removed
_TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, (*_FILES, TOKENIZER)))}|{MODEL})\.\w+\.(tmp|new|old)")
"""What `write_atomically` and `write_build` leave where they are killed; they remove it the next time."""
_SHARDED = re.compile(r"step-(\d{1,16})-(-1|\d{1,16})")  # steps done, and the last that was validated
_LOCK_TEXT = re.compile(rb"(p|pr|pro|proc|proce|proces|process|process \d*( (o|on|on [^\n]*\n?)?)?)?")
"""The text of a lock, or as much of it as a process wrote before it was killed or the disk was full."""
_LOCK_BYTES = 1000  # of a lock's text, and more


@contextmanager
def claimed(
    folder: Path, *, resume: bool, force: bool, parts: Sequence[str] = (), record: str | None = None
) -> Iterator[None]:
    """The folder for this process alone, without what killed processes left, and to begin in unless `resume`.

    parts: folders in it that hold runs of their own. record: the file that says what these are.

    Raises TfgError: FG431 where another run, or files that belong to no run, are there and `force` is not given; FG432
    where another process trains in it; FG421 where it cannot be written. What was there is unchanged then.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_lock(folder / LOCK)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise _in_use(folder) from None
    try:
        with writing(folder):
            (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            if not resume and not force:
                _check_free(folder, {*parts, *([record] if record else [])})
            _refuse_links(folder / part for part in parts)
            for place in (*(folder / part for part in parts), folder):
                _clean(place)
                if not resume:
                    # the checkpoint first: what is left is not a run, and never a mixture of two
                    remove_sharded(place)
                    for name in (*_FILES, TOKENIZER):
                        (place / name).unlink(missing_ok=True)
            if record is not None:
                remove_dead_files(folder, f".{record}.")
                if not resume:
                    (folder / record).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _check_lock(path: Path) -> None:
    """OSError where the lock's name is that of something else, which would be written over."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise OSError(EEXIST, f"{path} is not a regular file", str(path))
    with path.open("rb") as stream:
        content = stream.read(_LOCK_BYTES)
    if not _LOCK_TEXT.fullmatch(content):
        raise OSError(EEXIST, f"{path} is not the lock of a run", str(path))


def _check_free(folder: Path, others: set[str]) -> None:
    there = {entry.name for entry in folder.iterdir() if not _TEMPORARY.fullmatch(entry.name)} - {LOCK}
    known = {*_FILES, MODEL, SPEC, TOKENIZER} if (folder / MODEL / MANIFEST).is_file() else {*_FILES}
    known |= {SHARDED} if _holds_only_sharded(folder) else set()
    sharded = {SHARDED} if sharded_steps(folder) else set()
    run = (
        {CHECKPOINT} & there or sharded or {name for name in {LOG} & there if (folder / name).lstat().st_size}
    )
    run |= others & there
    known |= others
    if run or there - known:
        raise _occupied(folder, run, sorted(there - known))


def sharded_steps(folder: Path) -> list[tuple[int, int]]:
    """The checkpoints of several processes that are whole: the steps done, and the last one that was validated."""
    place = folder / SHARDED
    if place.is_symlink() or not place.is_dir():
        return []
    names = [each.name for each in place.iterdir() if each.is_dir()]
    return [(int(m[1]), int(m[2])) for name in names if (m := _SHARDED.fullmatch(name))]


def remove_sharded(folder: Path, *, but: Path | None = None, unfinished: bool = False) -> None:
    """Remove the checkpoints of several processes; with `unfinished` only what is left of those that are not whole.

    Raises OSError.
    """
    place = folder / SHARDED
    if place.is_symlink() or not place.is_dir():
        return
    for each in place.iterdir():
        ours = _SHARDED.fullmatch(each.name.removeprefix(".")) and not each.is_symlink() and each.is_dir()
        if ours and each != but and (each.name.startswith(".") or not unfinished):
            shutil.rmtree(each)
    with suppress(OSError):  # something is there
        place.rmdir()


def _holds_only_sharded(folder: Path) -> bool:
    place = folder / SHARDED
    if place.is_symlink() or not place.is_dir():
        return False
    return all(_SHARDED.fullmatch(each.name.removeprefix(".")) for each in place.iterdir())


def _clean(folder: Path) -> None:
    """Remove what writers left that were killed."""
    remove_sharded(folder, unfinished=True)
    for name in (*_FILES, TOKENIZER):
        remove_dead_files(folder, f".{name}.")
    for path, clean in (
        (folder / SPEC, lambda place: remove_dead_files(place, ".")),
        (folder / MODEL, recover),
    ):
        if not path.is_symlink():
            clean(path)


def publish(
    compiled: Compiled,
    texts: Mapping[str, str],
    folder: Path,
    *,
    tokenizer: bytes | None = None,
    force: bool = False,
) -> None:
    """Write the compiled model, the `spec_files` of its spec and the file of a tokenizer into a run's folder.

    What is there already is not written again.

    Raises TfgError FG421 where they cannot be written, FG428 where the model was changed by hand, and not `force`.
    """
    if not _holds(folder / MODEL, compiled.files):
        with writing(folder / MODEL):
            _refuse_links([folder / MODEL])
        compiled.write(folder / MODEL, force=force)
    if not _holds(folder / SPEC, texts):
        with writing(folder / SPEC):
            for name, text in texts.items():
                inside = Path(SPEC, name).parents
                _refuse_links(folder / each for each in inside if each != Path("."))
                write_atomically(folder / SPEC / name, text)
    if tokenizer is not None and not _holds(folder, {TOKENIZER: tokenizer}):
        with writing(folder / TOKENIZER):
            write_atomically(folder / TOKENIZER, tokenizer)


def _refuse_links(places: Iterable[Path]) -> None:
    """OSError where one of these folders is a link: it may lead out of the run's folder."""
    for place in places:
        if place.is_symlink():
            raise OSError(ELOOP, f"{place} is a link", str(place))


def _holds(folder: Path, contents: Mapping[str, str | bytes]) -> bool:
    """Whether a folder's files have these contents already."""
    whole = {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}
    try:
        return all((folder / name).read_bytes() == content for name, content in whole.items())
    except OSError:
        return False


def spec_files(source: Source) -> dict[str, str]:
    """A spec and the files that it uses, by path from the spec's folder; the spec is the first.

    Files outside of that folder are named by their last part, after others of that name in folders 2, 3 and so on. The
    standard library is not among them.
    """
    main = "spec.tfg" if source.path == IN_MEMORY else Path(source.path).name
    found = {main: source.text}
    above = Path(source.path).resolve().parent
    for used in _used(load(source, Reporter()), set()):
        path = Path(used.path).resolve()
        inside = path.is_relative_to(above)
        name = path.relative_to(above).as_posix() if inside else path.name
        found[name if name not in found else _free_name(name, found)] = used.text
    return found


def _free_name(name: str, taken: Iterable[str]) -> str:
    return next(each for number in count(2) if (each := f"{number}/{name}") not in taken)


def _used(module: Module, seen: set[str]) -> Iterator[Source]:
    for each in module.uses.values():
        if each is standard_library() or not each.items:
            continue
        source = each.items[0].span.source
        if source.path not in seen:
            seen.add(source.path)
            yield source
            yield from _used(each, seen)


class RunData(Protocol):
    """What a run learns: a text, or several."""

    @property
    def digest(self) -> str:
        """The SHA-256 of its tokens."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """What made them."""
        ...


def identity(
    compiled: Compiled, texts: Mapping[str, str], data: TextData, *, exact: bool, calibrate: bool
) -> dict[str, str]:
    """What a resumed run must share with the one that was begun, by what a person calls it; texts by their hash.

    `texts` are the `spec_files`, `data` is the text to learn.
    """
    asked = {
        "--exact": "given" if exact else "not given",
        "--calibrate": "given" if calibrate else "not given",
    }
    return {**model_identity(compiled, texts, data), **asked}


def model_identity(compiled: Compiled, texts: Mapping[str, str], data: RunData) -> dict[str, str]:
    """What runs of one model on one text share, by what a person calls it."""
    main, *used = texts.items()
    params = ", ".join(f"{name}={value}" for name, value in sorted(compiled.params.items()))
    tokenizer = data.tokenizer.source
    return {
        "the text": f"sha256 {data.digest}",
        **({} if tokenizer is None else {"--tokenizer": _digest(tokenizer)}),
        "the spec": _digest(main[1]),
        **{f"the file {name}": _digest(content) for name, content in used},
        "--set": params or "nothing",
        "--model": compiled.program.name,
        "--target": compiled.target,
    }


def _digest(content: str | bytes) -> str:
    return f"sha256 {sha256(content.encode() if isinstance(content, str) else content).hexdigest()}"


def _in_use(folder: Path) -> TfgError:
    try:
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        holder = ""
    message = f"{holder or 'another process'} trains in {folder}"
    return TfgError.of("FG432", message, "wait until it has ended, or give another folder with --out")


def _occupied(folder: Path, run: set[str], foreign: list[str]) -> TfgError:
    if run:
        message, anew = f"{folder} holds a run already", "begin anew in it, which removes that run"
        ways = (f"give --resume to continue it, --force to {anew}, or another folder with --out",)
    else:
        message = f"{folder} holds other files than a run's: {', '.join(foreign[:3])}"
        ways = ("give another folder with --out, or --force to train in this one beside them",)
    return TfgError.of("FG431", message, *ways)
