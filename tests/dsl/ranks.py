"""What the processes of tests/dsl/test_distributed.py do: each runs its pieces of models that it finds in a file."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastgrad_dsl as fg
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.distributed import context_parallel, mean_over_tokens, shard_sequence, sharding
from fastgrad_dsl.distributed.traffic import counted
from fastgrad_dsl.training import Options
from fastgrad_dsl.training.loop import accumulated_gradients, make_optimiser, update
from fastgrad_dsl.training.ranks import Mesh, Ranks, meshes_of
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.models import EXAMPLES, SIZES
from tests.dsl.test_memory import Peak

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


def spawn(work: Callable[..., None], *given: Any) -> None:
    """Run work(rank, *given) in RANKS processes of one group, forked from one that has imported all they need."""
    multiprocessing.set_forkserver_preload([__name__])
    begin = torch.multiprocessing.start_processes  # type: ignore[attr-defined]  # exported without saying so
    begin(_begin, (work, given, os.getpid()), nprocs=RANKS, start_method="forkserver")


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
        model: nn.Module = package_from_texts(case.texts).MODEL(0).to(case.dtype)
        model.load_state_dict(case.weights, strict=False)
        for lengths in case.lengths:
            if rank < len(lengths):
                sent.bytes = sent.calls = 0
                errors = _errors(case, model, lengths, rank, meshes[len(lengths)])
                found[case.name, lengths] = (*errors, sent.bytes, sent.calls)
    found_of_models = _of_models(rank)
    torch.save((found, found_of_models), folder / f"found-{rank}.pt")


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


def _errors(
    case: Case, model: nn.Module, lengths: tuple[int, ...], rank: int, mesh: DeviceMesh
) -> tuple[float, float]:
    model.zero_grad()
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


# ---------------------------------------------------------------- whole models


def _of_models(rank: int) -> dict[str, Any]:
    """What is asked of whole models: errors by name, and what was said of refusals."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    line = DeviceMesh("cpu", list(range(RANKS)), mesh_dim_names=("context",))
    alone = [DeviceMesh("cpu", [each], mesh_dim_names=("context",)) for each in range(RANKS)][rank]
    tokens = torch.randint(0, 11, (4, 38), generator=torch.Generator().manual_seed(1))
    batch = tokens[:, :-1], tokens[:, 1:]
    found: dict[str, Any] = {"of a file": _loss_errors(batch, line), "refused": _refused(line, mesh, rank)}
    found["replicated"] = _data_and_context(batch, mesh, _replicated)
    found["sharded"] = _data_and_context(batch, mesh, _sharded)
    found["made again"] = _made_again(batch, line)
    found["tensor parallel"] = _tensor_parallel(mesh["data"], line)
    found["trained"] = {each: _trained(each, rank) for each in (Mesh(1, 2, 2), Mesh(2, 1, 2))}
    bounded = _example("bounded").module().double()
    with context_parallel(alone):
        wanted = shard_sequence(bounded(batch[0]), line)
    with context_parallel(line):
        piece = shard_sequence(batch[0], line)
        found["in place of exp"] = difference(bounded(piece), wanted)
        compiled = torch.compile(bounded, backend="eager")
        found["compiled"] = difference(compiled(piece), wanted)
    exact = shard_sequence(bounded(batch[0]), line)
    x = 0.5 * torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with context_parallel(alone):
        guarded = shard_sequence(_guarded("warn")(x), line)
    with context_parallel(line):
        found["guarded"] = difference(_guarded("warn")(shard_sequence(x, line)), guarded)
    found["eps"] = difference(wanted, exact)
    return found


@cache
def _example(name: str, **more: Any) -> Any:
    params = {**SIZES[name], **more}
    return fg.compile(EXAMPLES / f"{name}.tfg", params=params, target="torch", validate=False)


def _whole(compiled: Any, batch: tuple[Tensor, Tensor]) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A model without gradients, its loss on a batch in one process, and the gradients of that."""
    model = compiled.module().double()
    loss = compiled.loss(model(batch[0]), batch[1])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return model, loss.detach(), gradients


def _loss_errors(batch: tuple[Tensor, Tensor], mesh: DeviceMesh) -> tuple[float, float]:
    """Of the objective, and of all gradients."""
    compiled = _example("gpt", vocab=11)
    model, wanted, gradients = _whole(compiled, batch)
    with context_parallel(mesh):
        x, y = shard_sequence(batch, mesh)
        loss = compiled.loss(model(x), y)
        loss.backward()
    errors = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        errors.append(difference(parameter.grad, gradients[name]))
    return difference(loss, wanted), max(errors)


def _data_and_context(
    batch: tuple[Tensor, Tensor], mesh: DeviceMesh, wrapped: Callable[..., nn.Module]
) -> float:
    """The largest error of a gradient: other sequences on other ranks, together with pieces of each."""
    compiled = _example("gpt", vocab=11)
    model, _, gradients = _whole(compiled, batch)
    parallel = wrapped(model, mesh["data"])
    own = [x.chunk(2)[mesh["data"].get_local_rank()] for x in batch]
    with context_parallel(mesh["context"]):
        x, y = shard_sequence(own, mesh["context"])
        compiled.loss(parallel(x), y).backward()
    errors = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        dist.all_reduce(whole, group=mesh["context"].get_group())
        errors.append(difference(whole, gradients[name]))
    return max(errors)


def _replicated(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def _sharded(model: Any, mesh: DeviceMesh) -> nn.Module:
    return fg.distributed.shard_model(model, mesh)


def _made_again(batch: tuple[Tensor, Tensor], mesh: DeviceMesh) -> dict[str, Any]:
    """With weights in parts over all ranks, which share the sequences too: whether gradients are alike, and bytes.

    Bytes that each layer more adds to what is kept; and another model with other pieces runs before the backward pass.
    """
    gradients: dict[bool, dict[str, Tensor]] = {}
    kept: dict[tuple[bool, int], int] = {}
    other = _example("gpt", vocab=11).module().double()
    for recompute in (False, True):
        for depth in (1, 2):
            compiled = _example("gpt", vocab=11, depth=depth)
            model = sharding.shard_model(compiled.module().double(), mesh, recompute=recompute)
            with context_parallel(mesh):
                x, y = shard_sequence(batch, mesh)
                with Peak() as counted:
                    loss = compiled.loss(model(x), y)
                kept[recompute, depth] = counted.now
                other(x[:, :3])
                loss.backward()
            gradients[recompute] = {
                name: sharding.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
            }
    pairs = zip(gradients[False].values(), gradients[True].values(), strict=True)
    return {
        "equal": all(torch.equal(*pair) for pair in pairs),
        "layer": {recompute: kept[recompute, 2] - kept[recompute, 1] for recompute in (False, True)},
    }


PARTED = """use std
dim b
dim n
block layer(x: float[b, n, d]) -> float[b, n, d] {
    x = x + std.attention(std.rms_norm(x); heads = 4, kv_heads = 2, causal = true, rope = 100.0)
    x = x + std.attention(x; heads = 2, causal = true, gain = 1.0, forget = true)
    x = x + std.kernel_attention(x; heads = 4, qk_dim = 2, near = 4, causal = true, forget = true)
    x = x + std.mlp(x; hidden = 16)
    return x + std.swiglu(x; hidden = 16)
}
model m(x: float[b, n, 8]) -> float[b, n, 8] {
    repeat i in 2 {
        x = layer(x) as layers
    }
    return x
}
"""


def _tensor_parallel(mesh: DeviceMesh, line: DeviceMesh) -> dict[str, Any]:
    """Errors of the result and of all gradients with heads and hidden widths in parts, and the share of a rank."""
    compiled = fg.compile(PARTED, target="torch", validate=False)
    model, parted = (compiled.module(seed=1).double() for _ in range(2))
    parted = parallelize_module(parted, mesh, compiled.tensor_parallel_plan())
    x = torch.randn(2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = [x.clone().requires_grad_() for _ in range(2)]
    wanted = model(given[0])
    wanted.square().mean().backward()
    with counted() as traffic:
        out = parted(given[1])
        out.square().mean().backward()
    assert given[0].grad is not None
    assert given[1].grad is not None
    errors = [difference(out, wanted), difference(given[1].grad, given[0].grad)]
    share = 0
    for name, weight in parted.named_parameters():
        gradient, like = weight.grad, model.get_parameter(name).grad
        assert gradient is not None
        assert like is not None
        errors.append(difference(sharding.whole(gradient), like))
        share += (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
    refused = _said(lambda: parallelize_module(compiled.module(), line, compiled.tensor_parallel_plan()))
    return {
        "errors": max(errors),
        "share": share / sum(p.numel() for p in model.parameters()),
        "refused": refused,
        "sent": traffic.bytes["all_reduce"] / (x.numel() * x.element_size()),
    }


def _trained(size: Mesh, rank: int) -> dict[str, float]:
    """Errors of three steps with weights in parts of both kinds: of losses, norms that are clipped, and weights.

    And how far weights that are whole are from each other.
    """
    compiled = fg.compile(PARTED, target="torch", validate=False)
    options = Options(clip=0.01, learning_rate=0.01)
    given = torch.randn(2, 4, 24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(out: Tensor, targets: Tensor) -> Tensor:
        return mean_over_tokens((out - targets).square().mean(), out.numel())

    def steps(model: nn.Module, ranks: Ranks) -> Tensor:
        optimiser, found = make_optimiser(model, options), []
        for _ in range(3):
            rows, _ = ranks.own_rows(4)
            x, y = ranks.pieces([each[rows] for each in given])
            value, norm = accumulated_gradients(model, loss, optimiser, [(x, y)], options, ranks)
            update(optimiser, 0.01)
            found.append([*ranks.mean(value), norm])
        return torch.tensor(found, dtype=torch.float64)

    model, parted = (compiled.module(seed=1).double() for _ in range(2))
    ranks = Ranks(size, rank, meshes=meshes_of(size))
    ranks.sharded(parted, compiled.tensor_parallel_plan())
    wanted, found = steps(model, Ranks()), steps(parted, ranks)
    assert wanted[:, 1].min() > options.clip
    errors = {"losses": difference(found[:, 0], wanted[:, 0]), "norms": difference(found[:, 1], wanted[:, 1])}
    errors["weights"] = errors["copies"] = 0.0
    for name, weight in parted.named_parameters():
        together = sharding.whole(weight.detach())
        errors["weights"] = max(errors["weights"], difference(together, model.get_parameter(name)))
        copies = [torch.empty_like(together) for _ in range(RANKS)]
        dist.all_gather(copies, together)
        errors["copies"] = max(errors["copies"], *(difference(each, together) for each in copies))
    return errors


SHORT = """dim b
dim n <= 16
model m(x: float[b, n, 4]) -> float[b, n, 4] {
    return x + softmax(causal(x @ x.T)) @ x
}
objective o(out: float[b, n, 4]) = log(mean(out * out))
"""


GUARDED = """dim b
dim n
model m(x: float[b, n, 4]) -> float[b, n, 4] {
    s = assume_bound(x @ x.T, 2.0)
    return x + softmax(causal(s)) @ x
}
budget {
    output <= 0.9
    at "*" degree = 2
    on_violation = POLICY
}
"""


def _guarded(policy: str) -> nn.Module:
    text = GUARDED.replace("POLICY", policy)
    return fg.compile(text, target="torch", validate=False).module().double()


def _refused(line: DeviceMesh, mesh: DeviceMesh, rank: int) -> dict[str, str]:
    """What is said where something is refused, by what was tried."""
    short = fg.compile(SHORT, target="torch", validate=False)
    model, bert = short.module(), _example("bert")
    x = torch.zeros(2, 4, 4)
    tried: dict[str, Callable[[], object]] = {
        "no step form": lambda: bert.module()(torch.zeros(1, 4, dtype=torch.int64)),
        "no token": lambda: model(x[:, : rank % 2]),
        "too long": lambda: model(torch.zeros(2, 5, 4)),
        "other sequences": lambda: model(x[: 1 + rank % 2]),
        "few tokens": lambda: shard_sequence(x[:, :3], line),
        "within another": lambda: context_parallel(line).__enter__(),
        "exact": lambda: _guarded("exact")(x.double()),
        "clamp": lambda: _guarded("clamp")(x.double()),
        "no mean": lambda: short.loss(model(x)) if short.loss else None,
    }
    found = {}
    with context_parallel(line):
        for name, attempt in tried.items():
            found[name] = _said(attempt)
    found["two dims"] = _said(lambda: context_parallel(mesh).__enter__())
    return found


def _said(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (TfgError, ValueError) as error:
        return str(error)
    return "nothing"
