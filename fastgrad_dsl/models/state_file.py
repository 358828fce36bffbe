"""A model's state in a file: tensors by path, how many tokens there were, and a hash of the model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastgrad_dsl.storage.files import write_atomically

if TYPE_CHECKING:
    from fastgrad_compiler.runtime.state import State

POSITION, MODEL, CAPACITY = "position", "model", "capacity"


def save_state(state: State, path: str | Path, model: nn.Module) -> None:
    """Write a safetensors file with a state of `model`. Raises OSError where it cannot be written."""
    tensors = {name: x.contiguous() for name, x in state.tensors.items()}
    about = {MODEL: fingerprint(model), CAPACITY: str(state.capacity)}
    write_atomically(Path(path), save({POSITION: state.position, **tensors}, about))


def load_state(path: str | Path, model: Any) -> State:
    """A state of `model`, on its device, from a file.

    Raises OSError where it cannot be read, ValueError where it is damaged, or another model or other weights wrote it.
    """
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a state: {error}") from None
    if about.get(MODEL) != fingerprint(model):
        raise ValueError(f"{path} holds the state of another model, or of other weights")
    position = tensors.pop(POSITION, None)
    if (
        position is None
        or position.dtype != torch.int64
        or position.ndim
        or not about.get(CAPACITY, "").isdigit()
    ):
        raise ValueError(f"{path} is not a state: it lacks the number of its tokens")
    found: State = model.restored(position, tensors, int(about[CAPACITY]))
    return found


def fingerprint(model: nn.Module) -> str:
    """A hash of what a model computes: its step form and its weights."""
    digest = hashlib.sha256(str(getattr(model, "STEP", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
