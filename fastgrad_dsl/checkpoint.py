"""Checkpoints of a training run: safetensors, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastgrad_dsl.files import write_atomically
from fastgrad_dsl.weights import MODEL
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

MOMENTS, GENERATORS = "optimiser.", "generator."
FORMAT = "fastgrad-checkpoint-1"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, and the settings that a resumed run must share."""

    step: int
    settings: dict[str, int | float | str | bool]


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
    progress: Progress,
) -> None:
    """Weights, optimiser moments, random states and progress in one file, atomically."""
    tensors = {MODEL + name: value.detach() for name, value in model.state_dict().items()}
    names = _moment_order(model, optimiser)
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{MOMENTS}{names[index]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {GENERATORS + name: generator.get_state() for name, generator in generators.items()}
    contiguous = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    header = {
        "format": FORMAT,
        "step": str(progress.step),
        "settings": json.dumps(progress.settings, sort_keys=True),
    }
    write_atomically(path, save(contiguous, header))


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
    settings: dict[str, int | float | str | bool],
) -> Progress:
    """Put a saved run's state back and return its progress.

    Raises TfgError FG413 where the file is missing or not a checkpoint, FG414 where it belongs to another
    model or run.
    """
    tensors, progress = _read(path)
    changed = [
        f"{key} was {progress.settings.get(key)}, is {settings[key]}"
        for key in settings
        if progress.settings.get(key) != settings[key]
    ]
    if changed:
        raise _mismatch(path, changed)
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    wanted = model.state_dict()
    wrong = sorted(set(weights) ^ set(wanted)) or [
        name for name, value in weights.items() if value.shape != wanted[name].shape
    ]
    if wrong:
        raise _mismatch(path, [f"weight {name}" for name in wrong[:3]])
    model.load_state_dict(weights)
    state = optimiser.state_dict()
    state["state"] = _moments(tensors, _moment_order(model, optimiser))
    optimiser.load_state_dict(state)
    for name, generator in generators.items():
        generator.set_state(tensors[GENERATORS + name])
    return progress


def _moment_order(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """The weights' names in the order in which the optimiser numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]


def _moments(tensors: dict[str, Tensor], names: list[str]) -> dict[int, dict[str, Tensor]]:
    """Per weight, the optimiser's tensors; `name.key`, where no key has a dot."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, value in tensors.items():
        if path.startswith(MOMENTS):
            name, key = path.removeprefix(MOMENTS).rsplit(".", 1)
            found[name][key] = value
    return dict(enumerate(found.values()))


def _read(path: Path) -> tuple[dict[str, Tensor], Progress]:
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise TfgError([Diagnostic("FG413", f"cannot read the checkpoint {path}: {error}")]) from None
    if header.get("format") != FORMAT:
        raise TfgError(
            [Diagnostic("FG413", f"{path} is a safetensors file, but not a checkpoint of a training run")]
        )
    return tensors, Progress(int(header["step"]), json.loads(header["settings"]))


def _mismatch(path: Path, differences: list[str]) -> TfgError:
    return TfgError(
        [
            Diagnostic(
                "FG414",
                f"the checkpoint {path} belongs to another run: {'; '.join(differences)}",
                help=("use the same spec and options, or another --out folder to start afresh",),
            )
        ]
    )
