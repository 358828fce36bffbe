"""How long a process waits for others in collectives of torch.distributed, and how many bytes it sends them.

Gloo counts neither, and PyTorch's profiler takes too long to be on in every step. So the functions themselves are
wrapped while something is counted. On a GPU they return before anything is sent: seconds are those of CPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from fastgrad_dsl.distributed import exchange

_COUNTING: ContextVar[Traffic | None] = ContextVar("_COUNTING", default=None)


@dataclass
class Traffic:
    """Of one process: collectives, and seconds in them; bytes that it sends to others at least, by their names."""

    seconds: float = 0.0
    calls: int = 0
    bytes: dict[str, float] = field(default_factory=dict)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# the least that a rank must send of its input: to all others, or each part but its own to its rank, or both of these
_SENT: dict[str, Callable[[list[Any], int], float]] = {
    "all_to_all_single": lambda given, ranks: _size(given[1]),
    "all_gather": lambda given, ranks: (ranks - 1) * _size(given[1]),
    "all_reduce": lambda given, ranks: 2 * (ranks - 1) / ranks * _size(given[0]),
    **dict.fromkeys(
        ("all_gather_single", "all_gather_into_tensor"), lambda given, ranks: (ranks - 1) * _size(given[1])
    ),
    **dict.fromkeys(
        ("reduce_scatter_single", "reduce_scatter_tensor"),
        lambda given, ranks: (ranks - 1) / ranks * _size(given[1]),
    ),
}
_TENSORS = (
    "output_tensor",
    "output",
    "tensor_list",
    "tensor",
    "input_tensor",
    "input",
)  # by name, in this order


def _group(given: Sequence[Any]) -> Any:
    """The group among the arguments of a collective, which may be one dimension of a mesh; None for all processes."""
    found = (each[0].get_group(each[1]) if isinstance(each, tuple) else each for each in given)
    return next((each for each in found if isinstance(each, dist.ProcessGroup)), None)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Within it what this thread does is counted, and the bytes that another sends for it, whose result it waits for.

    What other threads do, such as one that writes a checkpoint, is not.
    `all_to_all_single` counts the whole input: what is sent here has no part of a rank's own.
    """
    traffic, thread = Traffic(), threading.get_ident()

    def wrapped(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def run(*given: Any, **named: Any) -> Any:
            if _COUNTING.get() is not traffic:
                return inner(*given, **named)
            if name in _SENT:
                tensors = [*given, *(named[each] for each in _TENSORS if each in named)]
                sent = _SENT[name](tensors, dist.get_world_size(_group((*given, *named.values()))))
                traffic.bytes[name] = traffic.bytes.get(name, 0.0) + sent
                traffic.calls += 1
            token, started = _COUNTING.set(None), time.perf_counter()  # once, whatever it calls
            try:
                return inner(*given, **named)
            finally:
                _COUNTING.reset(token)
                traffic.seconds += time.perf_counter() - started if threading.get_ident() == thread else 0.0

        return run

    places = [(dist, name) for name in _SENT if hasattr(dist, name)]
    places += [(functional, "all_reduce"), (functional, "wait_tensor"), (exchange, "ended")]
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name, inner in before:
        setattr(module, name, wrapped(name, inner))
    token = _COUNTING.set(traffic)
    try:
        yield traffic
    finally:
        _COUNTING.reset(token)
        for module, name, inner in before:
            setattr(module, name, inner)
