"""(a) The text, the interpreter, the reference and the module agree: forward, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from attack.cases import JUMPS, Array, Case, Finding, Point, Undecided, built, run_meaning, run_module, walk
from attack.check_targets import check_targets
from attack.meaning import rounded_otherwise
from attack.steps import by_interpreter, by_module, random_split, stepped
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.flatten import weights as weights_of
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference import interpret

NUDGE = 1e-12  # relative: what rounding may do to an input
JUMP = 1e-3  # a result that moves by more of its size under a nudge stands at a discontinuity, or is all rounding
TINY = 1e-9  # a move by less is none: what is 0 except for rounding may move by its size
ROUNDING = (
    1e-10  # of float64 in sums of some hundred terms, relative to the largest entry, of terms of size 1
)
NUDGES = 3
AT_JUMPS = 30  # nudges of a program that can jump: int of what is 2 except for rounding is 1 in half of them
DRAWS = 4  # points before a case is given up
STEP = 1e-6  # of central differences


def check_agreement(case: Case) -> None:
    """Forward and backward. Raises Finding, or Undecided where no point is in the smooth interior."""
    exact = case.elaborated
    program = case.served
    reason = ""
    for attempt in range(DRAWS):
        try:
            point = _point(case, attempt)
            _forward(case, exact, program, point)
            _backward(case, exact, program, point)
            check_targets(case)
            return
        except Undecided as error:
            reason = str(error)
    raise Undecided(reason)


def _point(case: Case, attempt: int) -> Point:
    scale = 0.5**attempt
    return replace_seed(case, attempt).point.moved(lambda value: value * scale)


def replace_seed(case: Case, attempt: int) -> Case:
    """The case with another seed; the same for attempt 0."""
    if attempt == 0:
        return case
    other = Case(case.text, case.sizes, case.seed + 7919 * attempt)
    other.__dict__["compiled"] = case.compiled
    return other


# ---------------------------------------------------------------- forward


def _forward(case: Case, exact: Program, program: Program, point: Point) -> None:
    expected, noise = _meant(exact, case, point)
    agree("the interpreter of the text", _interpreted(exact, point), expected, noise)
    agree("the interpreter after recognition", _interpreted(case.stage("attention"), point), expected, noise)
    reference = built(case.compiled.program, point.weights, exact=True)
    agree("the reference module", _outputs(reference, point), expected, noise)
    served, served_noise = _meant(program, case, point)
    module = built(program, point.weights)
    agree("the module with its polynomials", _outputs(module, point), served, served_noise)
    _steps(case, point, served, served_noise)


def _steps(case: Case, point: Point, expected: Sequence[Array], noise: Sequence[Array]) -> None:
    """The step form, where there is one, in calls at random."""
    rng = case.random("steps")
    program = stepped(case.served, rng)
    if program is None:
        return
    inputs, weights = point.tensors()
    split = random_split(case.sizes[str(program.along)], rng)
    with torch.no_grad(), _in_double():
        found = by_interpreter(program, inputs, weights, split)
        agree("the interpreter in steps", [each.numpy() for each in found], expected, noise)
        model = built(program, point.weights)
        found = by_module(program, model, inputs, split, case.sizes)
        agree("the module in steps", [each.numpy() for each in found], expected, noise)


def _meant(program: Program, case: Case, point: Point) -> tuple[Sequence[Array], list[Array]]:
    draws = np.random.default_rng(case.seed + 3)
    jumps = any(node.op in JUMPS for graph in program.graphs for node in graph.nodes)

    def otherwise(moved: Point) -> list[Array]:
        return rounded_otherwise(program, moved.inputs, moved.weights, draws)

    times = AT_JUMPS if jumps else NUDGES
    return steady(partial(run_meaning, program), case, point, otherwise, times)


def _outputs(model: nn.Module, point: Point) -> list[Array]:
    with torch.no_grad(), _in_double():
        return [each.numpy() for each in run_module(model, point.tensors()[0])]


@contextmanager
def _in_double() -> Iterator[None]:
    """For a program that neither reads a number nor has weights."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _interpreted(program: Program, point: Point) -> list[Array]:
    inputs, weights = point.tensors()
    with torch.no_grad():
        found = interpret.run(program, inputs, weights, dtype=torch.float64)
    return [each.detach().numpy() for each in (found if isinstance(found, tuple) else (found,))]


def steady(
    function: Callable[[Point], Sequence[Array]],
    case: Case,
    point: Point,
    otherwise: Callable[[Point], Sequence[Array]] | None = None,
    times: int = NUDGES,
) -> tuple[Sequence[Array], list[Array]]:
    """Results, and for each entry how far it moves under nudges. Raises Undecided where one jumps.

    Nudged points are computed by `otherwise` where it is given: the same function, rounded in another way.
    """
    results = function(point)
    noise = [np.zeros(np.shape(each)) for each in results]
    draws = np.random.default_rng(case.seed)
    if not all(np.isfinite(each).all() for each in results if each.dtype == np.float64):
        raise Undecided("a result is not finite")
    for _ in range(times):
        nudged = (otherwise or function)(point.moved(partial(_nudged, draws)))
        with np.errstate(invalid="ignore"):
            pairs = zip(noise, nudged, results, strict=True)
            noise = [np.maximum(n, np.abs(1.0 * a - 1.0 * b)) for n, a, b in pairs]
    floats = [each for each in results if each.dtype == np.float64]
    size = max((np.abs(each).max(initial=0.0) for each in floats), default=0.0)
    for level, result in zip(noise, results, strict=True):
        allowed = JUMP * size + TINY if result.dtype == np.float64 else 0.0
        if not np.isfinite(level).all() or level.max(initial=0.0) > allowed:
            raise Undecided("a result jumps")
    return results, noise


def _nudged(draws: np.random.Generator, x: Array) -> Array:
    return x * (1.0 + NUDGE * draws.uniform(-1, 1, x.shape)) + NUDGE * draws.uniform(-1, 1, x.shape)


def agree(what: str, got: Sequence[Array], want: Sequence[Array], noise: Sequence[Array]) -> None:
    """Raises Finding where a result differs by more than rounding."""
    for place, (one, other, level) in enumerate(zip(got, want, noise, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            words = f"result {place} is {one.dtype}{one.shape}, not {other.dtype}{other.shape}"
            raise Finding("a", f"{what}, type", words)
        if one.dtype == np.float64:
            size = np.abs(other).max(initial=0.0)
            allowed = ROUNDING * (1.0 + size) + 1e4 * level.max(initial=0.0)
            off = np.abs(one - other)
        else:
            size, allowed, off = 1.0, 0.5, 1.0 * (one != other)
        if not (off <= allowed).all():
            worst = np.nanmax(off) if np.isfinite(off).any() else np.nan
            raise Finding("a", what, f"result {place} is off by {worst:.3g}, of {size:.3g}")


# ---------------------------------------------------------------- backward

Gradients = Mapping[str, Array]


def _backward(case: Case, exact: Program, program: Program, point: Point) -> None:
    cotangents = _cotangents(case, run_meaning(exact, point))
    if not cotangents:
        return
    inner = _largest_inside(case.stage("attention"), cotangents, point)
    for what, text, model in (
        ("the reference module", exact, built(case.compiled.program, point.weights, exact=True)),
        ("the module with its polynomials", program, built(program, point.weights)),
    ):
        interpreter = partial(_of_interpreter, text, cotangents)
        want, noise = steady(lambda p, run=interpreter: list(run(p).values()), case, point)  # type: ignore[misc]
        names = list(interpreter(point))
        got = _of_module(model, cotangents, point)
        agree_gradients(f"the gradient of {what}", names, got, want, noise, inner=inner)
        if program.gradient is not None and text is program:
            graph = _of_graph(program, cotangents, point)
            buffers = {path for path, node in weights_of(program) if node.op == "buffer"}  # no gradient there
            agree_gradients("the derived gradient graph", names, graph, want, noise, buffers, inner)
        values, level = _meant(text, case, point)
        if all(_is_smooth(value, moved) for value, moved in zip(values, level, strict=True)):
            _central(what, text, cotangents, point, dict(zip(names, want, strict=True)), case)


def _is_smooth(value: Array, moved: Array) -> bool:
    """Whether a result moves under nudges as one without jumps does: differences mean nothing at a jump."""
    return bool(moved.max(initial=0.0) <= 1e6 * NUDGE * (1.0 + np.abs(value).max(initial=0.0)))


def _cotangents(case: Case, results: Sequence[Array]) -> list[Array]:
    draws = np.random.default_rng(case.seed + 1)
    return [np.asarray(draws.standard_normal(each.shape)) for each in results if each.dtype == np.float64]


def _of_interpreter(program: Program, cotangents: Sequence[Array], point: Point) -> dict[str, Array]:
    inputs, weights = point.tensors()
    found = interpret.run(program, inputs, weights, dtype=torch.float64)
    results = found if isinstance(found, tuple) else (found,)
    return _gradients(point, inputs, weights, results, cotangents)


def _of_module(model: nn.Module, cotangents: Sequence[Array], point: Point) -> dict[str, Array]:
    inputs, _ = point.tensors()
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    missing = sorted(set(point.weights) - set(held))
    if missing:
        raise Finding("a", "weights", f"the state_dict lacks {missing[0]}, a weight of the text")
    weights = {path: held[path].requires_grad_() for path in point.weights}
    return _gradients(point, inputs, weights, run_module(model, inputs), cotangents)


def _of_graph(program: Program, cotangents: Sequence[Array], point: Point) -> dict[str, Array]:
    inputs, weights = point.tensors()
    given = [torch.as_tensor(each) for each in cotangents]
    with torch.no_grad():
        of_inputs, of_weights = interpret.run_gradient(program, inputs, weights, given, dtype=torch.float64)
    zeros = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    return {name: value.numpy() for name, value in {**of_inputs, **zeros, **of_weights}.items()}


def _largest_inside(program: Program, cotangents: Sequence[Array], point: Point) -> float:
    """The largest entry of a gradient by any value of the program."""
    inputs, weights = point.tensors()
    flat = flatten(program)
    values = walk(program, flat, inputs, weights)
    floats = [values[name] for name in flat.outputs if values[name].is_floating_point()]
    pairs = [(x, torch.as_tensor(c)) for x, c in zip(floats, cotangents, strict=True) if x.requires_grad]
    inside = [x for x in values.values() if x.requires_grad]
    if not pairs:
        return 0.0
    found = torch.autograd.grad([x for x, _ in pairs], inside, [c for _, c in pairs], allow_unused=True)
    largest = max((float(g.abs().max()) for g in found if g is not None and g.numel()), default=0.0)
    if not np.isfinite(largest):
        raise Undecided("a gradient inside is not finite")
    return largest


def _gradients(
    point: Point,
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    results: Sequence[Tensor],
    cotangents: Sequence[Array],
) -> dict[str, Array]:
    leaves = {name: x for name, x in zip(point.inputs, inputs, strict=True) if x.requires_grad}
    leaves |= weights
    floats = [each for each in results if each.is_floating_point()]
    scalar = sum(((each * torch.as_tensor(c)).sum() for each, c in zip(floats, cotangents, strict=True)),
                 torch.zeros((), dtype=torch.float64))  # fmt: skip
    if not scalar.requires_grad:
        return {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
    found = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    return {
        name: np.zeros(leaf.shape) if each is None else each.detach().numpy()
        for (name, leaf), each in zip(leaves.items(), found, strict=True)
    }


def agree_gradients(
    what: str,
    names: Sequence[str],
    got: Gradients,
    want: Sequence[Array],
    noise: Sequence[Array],
    without: Collection[str] = (),
    inner: float = 0.0,
) -> None:
    """As `agree`, relative to the largest entry of all gradients: small ones are sums of large terms.

    `inner`: the largest entry of a gradient by an intermediate value, such as a unit of rows near 0, whose rounding
    remains where the gradients themselves cancel.
    """
    if set(got) != set(names):
        raise Finding("a", what, f"there are gradients of {sorted(got)}, not of {sorted(names)}")
    largest = max((np.abs(each).max(initial=0.0) for each in want), default=0.0)
    size = max(largest, inner)
    level = max((each.max(initial=0.0) for each in noise), default=0.0)
    for name, expected in zip(names, want, strict=True):
        off = np.abs(got[name] - expected)
        if name not in without and not (off <= ROUNDING * (1.0 + size) + 1e4 * level).all():
            raise Finding("a", what, f"by {name} it is off by {np.nanmax(off):.3g}, of {largest:.3g}")


def _central(
    what: str, program: Program, cotangents: Sequence[Array], point: Point, gradient: Gradients, case: Case
) -> None:
    """Central differences of the text's meaning along random directions, where they settle.

    And where the differences to both sides are alike: at a jump or a kink the derivative is a convention.
    """
    draws = np.random.default_rng(case.seed + 2)
    for _ in range(2):
        directions = {name: np.asarray(draws.standard_normal(each.shape)) for name, each in gradient.items()}
        sides = [_slopes(program, cotangents, point, directions, h) for h in (STEP, STEP / 2, STEP / 4)]
        slopes = [(right + left) / 2 for right, left in sides]
        wanted = sum(float((gradient[name] * directions[name]).sum()) for name in gradient)
        size = sum(float(np.abs(gradient[name] * directions[name]).sum()) for name in gradient)
        spread = max(slopes) - min(slopes)
        bend = abs(sides[-1][0] - sides[-1][1])
        if not np.isfinite(slopes).all() or max(spread, 0.1 * bend) > 1e-4 * (size + abs(slopes[-1])):
            continue  # a kink or a jump within reach
        if abs(slopes[-1] - wanted) > 1e-4 * size + 10 * spread + 1e-7:
            words = f"{wanted:.6g} along a direction; its text's, {slopes[-1]:.6g}"
            raise Finding("a", f"differences of {what}", words)


def _slopes(
    program: Program, cotangents: Sequence[Array], point: Point, directions: Gradients, h: float
) -> tuple[float, float]:
    """Differences over a step h in these directions, to the right and to the left."""
    values = []
    for step in (h, 0.0, -h):
        inputs, weights = (
            {key: x + step * directions[key] if key in directions else x for key, x in values.items()}
            for values in (point.inputs, point.weights)
        )
        floats = [each for each in run_meaning(program, Point(inputs, weights)) if each.dtype == np.float64]
        values.append(float(sum((a * c).sum() for a, c in zip(floats, cotangents, strict=True))))
    right, here, left = values
    return (right - here) / h, (here - left) / h
