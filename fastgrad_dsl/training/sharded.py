"""Checkpoints of several processes: torch.distributed.checkpoint in a folder, written while training goes on.

    checkpoint/step-120-100/            120 steps are done, the last validation was after step 100
        shard-00001-model-...safetensors    the parts of one process
        progress.json                       what the header of a checkpoint of one process holds, and the mesh

The folder has its name when all processes have written their parts, and not before; the one before it is removed after
that. Any number of processes can go on from it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from fastgrad_dsl.storage.files import write_atomically, writing
from fastgrad_dsl.training.checkpoint import (
    FORMAT,
    GENERATORS,
    GUARDS,
    MOMENTS,
    UNREADABLE,
    Checkpoint,
    Progress,
    States,
    broken,
    header_of,
    progress_of,
    read_checkpoint,
    state_tensors,
)
from fastgrad_dsl.training.folder import CHECKPOINT, SHARDED, remove_sharded, sharded_steps
from fastgrad_dsl.training.ranks import Mesh, Ranks

PROGRESS = "progress.json"


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A checkpoint of several processes; its tensors are read where a model says how they are laid out.

    mesh: of the processes that wrote it.
    """

    mesh: Mesh

    def loaded(self, model: nn.Module, ranks: Ranks) -> Checkpoint:
        """With the tensors that this process needs: its parts of weights and moments, its own generators and guards.

        On another mesh all processes have the generators of the first one, and the guards count anew.
        Raises TfgError FG413 where a file is missing or damaged.
        """
        same = ranks.mesh == self.mesh
        own = f"rank.{ranks.rank if same else 0}."
        likes = _likes(model)
        try:
            reader = HuggingFaceStorageReader(str(self.path))
            targets: dict[str, Tensor] = {}
            for name, kind in reader.read_metadata().state_dict_metadata.items():
                if not isinstance(kind, TensorStorageMetadata) or not _is_wanted(name, own, same):
                    continue
                like = likes.get(name)
                made = torch.empty(kind.size, dtype=kind.properties.dtype)
                alike = like is not None and like.shape == made.shape and like.dtype == made.dtype
                targets[name] = torch.empty_like(like) if alike and like is not None else made
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it assumes a single process
                load(targets, storage_reader=reader, no_dist=True)
        except UNREADABLE as error:
            raise broken(self.path, " ".join(str(error).split())[:300]) from None
        found = {_shared(name, own): tensor for name, tensor in targets.items()}
        steps = {name: step.view(()) for name, step in found.items() if _is_count(name) and step.numel() == 1}
        return Checkpoint(self.path, {**found, **steps}, self.progress)


def latest(folder: Path) -> Checkpoint:
    """The newest checkpoint of a run's folder, of one process or of several. TfgError FG413 where there is none."""
    found = max(sharded_steps(folder), default=None)
    if found is None:
        return read_checkpoint(folder / CHECKPOINT)
    sharded = _read(folder / SHARDED / f"step-{found[0]}-{found[1]}")
    with suppress(OSError):
        if (folder / CHECKPOINT).exists():
            other = read_checkpoint(folder / CHECKPOINT)
            if (other.progress.step, other.progress.validated) > found:
                return other
    return sharded


def _read(path: Path) -> ShardedCheckpoint:
    try:
        header = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        sizes = {"tensor": 1, **header["mesh"]}  # checkpoints without it are older than --tensor
        mesh = Mesh(*(int(sizes[each.name]) for each in fields(Mesh)))
        if header["format"] != FORMAT or min(asdict(mesh).values()) < 1:
            raise ValueError("it is of another format")
        texts = {name: json.dumps(value) for name, value in header["progress"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise broken(path, f"{PROGRESS}: {error}") from None
    return ShardedCheckpoint(path, {}, progress_of(path, texts), mesh)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to go on from."""
    return bool(sharded_steps(folder)) or (folder / CHECKPOINT).is_file()


class ShardedWriter:
    """Writes checkpoints of several processes, one at a time, in a thread."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.group = dist.new_group(backend="gloo")  # what the thread sends does not meet what training sends
        self.pending: Future[Any] | None = None
        self.wrong: list[OSError] = []

    def save(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, states: States, progress: Progress
    ) -> None:
        """Begin to write; what is written is the state of now. Raises TfgError FG421 for the one before."""
        self.finish()
        name = f"step-{progress.step}-{progress.validated}"
        hidden, final = self.folder / SHARDED / f".{name}", self.folder / SHARDED / name
        tensors = {
            f"rank.{self.ranks.rank}.{key}" if key.startswith((GENERATORS, GUARDS)) else key: tensor
            for key, tensor in state_tensors(model, optimiser, states).items()
        }
        # a copy, since training goes on; a single number has no parts that a file could name
        kept = {key: t.view(1) if _is_count(key) else t.clone() for key, t in tensors.items()}
        self.ranks.first(lambda: self._begin(hidden, progress))
        writer = HuggingFaceStorageWriter(str(hidden), save_distributed=True)
        pending = async_save(kept, storage_writer=writer, process_group=self.group)
        assert isinstance(pending, Future)
        if self.ranks.leads:
            pending.add_done_callback(lambda done: self._finished(done, hidden, final))
        self.pending = pending

    def finish(self) -> None:
        """Wait for what is being written. Raises TfgError FG421 where it cannot be."""
        pending, self.pending = self.pending, None
        if pending is None:
            return

        def told() -> None:
            with writing(self.folder / SHARDED):
                error = pending.exception()
                for wrong in (*self.wrong, *([error] if isinstance(error, OSError) else [])):
                    raise wrong
                if error is not None:
                    raise error

        self.ranks.each(told)

    def _begin(self, hidden: Path, progress: Progress) -> None:
        with writing(hidden):
            if hidden.exists():
                shutil.rmtree(hidden)
            hidden.mkdir(parents=True)
            values = {name: json.loads(text) for name, text in header_of(progress).items()}
            found = {"format": FORMAT, "mesh": asdict(self.ranks.mesh), "progress": values}
            write_atomically(hidden / PROGRESS, f"{json.dumps(found, indent=2)}\n")

    def _finished(self, done: Future[Any], hidden: Path, final: Path) -> None:
        """All parts are written: give the folder its name, and remove what it replaces."""
        if done.exception() is not None:
            return
        try:
            if final.exists():
                shutil.rmtree(final)
            hidden.rename(final)
            remove_sharded(self.folder, but=final)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        except OSError as error:
            self.wrong.append(error)


def _likes(model: nn.Module) -> Mapping[str, Tensor]:
    """How weights and moments are laid out, by their names in a checkpoint."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        found |= {f"{MOMENTS}{name}.{moment}": weight.detach() for moment in ("exp_avg", "exp_avg_sq")}
    return found


def _is_count(name: str) -> bool:
    return name.startswith(MOMENTS) and name.endswith(".step")


def _is_wanted(name: str, own: str, same: bool) -> bool:
    if not name.startswith("rank."):
        return True
    return name.startswith(own) and (same or not name.startswith(own + GUARDS))


def _shared(name: str, own: str) -> str:
    return name.removeprefix(own) if name.startswith("rank.") else name
