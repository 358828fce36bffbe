"""Whether a pass kept the meaning of a program: the program before and after it, run on small random inputs.

Graphs are compared one by one, each on inputs of its own: where the claims of every graph hold (`validate_structure.py`),
the two programs agree, however deep. A value that is claimed is computed from what the program *before* the pass gives
for everything around, so that a rounding error is never amplified by what comes later. `oracle.py` runs both; it shares
no code with the passes.

What the earlier program leaves undefined, NaN, the later one may define: exp(s) / sum exp(s) of a hidden row. An infinity
must stay one. Runs in which an intermediate value nears the end of float64 are repeated with smaller inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fastgrad_compiler.graph import Graph, Node, Program
from fastgrad_compiler.oracle import Run, Values
from fastgrad_compiler.oracle_attention import Array
from fastgrad_compiler.oracle_operations import MEANING, Rule
from fastgrad_compiler.text import print_program
from fastgrad_compiler.validate_cases import Case, Weights, cases, draw
from fastgrad_compiler.validate_shrink import Fit, fits
from fastgrad_compiler.validate_structure import Claim, Correspondence, SignatureChanged, ancestors, pairs
from fastgrad_compiler.verify import CompilerBug

TOLERANCE = 1e-9  # of the largest entry of a row; what rounding does to these operations stays far below
NOISE = 1e-13  # of inputs, to see what rounding of 1e-16 may do at most; a hundred times its effect is no difference
LARGEST, LEAST = 1e150, 1e-250  # magnitudes whose squares and quotients float64 has
ATTEMPTS = 12  # halvings of inputs until a run stays within these

Pass: TypeAlias = Callable[[Program], Program]


@dataclass(frozen=True)
class Difference:
    """Where two programs differ: the graph, the claim that fails, on which inputs, and how."""

    graph: str
    claim: Claim
    place: str
    case: Case
    text: str


@dataclass(frozen=True)
class Checked:
    """What was compared of a graph that changed: how many claims, and in how many runs."""

    graph: str
    claims: int
    runs: int


def validate(before: Program, after: Program, name: str, again: Pass | None = None) -> tuple[Checked, ...]:
    """Compare the programs before and after the pass `name`, graph by graph; the graphs that changed.

    `again` runs the pass, for a graph whose sizes are made smaller before it can be run at all.
    Raises CompilerBug, which names the pass, the graph, the node and its place in the source, and a file that
    reproduces the difference.
    """
    checked = []
    for found in compare(before, after, again):
        if isinstance(found, Difference):
            raise CompilerBug(_message(before, after, name, found))
        checked.append(found)
    return tuple(checked)


def compare(before: Program, after: Program, again: Pass | None = None) -> Iterator[Checked | Difference]:
    """For each graph that changed, what was compared, or the first difference."""
    try:
        for old, new, found in pairs(before, after):
            if found.claims:
                yield _compare_graphs(_Pair(before, after, old, new, found), again)
    except SignatureChanged as error:
        claim = Claim("return", "return", "return")
        yield Difference(before.main, claim, "", Case({}), f"a graph changed its signature: {error}")


# ---------------------------------------------------------------- one graph


@dataclass(frozen=True)
class _Pair:
    """A graph before and after, and how they correspond."""

    program: Program
    later: Program
    before: Graph
    after: Graph
    found: Correspondence

    @property
    def free(self) -> bool:
        """Whether any inputs are admissible: nothing is proved of those of the model."""
        return self.before.name in (self.program.main, self.program.objective)


def _compare_graphs(pair: _Pair, again: Pass | None) -> Checked | Difference:
    runs = 0
    for fit in fits(pair.program, pair.later, pair.before.name, pair.after.name):
        fitted = _fitted(pair, fit)
        for case in fit.cases:
            if runs and case.spare:
                continue
            outcome = _run_case(fitted, case, strict=pair.free and not fit.shrunk)
            if isinstance(outcome, Difference) and (not fit.shrunk or _confirmed(fitted, case, again)):
                return outcome
            runs += outcome is True
    return Checked(pair.before.name, len(pair.found.claims), runs)


def _fitted(pair: _Pair, fit: Fit) -> _Pair:
    old, new = fit.before[pair.before.name], fit.after[pair.after.name]
    return replace(pair, program=fit.before, later=fit.after, before=old, after=new)


def _confirmed(pair: _Pair, case: Case, again: Pass | None) -> bool:
    """Whether the pass itself makes the difference of the smaller program that it is given.

    It may have read a size that was made smaller; then the two programs are none of one pass.
    """
    if again is None:
        return False
    anew = again(pair.program)
    if pair.after.name not in anew.by_name:
        return False
    for old, new, found in pairs(pair.program, anew):
        if old.name == pair.before.name:
            other = _Pair(pair.program, anew, old, new, found)
            return isinstance(_run_case(other, case, strict=False), Difference)
    return False


def _run_case(pair: _Pair, case: Case, strict: bool) -> Difference | bool | None:
    """The first difference of a case, True where there is none, None where the case says nothing.

    Not `strict`: what is proved of a node may rest on facts of inputs that these do not have; then they say nothing.
    """
    for _ in range(ATTEMPTS):
        try:
            reference = _reference(pair, case)
        except (ValueError, IndexError):
            return None  # the program has no value at these sizes
        if not _extreme(pair.before, reference):
            difference = _first_difference(pair, case, reference)
            if difference is None:
                return True
            if strict or _as_proved(pair.before, reference):
                return difference
        case = case.smaller()
    return None


def _reference(pair: _Pair, case: Case) -> dict[str, Values]:
    """The values of the earlier graph, of all nodes that a claim or a new node needs."""
    named = {claim.old for claim in pair.found.claims} | (_new_nodes(pair)[1] & pair.before.by_name.keys())
    needed = ancestors(pair.before, named)
    run = _start(pair.program, pair.before, case)
    values: dict[str, Values] = {}
    with np.errstate(all="ignore"):
        for node in pair.before.nodes:
            if node.name in needed:
                given = [values[name] for name in node.inputs]
                values[node.name] = draw(node, case) if node.op == "input" else run.node(node, given)
    return values


def _new_nodes(pair: _Pair) -> tuple[frozenset[str], frozenset[str]]:
    """The nodes of the later graph that are to be computed, and those that stayed and that they read."""
    stayed = pair.found.stayed
    reached = ancestors(pair.after, [claim.new for claim in pair.found.claims], stop=stayed)
    return reached - stayed, reached & stayed


def _start(program: Program, graph: Graph, case: Case) -> Run:
    return Run(program, case.sizes, Weights(program, graph, case), meaning=_TOTAL)


def _wrapped(op: str, ids: int, count: Callable[[Node, list[Array]], int]) -> Rule:
    """The rule of a lookup, with ids modulo what there is: drawn ids know nothing of tables."""

    def rule(node: Node, inputs: list[Array], sizes: Mapping[str, int]) -> Array:
        wrapped = list(inputs)
        wrapped[ids] = inputs[ids] % max(count(node, inputs), 1)
        return MEANING[op](node, wrapped, sizes)

    return rule


_TOTAL: Mapping[str, Rule] = {
    **MEANING,
    "embedding": _wrapped("embedding", 1, lambda node, inputs: len(inputs[0])),
    "cross_entropy": _wrapped("cross_entropy", 1, lambda node, inputs: inputs[0].shape[-1]),
    "one_hot": _wrapped("one_hot", 0, lambda node, inputs: int(str(node["classes"]))),
}


# ---------------------------------------------------------------- what a run says


def _extreme(graph: Graph, values: Mapping[str, Values]) -> bool:
    """Whether float64 ends near a value: then the two programs may round differently."""
    for name, value in values.items():
        for each in value if isinstance(value, tuple) else (value,):
            if each.dtype != np.float64 or not each.size:
                continue
            sizes = np.abs(each[np.isfinite(each)])
            if sizes.size and sizes.max() > LARGEST:
                return True
            if graph[name].op == "exp" and (np.isposinf(each).any() or ((sizes > 0) & (sizes < LEAST)).any()):
                return True
    return False


def _as_proved(graph: Graph, values: Mapping[str, Values]) -> bool:
    """Whether every value lies within what is proved of its node; hidden pairs are left out."""
    fills = [float(str(node["fill"])) for node in graph.nodes if node.get("fill") is not None]
    for name, value in values.items():
        bound = graph[name].bound
        if bound is None or bound.asserted or isinstance(value, tuple) or value.dtype != np.float64:
            continue
        seen = np.where(np.isfinite(value) & ~np.isin(value, fills), value, 0.0)
        shown = value[np.isfinite(value) & ~np.isin(value, fills)]
        slack = 1e-9 * (1.0 + (np.abs(shown).max() if shown.size else 0.0))
        if shown.size and (shown.min() < bound.low - slack or shown.max() > bound.high + slack):
            return False
        if (
            value.ndim
            and np.sqrt(np.sum(seen * seen, axis=-1)).max(initial=0.0) > bound.norm * (1 + 1e-9) + 1e-300
        ):
            return False
    return True


def _first_difference(pair: _Pair, case: Case, reference: Mapping[str, Values]) -> Difference | None:
    """The first claim that fails; everything else is as the reference has it."""
    fresh, kept = _new_nodes(pair)
    values: dict[str, Values] = {name: reference[name] for name in kept}
    claims: dict[str, list[Claim]] = {}
    for claim in pair.found.claims:
        claims.setdefault(claim.new, []).append(claim)
    run = _start(pair.later, pair.after, case)
    for node in pair.after.nodes:
        if node.name in fresh:
            try:
                values[node.name] = _computed(run, node, values, case)
            except (ValueError, IndexError, TypeError) as error:
                claim = claims.get(node.name, [Claim(node.name, node.name, "")])[0]
                return _difference(pair, claim, case, f"{node.op} {node.name} cannot run: {error}")
        for claim in claims.get(node.name, []):
            text = _unequal(reference[claim.old], values[node.name])
            if text is not None and not _rounding(pair, claim, case, reference[claim.old], values[node.name]):
                return _difference(pair, claim, case, text)
            if node.name in fresh:
                values[node.name] = reference[claim.old]
    return None


def _computed(run: Run, node: Node, values: Mapping[str, Values], case: Case) -> Values:
    if node.op == "input":
        return draw(node, case)
    with np.errstate(all="ignore"):
        return run.node(node, [values[name] for name in node.inputs])


def _tuple(value: Values) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def _unequal(old: Values, new: Values) -> str | None:
    """How two values differ beyond rounding; None where they do not."""
    if len(_tuple(old)) != len(_tuple(new)):
        return f"{len(_tuple(old))} results became {len(_tuple(new))}"
    for wanted, found in zip(_tuple(old), _tuple(new), strict=True):
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            return f"{wanted.dtype} of shape {wanted.shape} became {found.dtype} of shape {found.shape}"
        wrong = _off(wanted, found) > _allowed(wanted)
        if wrong.any():
            worst = np.unravel_index(np.argmax(np.where(wrong, _off(wanted, found), -1.0)), wanted.shape)
            place = ", ".join(map(str, worst))
            share = f"{int(wrong.sum())} of {wrong.size} entries differ"
            return f"{share}: [{place}] is {wanted[worst]!r} before and {found[worst]!r} after"
    return None


def _off(wanted: Array, found: Array) -> Array:
    """|wanted - found|; 0 where wanted is NaN, infinite where only one of them is finite."""
    if wanted.dtype != np.float64:
        return np.where(wanted == found, 0.0, np.inf)
    with np.errstate(all="ignore"):
        off = np.abs(wanted - found)
    return np.where(np.isnan(wanted) | (wanted == found), 0.0, np.where(np.isnan(off), np.inf, off))


def _allowed(wanted: Array) -> Array:
    """TOLERANCE of the largest entry of each row, and a little of the largest one of all."""
    if wanted.dtype != np.float64:
        return np.zeros(wanted.shape)
    sizes = np.where(np.isfinite(wanted), np.abs(wanted), 0.0)
    rows = sizes.max(axis=-1, keepdims=True, initial=0.0) if wanted.ndim else sizes
    return TOLERANCE * (rows + 1e-6 * sizes.max(initial=0.0))


def _rounding(pair: _Pair, claim: Claim, case: Case, old: Values, new: Values) -> bool:
    """Whether a difference is what rounding may do: as small as a hundred times what a little noise on inputs does."""
    moved = [np.zeros(each.shape) for each in _tuple(old)]
    for seed in range(3):
        noisy = replace(case, noise=NOISE * (1 + seed / 7))
        others = _tuple(_reference(pair, noisy)[claim.old])
        if [each.shape for each in others] != [each.shape for each in _tuple(new)]:
            return False
        moved = [np.maximum(m, _off(w, o)) for m, w, o in zip(moved, _tuple(old), others, strict=True)]
    return all(
        bool((_off(wanted, found) <= _allowed(wanted) + 100.0 * m).all())
        for wanted, found, m in zip(_tuple(old), _tuple(new), moved, strict=True)
    )


# ---------------------------------------------------------------- what is told


def _difference(pair: _Pair, claim: Claim, case: Case, text: str) -> Difference:
    node = pair.before.by_name.get(claim.old)
    place = f" ({node.span.place})" if node is not None and node.span is not None else ""
    return Difference(pair.before.name, claim, place, case, text)


def _message(before: Program, after: Program, name: str, found: Difference) -> str:
    where = _write(_reproducer(before, after, name, found), name)
    return f"after {name}: {_told(found)}. {where}"


def _told(found: Difference) -> str:
    sizes = ", ".join(f"{key} = {size}" for key, size in found.case.sizes.items())
    given = f"inputs {found.case.style}, seed {found.case.seed}, sizes {sizes or 'none'}"
    value = f"{found.graph}.{found.claim.old}{found.place}"
    return f"{value} is not what it was, on {given}: {found.text}"


def _reproducer(before: Program, after: Program, name: str, found: Difference) -> str:
    return f'''"""After {name}, {_told(found).replace(chr(92), "/")}.

Run this file: it compares the program before the pass with what the pass made of it, and, where the pass needs nothing
but the program, with what it makes of it now. It ends with status 1 where it finds a difference.
"""

from fastgrad_compiler.validate import reproduce

BEFORE = {_literal(print_program(before))}
AFTER = {_literal(print_program(after))}

if __name__ == "__main__":
    raise SystemExit(reproduce(BEFORE, AFTER, {name!r}))
'''


def _literal(text: str) -> str:
    """A program's text as a readable literal."""
    return "(\n" + "".join(f"    {line!r}\n" for line in text.splitlines(keepends=True)) + ")"


def _write(text: str, name: str) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"fastgrad-{name}-", suffix=".py", delete=False
        ) as file:
            file.write(text)
    except OSError as error:
        return f"No file that reproduces it could be written: {error}"
    return f"{Path(file.name)} reproduces it"


def reproduce(before: str, after: str, name: str) -> int:
    """What a reproducer runs: prints what differs between two programs, and between the first and the pass run anew.

    1 where anything does, else 0.
    """
    from fastgrad_compiler.pipeline import PASSES
    from fastgrad_compiler.text import parse_program

    step = next(step for step in PASSES if step.name == name)
    old, status = parse_program(before), 0
    for title, new in (("as it was", parse_program(after)), ("as it is now", step.run(old))):
        found = next((each for each in compare(old, new, step.run) if isinstance(each, Difference)), None)
        status = max(status, int(found is not None))
        print(f"{name} {title}: {'no difference' if found is None else _told(found)}")
    return status
