"""Configurations of Triton kernels that `fastgrad tune` found fastest on this machine.

They are in triton-tuned.json in the user's cache, by device, content of the kernels' file, type of the inputs and
kernel, and take the place of the row of the kernels' own table. The file is read once a process. Nothing here measures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import torch

from .private_files import cache_folder

FILE = "triton-tuned.json"
NUMBERS = 5

Configuration = tuple[int, ...]
"""ROWS, KEYS, FEATURES, warps, stages."""


class TunedWarning(RuntimeWarning):
    """The file of tuned configurations cannot be used; the kernels' own tables are."""


def entry_name(kernels: ModuleType, device: torch.device, dtype: str, kernel: str) -> str:
    """The name of a configuration in the file."""
    return f"{_device_name(device)} {_digest(str(kernels.__file__))} {dtype} {kernel}"


def configuration(kernels: ModuleType, device: torch.device, dtype: str, kernel: str) -> Configuration | None:
    """What was found for a kernel, None if nothing was."""
    known = chosen()
    return known.get(entry_name(kernels, device, dtype, kernel)) if known else None


@functools.cache
def chosen() -> dict[str, Configuration]:
    """The configurations of the file, by name. A file that is broken gives a warning and none."""
    folder = cache_folder()
    return {} if folder is None else read(folder / FILE)


def read(path: Path) -> dict[str, Configuration]:
    """The configurations of a file; none, with a warning, if it is broken."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): _checked(numbers) for name, numbers in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is ignored: {error}", TunedWarning, stacklevel=2)
        return {}


def _checked(numbers: object) -> Configuration:
    if not isinstance(numbers, list) or len(numbers) != NUMBERS:
        raise ValueError("a configuration is a list of five numbers")
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("the numbers of a configuration are whole and positive")
    return tuple(numbers)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
