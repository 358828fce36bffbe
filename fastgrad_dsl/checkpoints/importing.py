"""From a checkpoint's folder to a spec, its weights, and what is needed to go back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrad_dsl.checkpoints.mapping import Places, check_shape
from fastgrad_dsl.checkpoints.model import Imported, recognise
from fastgrad_dsl.checkpoints.read import Checkpoint, read_folder
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.documents.origin import Origin, TensorOrigin
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.storage.import_record import beside
from fastgrad_dsl.storage.staged import Writer, check_absent, text_writer, write_together
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = {"format": "pt"}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Outputs:
    """The files of an import, beside the spec: MODEL.tfg, .safetensors, .origin.json and .kept.safetensors."""

    spec: Path

    @property
    def weights(self) -> Path:
        """The weights, under the paths of the spec."""
        return self.spec.with_suffix(".safetensors")

    @property
    def origin(self) -> Path:
        """What the checkpoint was."""
        return beside(self.spec)

    @property
    def kept(self) -> Path:
        """The tensors that no computation reads."""
        return self.spec.with_suffix(".kept.safetensors")


@dataclass(frozen=True)
class Summary:
    """What was imported: the family, how many tensors and numbers, and the types of the latter."""

    outputs: Outputs
    title: str
    tensors: int
    entries: int
    dtypes: tuple[str, ...]
    kept: int


def import_checkpoint(folder: Path, spec: Path, *, force: bool = False) -> Summary:
    """Read a checkpoint and write `spec` and the files beside it.

    Raises TfgError: FG601 (unreadable files), FG602 (a family or setting that is not supported), FG603 (tensors that
    are not those of the family), FG421 and FG604 (outputs).
    """
    outputs = Outputs(spec)
    check_absent(dict.fromkeys((spec, outputs.weights, outputs.origin)), force=force)
    checkpoint = read_folder(folder)
    model = recognise(checkpoint.data, checkpoint.tensors)
    places = model.places(checkpoint.tensors)
    for name, rule in places.rules.items():
        check_shape(name, rule, model.shapes, checkpoint.tensors[name].shape)
        if checkpoint.tensors[name].dtype not in FLOATS:
            raise TfgError.of(
                "FG603", f"{name} has the type {checkpoint.tensors[name].dtype}, expected floats"
            )
    writers: dict[Path, Writer] = {outputs.weights: partial(_write_weights, checkpoint, model, places)}
    if places.kept:
        writers[outputs.kept] = partial(_write_kept, checkpoint, places.kept)
    writers[outputs.origin] = text_writer(to_json(_origin(checkpoint, places)))
    writers[spec] = text_writer(model.spec)
    write_together(writers, force=force)
    entries = [checkpoint.tensors[name] for name in places.rules]
    return Summary(
        outputs,
        model.family.title,
        len(entries),
        sum(_product(shape) for shape in model.shapes.values()),
        tuple(sorted({entry.dtype for entry in entries})),
        len(places.kept),
    )


def spec_weights(checkpoint: Checkpoint, model: Imported, places: Places) -> dict[str, Tensor]:
    """The weights of the spec by path. Raises TfgError FG603 where two tensors that are one weight differ."""
    import torch

    found: dict[str, Tensor] = {}
    for name, rule in places.rules.items():
        parts = rule.layout.into(checkpoint.tensor(name), [model.shapes[path] for path in rule.paths])
        for path, part in zip(rule.paths, parts, strict=True):
            if path not in found:
                found[path] = part.contiguous()
            elif not torch.equal(found[path], part):
                other = next(each for each, known in places.rules.items() if path in known.paths)
                raise TfgError.of("FG603", f"{name} and {other} differ, though config.json ties them")
    return found


def _write_weights(checkpoint: Checkpoint, model: Imported, places: Places, path: Path) -> None:
    from fastgrad_dsl.storage.weights import write_tensors

    write_tensors(path, spec_weights(checkpoint, model, places), FORMAT)


def _write_kept(checkpoint: Checkpoint, names: tuple[str, ...], path: Path) -> None:
    from fastgrad_dsl.storage.weights import write_tensors

    write_tensors(path, {name: checkpoint.tensor(name) for name in names}, FORMAT)


def _origin(checkpoint: Checkpoint, places: Places) -> Origin:
    tensors = {
        name: TensorOrigin(file=entry.file, dtype=entry.dtype, shape=entry.shape)  # type: ignore[arg-type]
        for name, entry in sorted(checkpoint.tensors.items())
    }
    return Origin(
        format=format_of(Origin),
        texts=dict(checkpoint.texts),
        metadata={file: dict(found) for file, found in checkpoint.metadata.items()},
        tensors=tensors,
        kept=places.kept,
    )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
