"""What the processes of tests/dsl/test_distributed.py do: each runs its pieces of models that it finds in a file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.distributed import context_parallel

RANKS = 4


@dataclass
class Case:
    """A model, its inputs (of which `tokens` are in pieces), and what one process computes with them.

    gradients: of weights and of inputs, by name, for the sum of the result times `upstream`.
    """

    name: str
    texts: dict[str, str]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    tokens: tuple[str, ...]
    upstream: Tensor
    out: Tensor
    gradients: dict[str, Tensor]
    lengths: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float64


def module_of(texts: dict[str, str], weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model: nn.Module = package_from_texts(texts).MODEL(0).to(dtype)
    model.load_state_dict(weights, strict=False)
    return model


def spawn(work: Callable[..., None], *given: Any) -> None:
    """Run work(rank, *given) in RANKS processes of one group."""
    torch.multiprocessing.spawn(_begin, (work, given, os.getpid()), nprocs=RANKS)


def _begin(rank: int, work: Callable[..., None], given: tuple[Any, ...], parent: int) -> None:
    torch.set_num_threads(1)
    folder = Path(given[0])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'meeting-{parent}'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )
    work(rank, *given)
    dist.barrier()
    dist.destroy_process_group()


def run_cases(rank: int, folder: Path) -> None:
    """Write by case and lengths the largest relative errors of the result and of all gradients, and the bytes sent."""
    meshes = {
        size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("context",))
        for size in range(1, RANKS + 1)
    }
    cases: list[Case] = torch.load(folder / "cases.pt", weights_only=False)
    sent = _Sent()
    found: dict[tuple[str, tuple[int, ...]], tuple[float, float, int, int]] = {}
    for case in cases:
        for lengths in case.lengths:
            if rank < len(lengths):
                sent.bytes = sent.calls = 0
                errors = _errors(case, lengths, rank, meshes[len(lengths)])
                found[case.name, lengths] = (*errors, sent.bytes, sent.calls)
    torch.save(found, folder / f"found-{rank}.pt")


class _Sent:
    """Counts what is sent to other ranks."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0
        self.inner = dist.all_to_all_single
        setattr(dist, "all_to_all_single", self.count)  # noqa: B010  # which type checkers would not let assign

    def count(self, out: Tensor, given: Tensor, sizes: list[int], splits: list[int], group: Any) -> None:
        self.bytes += given.numel() * given.element_size()
        self.calls += 1
        self.inner(out, given, sizes, splits, group=group)


def _errors(case: Case, lengths: tuple[int, ...], rank: int, mesh: DeviceMesh) -> tuple[float, float]:
    model = module_of(case.texts, case.weights, case.dtype)
    inputs = {}
    for name, x in case.inputs.items():
        piece = x.split(lengths, 1)[rank] if name in case.tokens else x
        inputs[name] = piece.clone().requires_grad_(x.is_floating_point())
    with context_parallel(mesh):
        out = model(**inputs)
        (out * case.upstream.split(lengths, 1)[rank]).sum().backward()
    errors = [0.0]
    for name, wanted in case.gradients.items():
        given = inputs[name].grad if name in inputs else model.get_parameter(name).grad
        gradient = torch.zeros_like(wanted) if given is None and name not in case.tokens else given
        assert gradient is not None, name
        if name in case.tokens:
            wanted = wanted.split(lengths, 1)[rank]
        else:
            dist.all_reduce(gradient, group=mesh.get_group())
        errors.append(difference(gradient, wanted))
    return difference(out, case.out.split(lengths, 1)[rank]), max(errors)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to one plus the largest entry."""
    if not found.isfinite().all():
        return float("inf")
    return (
        float((found - wanted).detach().abs().max() / (1.0 + wanted.detach().abs().max()))
        if found.numel()
        else 0.0
    )
