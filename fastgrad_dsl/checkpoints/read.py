"""A folder with config.json and safetensors files, from anybody: read without running or following anything in it.

Only regular files directly in the folder are opened, and pooling's config one folder below; links are refused. What a
file of weights says of itself is checked by its length before memory is taken; tensors are read one by one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_args

from safetensors import SafetensorError, safe_open

from fastgrad_dsl.documents.form import FORMATS, shown
from fastgrad_dsl.documents.origin import Dtype
from fastgrad_dsl.documents.read import MAX_BYTES, parse_json
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODULES = "modules.json"
"""Of sentence-transformers: what comes after the model."""

TEXTS = (CONFIG, MODULES, INDEX)
DTYPES = frozenset(get_args(Dtype))


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a file says of a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's JSON files, by name, as text and as data, and the headers of its files of weights."""

    folder: Path
    texts: Mapping[str, str]
    data: Mapping[str, Any]
    metadata: Mapping[str, Mapping[str, str]]
    tensors: Mapping[str, TensorEntry]

    @property
    def config(self) -> Mapping[str, object]:
        """config.json."""
        found: Mapping[str, object] = self.data[CONFIG]
        return found

    def tensor(self, name: str) -> Tensor:
        """The numbers of a tensor, read now."""
        path = self.folder / self.tensors[name].file
        with _opened(path) as file:
            found: Tensor = file.get_tensor(name)
            return found


def read_folder(folder: Path) -> Checkpoint:
    """Read all of a checkpoint but its numbers. Raises TfgError FG601 for all that is wrong with the files."""
    if not folder.is_dir():
        raise _unreadable(
            folder, "it is not a folder", "name a folder with config.json and model.safetensors"
        )
    texts: dict[str, str] = {}
    data: dict[str, Any] = {}
    alone = os.path.lexists(folder / WEIGHTS)
    for name in (CONFIG, MODULES, *(() if alone else (INDEX,))):
        if name == CONFIG or os.path.lexists(folder / name):
            texts[name], data[name] = _json(folder, name)
    if not isinstance(data[CONFIG], dict):
        raise _unreadable(folder / CONFIG, "it is no JSON object")
    for name in _poolings(data.get(MODULES)):
        texts[name], data[name] = _json(folder, name)
    if alone:
        files: dict[str, set[str] | None] = {WEIGHTS: None}
    elif INDEX in data:
        files = dict(_shards(folder / INDEX, data[INDEX]))
    else:
        raise _no_weights(folder)
    metadata: dict[str, Mapping[str, str]] = {}
    tensors: dict[str, TensorEntry] = {}
    for name, wanted in sorted(files.items()):
        metadata[name], found = _header(folder, name)
        if wanted is not None and wanted != set(found):
            other = sorted(wanted ^ set(found))[0]
            said = (
                "is in it, but not in the index" if other in found else "is not in it, but the index says so"
            )
            raise _unreadable(folder / name, f"the tensor {shown(other)} {said}")
        tensors.update(found)
    return Checkpoint(folder, texts, data, metadata, tensors)


def _json(folder: Path, name: str) -> tuple[str, Any]:
    path = folder / name
    _check_file(folder, name)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    try:
        tree = parse_json(content, str(path))
    except TfgError as error:
        said = [Diagnostic("FG601", each.message) for each in error.diagnostics]
        raise TfgError(said) from None
    return content.decode(), tree


def is_pooling(name: str) -> bool:
    """Whether a name is that of the config of pooling, one folder below the checkpoint's: 1_Pooling/config.json."""
    parts = PurePosixPath(name).parts
    return (
        FORMATS["inside"](name) and len(parts) == 2 and parts[0].endswith("_Pooling") and parts[1] == CONFIG
    )


def is_weights(name: object) -> bool:
    """Whether a name is that of a safetensors file directly in a folder."""
    if not isinstance(name, str) or not FORMATS["inside"](name) or "\\" in name:
        return False
    return PurePosixPath(name).name == name and name.endswith(".safetensors")


def _poolings(modules: object) -> list[str]:
    """The configs of pooling in modules.json; `families/pooling.py` examines the rest."""
    found = modules if isinstance(modules, list) else []
    names = [f"{each.get('path')}/{CONFIG}" for each in found if isinstance(each, dict)]
    return [name for name in names if is_pooling(name)]


def _shards(path: Path, index: Any) -> Mapping[str, set[str]]:
    """The files that an index names, and the tensors that each holds."""
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise _unreadable(path, "it has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file in named.items():
        if not is_weights(file):
            said = f"{shown(tensor)} is said to be in {shown(file)}, which is not a safetensors file of the folder"
            raise _unreadable(path, said)
        files.setdefault(file, set()).add(tensor)
    return files


def _check_file(folder: Path, name: str) -> None:
    """A regular file, and no link on the way to it from the folder."""
    path = folder
    for part in PurePosixPath(name).parts:
        path /= part
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            raise _unreadable(path, (error.strerror or str(error)).lower()) from None
        if stat.S_ISLNK(mode):
            help_ = "copy the folder without links, as `cp -rL` does"
            raise _unreadable(path, "it is a link, which may lead anywhere", help_)
    if not stat.S_ISREG(mode):
        raise _unreadable(path, "it is not a regular file")


def _header(folder: Path, name: str) -> tuple[Mapping[str, str], dict[str, TensorEntry]]:
    """Metadata and tensors of a file of weights."""
    _check_file(folder, name)
    with _opened(folder / name) as file:
        slices = {each: file.get_slice(each) for each in file.keys()}  # noqa: SIM118 (it is no dict)
        found = {
            each: TensorEntry(name, found.get_dtype(), tuple(found.get_shape()))
            for each, found in slices.items()
        }
        metadata: Mapping[str, str] = file.metadata() or {}
    for each, entry in found.items():
        if entry.dtype not in DTYPES:
            raise _unreadable(
                folder / name, f"{shown(each)} has the type {shown(entry.dtype)}, which is not read"
            )
    return metadata, found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = str(error)
    raise _unreadable(path, reason)


def _no_weights(folder: Path) -> TfgError:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    help_ = (
        f"{pickles[0]} is a pickle, which may run code: convert it where you trust it" if pickles else None
    )
    said = f"it has neither {WEIGHTS} nor {INDEX}"
    return _unreadable(folder, said, *([help_] if help_ else []))


def _unreadable(path: Path, reason: str, *help_: str) -> TfgError:
    return TfgError.of("FG601", f"cannot read the checkpoint {path}: {reason}", *help_)
