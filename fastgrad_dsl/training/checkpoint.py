"""Checkpoints of a training run: safetensors, written whole or not at all, and checked before anything is used.

Tensors are the weights, the optimiser's moments, the states of random generators and the counts of guards; the header
holds the rest (`Progress`) as strict JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastgrad_dsl.calibration.pace import MachinePace
from fastgrad_dsl.calibration.record import PlanRecord
from fastgrad_dsl.distributed.sharding import laid_out
from fastgrad_dsl.documents.base import Document, finite
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.form import built, fields
from fastgrad_dsl.documents.write import plain
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.weights import MODEL
from fastgrad_dsl.training.guard_counts import guard_counts, restore_guard_counts
from fastgrad_grammar.diagnostics import TfgError

MOMENTS, GENERATORS, GUARDS = "optimiser.", "generator.", "guard."
MOMENT_NAMES = ("exp_avg", "exp_avg_sq", "step")  # of AdamW
FORMAT = "fastgrad-checkpoint-2"
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
"""What reading a file that is no checkpoint may raise."""
Scalar = int | float | str | bool


class RunPlan(Document, frozen=True):
    """What a run's plan rests on: decisions that are not the compiler's own, their calibration, the machine's pace."""

    decisions: PlanRecord | None
    calibration: Calibration | None
    pace: MachinePace | None


class Progress(Document, frozen=True):
    """Where a run stands, and what a run that goes on from here must share.

    Args:
        step: steps done. validated: the last of them that was followed by a validation, -1 for none.
        seconds: trained so far.
        settings, identity: what a resumed run must share: options, and what else it is of.
        optimiser: its name and constants.
        idle: weights that no gradient has reached, so that they have no moments.
        plan: None in a run without a plan of its own.
    """

    step: Annotated[int, Meta(ge=0, le=2**53)]
    validated: Annotated[int, Meta(ge=-1, le=2**53)]
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    settings: dict[str, Scalar]
    identity: dict[str, str]
    optimiser: dict[str, Scalar]
    idle: tuple[str, ...]
    plan: RunPlan | None


@dataclass(frozen=True)
class States:
    """What changes with every batch besides weights and moments: generators by name, counts of guards."""

    generators: Mapping[str, Tensor]
    guards: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, generators: Mapping[str, torch.Generator]) -> States:
        """A copy of the present ones."""
        kept = {name: generator.get_state() for name, generator in generators.items()}
        return States(kept, guard_counts(model))

    def restore(self, model: nn.Module, generators: Mapping[str, torch.Generator]) -> None:
        """Put them back. Raises RuntimeError or ValueError for states of other generators or guards."""
        for name, generator in generators.items():
            generator.set_state(self.generators[name])
        restore_guard_counts(model, self.guards)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its file, tensors by name, and progress."""

    path: Path
    tensors: Mapping[str, Tensor]
    progress: Progress

    def belongs_to(self, settings: Mapping[str, Scalar], identity: Mapping[str, str]) -> None:
        """Raise TfgError FG414, which names what differs, where it is of another run."""
        kept = {**self.progress.settings, **self.progress.identity}
        given = {**settings, **identity}
        names = [name for name in {**kept, **given} if kept.get(name) != given.get(name)]
        if names:
            differences = (f"{name} was {_shown(kept, name)}, is {_shown(given, name)}" for name in names)
            raise _mismatch(self.path, differences)

    def restore(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        generators: Mapping[str, torch.Generator],
        run_once: Callable[[], object],
    ) -> None:
        """Put the state back; `run_once` runs the model on any batch, which shows how many counts its guards have.

        Raises TfgError FG414 where it is another model's, FG413 where it is not whole.
        """
        present = model.state_dict()
        weights = self._of(MODEL)
        _same_tensors(self.path, weights, present)
        weights = {name: laid_out(weight, present[name]) for name, weight in weights.items()}
        if self.progress.optimiser != described(optimiser):
            was = " ".join(map(str, self.progress.optimiser.values()))
            raise _mismatch(self.path, [f"the optimiser was {was}"])
        moments = self._moments(model, optimiser)
        states = States(self._of(GENERATORS), self._of(GUARDS))
        if states.generators.keys() != generators.keys():
            raise broken(
                self.path, f"it has the states of the generators {', '.join(states.generators) or 'none'}"
            )
        if states.guards:
            run_once()
        try:
            states.restore(model, generators)
        except (RuntimeError, ValueError, TypeError) as error:
            raise broken(self.path, f"the state of a generator or guard is wrong: {error}") from None
        model.load_state_dict(weights)
        state = optimiser.state_dict()
        state["state"] = moments
        optimiser.load_state_dict(state)

    def _of(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def _moments(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        """By the optimiser's number of a weight; each weight that has been moved has all of them."""
        kept, found = self._of(MOMENTS), dict[int, dict[str, Tensor]]()
        weights = dict(model.named_parameters())
        for index, name in enumerate(_moment_order(model, optimiser)):
            if name in self.progress.idle or not self.progress.step:
                continue
            wanted = {key: weights[name] for key in MOMENT_NAMES} | {"step": torch.zeros(())}
            each = {key: kept.pop(f"{name}.{key}") for key in wanted if f"{name}.{key}" in kept}
            for key, like in wanted.items():
                if key not in each or not _alike(each[key], like):
                    raise broken(
                        self.path, f"the moment {key} of weight {name} is missing, or of another shape"
                    )
            if not 0 < each["step"].item() <= self.progress.step:
                raise broken(self.path, f"weight {name} was moved {each['step'].item():g} times")
            found[index] = {key: laid_out(each[key], like) for key, like in wanted.items()}
        if kept:
            raise broken(self.path, f"it has a moment of no weight: {min(kept)}")
        return found


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    states: States,
    progress: Progress,
) -> None:
    """Everything in one file, atomically. Raises OSError where it cannot be written; the file is then as it was."""
    tensors = state_tensors(model, optimiser, states)
    write_atomically(path, save(_contiguous(tensors), {"format": FORMAT, **header_of(progress)}))


def state_tensors(model: nn.Module, optimiser: torch.optim.Optimizer, states: States) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, not copied."""
    tensors = {MODEL + name: value.detach() for name, value in model.state_dict().items()}
    names = _moment_order(model, optimiser)
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{MOMENTS}{names[index]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {GENERATORS + name: state for name, state in states.generators.items()}
    return tensors | {GUARDS + name: counts for name, counts in states.guards.items()}


def header_of(progress: Progress) -> dict[str, str]:
    """Each field of it as strict JSON."""
    values: dict[str, object] = finite(plain(progress))
    return {name: json.dumps(value, sort_keys=True, allow_nan=False) for name, value in values.items()}


def save_weights(path: Path, model: nn.Module) -> None:
    """The weights alone, atomically, for `load`. Raises OSError where they cannot be written."""
    write_weights(path, model.state_dict())


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """As `save_weights`, of whole tensors by name."""
    write_atomically(path, save(_contiguous(weights), {"format": "pt"}))


def is_finite(model: nn.Module, optimiser: torch.optim.Optimizer) -> bool:
    """Whether all weights and moments are."""
    moments = (value for state in optimiser.state.values() for value in state.values())
    tensors = (value for value in (*model.state_dict().values(), *moments) if isinstance(value, Tensor))
    return all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())


def described(optimiser: torch.optim.Optimizer) -> dict[str, Scalar]:
    """The optimiser's name, and those of its constants that its groups share and no schedule changes."""
    found: dict[str, Scalar] = {"name": type(optimiser).__name__}
    return found | {
        key: str(optimiser.defaults[key]) for key in ("betas", "eps") if key in optimiser.defaults
    }


def idle_weights(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """The names of the weights that the optimiser has no moments of."""
    moved = optimiser.state_dict()["state"]
    return [name for index, name in enumerate(_moment_order(model, optimiser)) if index not in moved]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file and check all that can be checked without its model; FG413 if it is not a complete checkpoint."""
    if path.exists() and not path.is_file():
        raise broken(path, "it is not a regular file")
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            if header.get("format") != FORMAT:
                _no_checkpoint(path, header.get("format", ""))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except UNREADABLE as error:
        raise broken(path, str(error)) from None
    return Checkpoint(path, tensors, progress_of(path, header))


def progress_of(path: Path, header: Mapping[str, str]) -> Progress:
    """What `header_of` wrote. TfgError FG413 where it is anything else."""
    try:
        progress: Progress = built(Progress, {name: _parsed(header, name) for name in fields(Progress)})
    except ValueError as error:
        raise broken(path, f"its header: {error}") from None
    if progress.validated > progress.step:
        raise broken(path, f"step {progress.validated} is validated, and only {progress.step} are done")
    return progress


# ---------------------------------------------------------------- the header


def _parsed(header: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(header[name], parse_constant=_no_constant)
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"no usable {name}: {header.get(name, 'nothing')[:40]}") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


# ---------------------------------------------------------------- tensors


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _moment_order(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """The weights' names in the order in which the optimiser numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _same_tensors(path: Path, kept: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = sorted(kept.keys() ^ wanted.keys()) or [n for n, t in kept.items() if not _alike(t, wanted[n])]
    if wrong:
        raise _mismatch(
            path, (f"weight {n} was {_kind(kept.get(n))}, is {_kind(wanted.get(n))}" for n in wrong[:3])
        )


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _shown(values: Mapping[str, Scalar], name: str) -> str:
    value = str(values.get(name, "none"))
    return value[:19] if value.startswith("sha256 ") else value[:200]


# ---------------------------------------------------------------- what is wrong


def broken(path: Path, reason: str) -> TfgError:
    """FG413: a checkpoint that is damaged, or none."""
    return TfgError.of("FG413", f"cannot read the checkpoint {path}: {reason}")


def _no_checkpoint(path: Path, found: str) -> NoReturn:
    message = f"{path} is a safetensors file, but not a checkpoint of a training run"
    if found.startswith("fastgrad-checkpoint-"):
        message = f"{path} is of the format {found}, which another version of fastgrad wrote"
    raise TfgError.of("FG413", message)


def _mismatch(path: Path, differences: Iterable[str]) -> TfgError:
    return TfgError.of(
        "FG414",
        f"the checkpoint {path} belongs to another run: {'; '.join(differences)}",
        "use the text, spec and options of that run, or another --out folder to start afresh",
    )
