"""One exact run of a model with every attention's inputs, output and upstream gradient, and random probes of it.

The program is interpreted at its stage after recognition, where each attention is one node, so that every one of them
is met, whatever the plan says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrad_compiler.attention.value import QKV, Attention
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.reference.interpret import Values, run
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_dsl.models.measure import check_finite, leaf, projection

Objective = Callable[..., Tensor]
STEP = 1e-3  # of a finite difference, as a share of the weights' norm: beyond it float32 rounds, before it curves


@dataclass(frozen=True)
class Call:
    """One attention of an exact run: its node, inputs as the node has them, output and the loss's gradient of that."""

    node: Node
    inputs: tuple[Tensor, ...]
    output: Tensor
    upstream: Tensor

    @cached_property
    def attention(self) -> Attention:
        """What the node says of it."""
        return Attention.of(self.node)

    @property
    def by_role(self) -> dict[str, Tensor]:
        """The inputs by role."""
        return self.attention.by_role(self.inputs)


@dataclass(frozen=True)
class Run:
    """An exact run: calls by full path, the norms of the output and of all weights' gradients as one vector."""

    calls: dict[str, Call]
    output_norm: float
    gradient_norm: float


@dataclass(frozen=True)
class Subject:
    """What is run: the program after recognition, weights and buffers by path, and the objective of its batches.

    A batch is the model's inputs, then the targets. Without an objective the loss is a fixed random projection of the
    output.
    """

    program: Program
    weights: Mapping[str, Tensor]
    objective: Objective | None

    @property
    def parameters(self) -> list[str]:
        """The weights that have gradients."""
        return [name for name, weight in self.weights.items() if weight.is_floating_point()]


def capture(subject: Subject, batch: Sequence[Tensor]) -> Run:
    """Run a batch forward and backward, exactly. Raises TfgError FG427 where what comes out is not finite."""
    recorded = _forward(subject, subject.weights, batch)
    moving = [*recorded.leaves, *recorded.outputs.values()]
    of_all = torch.autograd.grad(recorded.loss, moving, allow_unused=True)
    gradients, upstream = of_all[: len(recorded.leaves)], of_all[len(recorded.leaves) :]
    results = [out.detach() for out in recorded.results]
    existing = [gradient for gradient in gradients if gradient is not None]
    check_finite("the exact model", *results, *existing)
    calls = {}
    for (path, output), found in zip(recorded.outputs.items(), upstream, strict=True):
        given = torch.zeros_like(output) if found is None else found
        calls[path] = Call(recorded.nodes[path], recorded.inputs[path], output.detach(), given)
    return Run(calls, _norm(results), _norm(existing))


@dataclass(frozen=True)
class Errors:
    """What a polynomial does to one attention on a batch: of its output, and of the gradients of its float inputs."""

    output: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Probe:
    """Squares of <z, J error> / norm of the whole, for one random z: of the model's output and of its gradient."""

    output: float
    gradient: float


def probe(
    subject: Subject,
    batch: Sequence[Tensor],
    run_: Run,
    errors: Mapping[str, Errors],
    seeds: Sequence[int],
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[Probe]]:
    """Random probes, one for each seed, of what the `errors` of single attentions do to the whole, to first order.

    The output: a vector-Jacobian product r = J^T z with z normal gives E <r, error>^2 = ||J error||^2.
    The gradient of the weights: <z, d grad> is the derivative along z, at fixed error functions, of <upstream, error>,
    <d upstream, error of the output> + <d inputs, errors of the gradients>, where d is a difference along the weights.
    So one product and one more pass serve all attentions (docs/mathematics.md, section 8).
    """
    recorded = _forward(subject, subject.weights, batch)
    found: dict[str, list[Probe]] = {path: [] for path in errors}
    for seed in seeds:
        progress(f"gains, probe {seed + 1} of {len(seeds)}")
        generator = torch.Generator().manual_seed(seed)
        of_output = _output_products(recorded, errors, generator)
        moved, length = _moved(subject, generator)
        shifted = _forward(subject, moved, batch)
        upstream = torch.autograd.grad(shifted.loss, list(shifted.outputs.values()), allow_unused=True)
        for (path, _), given in zip(shifted.outputs.items(), upstream, strict=True):
            if path in errors:
                change = _change(run_.calls[path], shifted.inputs[path], given, errors[path]) / length
                shares = of_output[path] / (run_.output_norm or 1.0), change / (run_.gradient_norm or 1.0)
                found[path].append(Probe(*(share**2 for share in shares)))
    return found


def _output_products(
    recorded: _Recorded, errors: Mapping[str, Errors], generator: torch.Generator
) -> dict[str, float]:
    """<z, J error> of the model's output for one z, by the path of the attention whose error it is."""
    floats = [out for out in recorded.results if out.requires_grad]
    random = [torch.randn(out.shape, generator=generator).to(out) for out in floats]
    outputs = [recorded.outputs[path] for path in errors]
    products = torch.autograd.grad(floats, outputs, random, allow_unused=True, retain_graph=True)
    return {
        path: 0.0 if product is None else _dot([product], [error.output])
        for (path, error), product in zip(errors.items(), products, strict=True)
    }


def _change(call: Call, there: Sequence[Tensor], upstream: Tensor | None, errors: Errors) -> float:
    """How far <upstream, error> of one attention moves between a run and one with other weights."""
    pairs = zip(call.inputs, there, strict=True)
    moved = [after - before for before, after in pairs if before.is_floating_point()]
    change = _dot(moved, errors.gradients)
    return change if upstream is None else change + _dot([upstream - call.upstream], [errors.output])


def _moved(subject: Subject, generator: torch.Generator) -> tuple[dict[str, Tensor], float]:
    """The weights moved along a random normal direction, and by how many of its lengths."""
    names = subject.parameters
    directions = {n: torch.randn(subject.weights[n].shape, generator=generator) for n in names}
    size = _norm([subject.weights[name] for name in names]) or 1.0
    length = STEP * size / (_norm(list(directions.values())) or 1.0)
    moved = dict(subject.weights)
    for name, direction in directions.items():
        moved[name] = subject.weights[name] + length * direction.to(subject.weights[name])
    return moved, length


# ---------------------------------------------------------------- one run


@dataclass
class _Recorded:
    """A forward pass: the nodes, inputs and outputs of attentions by full path, results, loss and its leaves."""

    nodes: dict[str, Node]
    inputs: dict[str, tuple[Tensor, ...]]
    outputs: dict[str, Tensor]
    results: tuple[Tensor, ...]
    loss: Tensor
    leaves: list[Tensor]


def _forward(subject: Subject, weights: Mapping[str, Tensor], batch: Sequence[Tensor]) -> _Recorded:
    nodes: dict[str, Node] = {}
    inputs: dict[str, tuple[Tensor, ...]] = {}
    outputs: dict[str, Tensor] = {}

    def attend(path: str, node: Node, tensors: list[Tensor]) -> Tensor:
        nodes[path], inputs[path] = node, tuple(tensor.detach() for tensor in tensors)
        outputs[path] = exact(node, tensors)
        return outputs[path]

    count = len(subject.program[subject.program.main].inputs)
    given = {name: leaf(weight) for name, weight in weights.items()}
    moving = list(map(leaf, batch[:count]))
    found: Values = run(subject.program, moving, given, attend=attend)
    results = found if isinstance(found, tuple) else (found,)
    targets = batch[count:]
    if subject.objective is not None and targets:
        loss = subject.objective(*results, *targets)
    else:
        loss = torch.stack([(projection(r) * r).sum() for r in results if r.is_floating_point()]).sum()
    for output in outputs.values():
        if not output.requires_grad:
            raise ValueError("an attention depends on no weight and on no float input: it has no gradient")
    return _Recorded(nodes, inputs, outputs, results, loss, [given[name] for name in subject.parameters])


def exact(node: Node, tensors: Sequence[Tensor]) -> Tensor:
    """An attention node's exact result: by a fused kernel where one fits, else by its dense definition."""
    attention = Attention.of(node)
    given, mask, scale = attention.by_role(tensors), attention.mask, attention.scale
    q, k, v = (given[role] for role in QKV)
    if attention.alibi:
        result = TORCH["attention"](node, list(tensors), Env({}, q.dtype, q.device))
        assert isinstance(result, Tensor)
        return result
    if attention.roles or mask.window is not None:
        return exact_attention(
            *(q, k, v),
            **named(given),
            scale=scale,
            causal=mask.causal,
            near=attention.near if attention.own_near else None,
            window=mask.window,
        )
    width = max(q.shape[-1], v.shape[-1])  # PyTorch has fused kernels for equal widths only
    q, k, wide = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    grouped, causal = q.shape[1] != k.shape[1], mask.causal
    if causal and scale <= 0:  # to which PyTorch's fused kernel has no answer
        q, scale = q * scale, 1.0
    out = F.scaled_dot_product_attention(q, k, wide, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out[..., : v.shape[-1]]


ARGUMENTS = {FORGET: "log_gate", "padding": "mask"}  # of kernels, by role, where the names differ


def named(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an attention reads beyond q, k and v, by role, as arguments of a kernel."""
    return {ARGUMENTS.get(role, role): x for role, x in given.items() if role not in QKV}


def _norm(tensors: Sequence[Tensor]) -> float:
    return sqrt(sum(x.double().square().sum().item() for x in tensors if x.is_floating_point()))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(left, right, strict=True))
