"""A model's state in a file: tensors by path, how many tokens there were, and a hash of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastgrad_dsl.storage.files import write_atomically

if TYPE_CHECKING:
    from fastgrad_compiler.runtime.state import State

POSITION, MODEL, SIZES, CAPACITY = "position", "model", "sizes", "capacity"


def save_state(state: State, path: str | Path, model: nn.Module) -> None:
    """Write a safetensors file with a state of `model`. Raises OSError where it cannot be written."""
    tensors = {name: x.contiguous() for name, x in state.tensors.items()}
    about = {MODEL: fingerprint(model), SIZES: json.dumps({**state.sizes, CAPACITY: state.capacity})}
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
    position, sizes = tensors.pop(POSITION, None), _sizes(about.get(SIZES, ""))
    if position is None or position.dtype != torch.int64 or position.ndim or CAPACITY not in sizes:
        raise ValueError(f"{path} is not a state: it lacks the number of its tokens")
    found: State = model.restored(position, tensors, sizes.pop(CAPACITY), sizes)
    return found


def _sizes(text: str) -> dict[str, int]:
    """The sizes in a file; none where the text is not what `save_state` wrote."""
    try:
        return msgspec.json.decode(text, type=dict[str, int])
    except msgspec.DecodeError:
        return {}


def fingerprint(model: nn.Module) -> str:
    """A hash of what a model computes: its step form and its weights."""
    digest = hashlib.sha256(str(getattr(model, "STEP", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
