"""From weights under the paths of a spec back to the checkpoint that the spec was imported from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastgrad_dsl.checkpoints.importing import Outputs
from fastgrad_dsl.checkpoints.mapping import Places
from fastgrad_dsl.checkpoints.model import Imported, recognise
from fastgrad_dsl.checkpoints.read import CONFIG, TEXTS, is_pooling, is_weights
from fastgrad_dsl.documents.form import shown
from fastgrad_dsl.documents.origin import Origin
from fastgrad_dsl.documents.read import parse_json, read_document
from fastgrad_dsl.storage.import_record import RECORD
from fastgrad_dsl.storage.staged import Writer, text_writer, write_together
from fastgrad_dsl.storage.weights import read_tensors, read_weights, write_tensors
from fastgrad_grammar.diagnostics import TfgError, nearest

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def export_checkpoint(where: Path, weights: Path, folder: Path, *, force: bool = False) -> int:
    """Write the checkpoint that a spec, or a build of it, was imported from, with new weights; how many tensors it has.

    Raises TfgError: FG605 (no record of an import), FG430 (a record that is damaged), FG418 (weights that are not the
    spec's), FG421 and FG604 (outputs).
    """
    origin, kept_path = find_origin(where)
    data = {name: parse_json(text.encode(), name) for name, text in origin.texts.items()}
    if not isinstance(data.get(CONFIG), dict):
        raise TfgError.of("FG430", f"the record of the import has no {CONFIG}", "import the checkpoint again")
    _check_names(origin, folder)
    model = recognise(data, origin.tensors)
    places = model.places(origin.tensors)
    if places.kept != origin.kept:
        raise TfgError.of(
            "FG430", "the record of the import contradicts itself", "import the checkpoint again"
        )
    found = read_weights(weights, dict.fromkeys(model.shapes, torch.float32))
    _check_weights(weights, found, model)
    kept = _kept(where, places, kept_path)
    writers: dict[Path, Writer] = {
        folder / file: partial(_write_file, origin, places, found, kept, file)
        for file in sorted({entry.file for entry in origin.tensors.values()})
    }
    writers |= {folder / name: text_writer(text) for name, text in origin.texts.items()}
    write_together(writers, force=force)
    return len(origin.tensors)


def _check_names(origin: Origin, folder: Path) -> None:
    """Whether a record names only files that a checkpoint has, and none of their folders is a link in `folder`."""
    weights = {entry.file for entry in origin.tensors.values()} | set(origin.metadata)
    strange = [name for name in weights if not is_weights(name)]
    strange += [name for name in origin.texts if name not in TEXTS and not is_pooling(name)]
    if strange:
        said = f"the record of the import names {shown(strange[0])}, which is not a file of a checkpoint"
        raise TfgError.of("FG430", said, "import the checkpoint again")
    for name in origin.texts:
        above = (folder / name).parent
        if above != folder and above.is_symlink():
            raise TfgError.of("FG604", f"{above} is not written to: it is a link", "name another folder")


def find_origin(where: Path) -> tuple[Origin, Path | None]:
    """The record of the import of a spec, a build or a training run; with a spec also where the kept tensors are."""
    kept: Path | None
    if where.is_dir():
        run = where / "model" / RECORD
        path = run if run.exists() else where / RECORD
        kept = None
    else:
        path, kept = Outputs(where).origin, Outputs(where).kept
    if not path.exists():
        help_ = (
            "`fastgrad import FOLDER -o MODEL.tfg` writes it beside the spec; compile copies it into a build"
        )
        raise TfgError.of("FG605", f"{where} was not imported: there is no {path}", help_)
    return read_document(path, Origin), kept


def _kept(where: Path, places: Places, path: Path | None) -> dict[str, Tensor]:
    """The tensors that the import kept, since no weights of the spec hold them."""
    if not places.kept:
        return {}
    if path is None:
        help_ = f"name the imported .tfg file in place of {where}: they lie beside it"
        raise TfgError.of(
            "FG605", f"the checkpoint has tensors that a build does not hold: {places.kept[0]}", help_
        )
    return read_tensors(path, "FG605", "what the import kept in")


def tensor_of(name: str, places: Places, weights: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the checkpoint, made of the weights of the spec."""
    rule = places.rules[name]
    return rule.layout.out([weights[path] for path in rule.paths])


def _check_weights(path: Path, found: Mapping[str, Tensor], model: Imported) -> None:
    """Whether there is each weight of the spec, in its shape, and nothing else."""
    for wrong, others, said in (
        ([name for name in model.shapes if name not in found], found, "lacks"),
        (
            [name for name in found if name not in model.shapes],
            model.shapes,
            "has what the checkpoint lacks:",
        ),
    ):
        if wrong:
            near = nearest(wrong[0], others)
            help_ = (f"did you mean {near}?",) if near else ()
            raise TfgError.of("FG418", f"{path} {said} {wrong[0]}", *help_)
    for name, shape in model.shapes.items():
        if tuple(found[name].shape) != shape:
            said = f"{list(found[name].shape)}, expected {list(shape)}"
            raise TfgError.of("FG418", f"{path}: {name} has shape {said}")


def _write_file(
    origin: Origin,
    places: Places,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    file: str,
    path: Path,
) -> None:
    made: dict[str, Tensor] = {}
    for name, entry in origin.tensors.items():
        if entry.file == file:
            tensor = kept.get(name) if name in places.kept else tensor_of(name, places, weights)
            if tensor is None:
                raise TfgError.of(
                    "FG605", f"what the import kept lacks {name}", "import the checkpoint again"
                )
            # a copy of its own: names of one weight must not share memory
            made[name] = tensor.to(DTYPES[entry.dtype]).clone(memory_format=torch.contiguous_format)
    write_tensors(path, made, origin.metadata.get(file, {}))
