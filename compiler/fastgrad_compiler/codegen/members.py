"""What a block's `__init__` makes: parameters, buffers and submodules under the labels of the `.tfg` file, and guards.

A label inside a `repeat` stands for one element an iteration: a ModuleList, ParameterList or BufferList, or a dict of
the same where some iterations have none; so the keys of the state_dict are the paths of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from fastgrad_compiler.codegen.guards import Guards, guard_value
from fastgrad_compiler.codegen.writer import Expr, call, literal, tuple_text
from fastgrad_compiler.ir.calls import runs
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, Program

Run: TypeAlias = "tuple[int, Member | None]"


@dataclass(frozen=True)
class Leaf:
    """One parameter, buffer, submodule or guard: the expression that makes it, and how it starts."""

    kind: str  # "parameter", "buffer", "module" or "guard"
    value: Expr
    init: str | None = None
    persistent: bool = True  # whether a buffer is in the state_dict


@dataclass(frozen=True)
class Repeated:
    """One element for each iteration of a repeat, None where the iteration has none."""

    runs: tuple[Run, ...]

    @property
    def complete(self) -> bool:
        """Whether every iteration has an element."""
        return all(member is not None for _, member in self.runs)

    @property
    def first(self) -> Leaf | Repeated:
        """Some element."""
        return next(member for _, member in self.runs if member is not None)

    def at(self, place: int) -> Leaf | Repeated:
        """The element of an iteration that has one."""
        for times, member in self.runs:
            if place < times and member is not None:
                return member
            place -= times
        raise IndexError(f"no element at {place}")

    @property
    def kind(self) -> str:
        """A list is a module, whatever it holds."""
        return "module"

    @property
    def holds(self) -> str:
        """The kind of the elements."""
        return self.first.kind


Member: TypeAlias = Leaf | Repeated


def members(
    program: Program, graph: Graph, classes: dict[str, str], guards: Guards | None = None
) -> dict[str, Member]:
    """The members of a block by label, in the order of the block; those of its repeats included."""
    found: dict[str, Member] = {}
    guards = guards or {}
    for node in graph.nodes:
        if node.op in ("weight", "buffer"):
            found[str(node["label"])] = _tensor(node)
        elif node.op == "literal":
            value = call("torch.tensor", nested(node["values"]))
            found[str(node["label"])] = Leaf("buffer", value, persistent=False)
        elif node.op == "call" and not node.get("once") and not node.is_fused:
            found[str(node["label"])] = Leaf("module", call(classes[str(node["graph"])]))
        elif node.op == "repeat":
            found.update(_repeated(program, node, classes, guards))
        elif (graph.name, node.name) in guards:
            found[guards[graph.name, node.name]] = Leaf("guard", guard_value(program, graph, node))
    return found


def _tensor(node: Node) -> Leaf:
    shape = tuple(dim.constant for dim in node.tensor.shape)
    dtype = {"int": "torch.int64", "bool": "torch.bool"}.get(node.tensor.dtype)
    empty = call("torch.empty", *shape, dtype=dtype) if shape else call("torch.empty", "()", dtype=dtype)
    value = call("nn.Parameter", empty) if node.op == "weight" else empty
    kind = "parameter" if node.op == "weight" else "buffer"
    return Leaf(kind, value, _init_text(node))


def nested(values: Attribute) -> Expr:
    """Tuples of numbers in tuples as Python text."""
    if isinstance(values, tuple):
        return Expr(tuple_text(nested(value) for value in values))
    assert isinstance(values, int | float)
    return literal(float(values))


def _init_text(node: Node) -> str:
    init = node["init"]
    assert isinstance(init, tuple)
    return tuple_text(literal(part) for part in init if isinstance(part, int | float | str))


def _repeated(program: Program, node: Node, classes: dict[str, str], guards: Guards) -> dict[str, Member]:
    bodies = [(members(program, program[name], classes, guards), times) for name, times in runs(node)]
    labels = dict.fromkeys(label for body, _ in bodies for label in body)
    return {label: Repeated(_merged((times, body.get(label)) for body, times in bodies)) for label in labels}


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    found: list[Run] = []
    for times, member in runs:
        if found and found[-1][1] == member:
            found[-1] = (found[-1][0] + times, member)
        else:
            found.append((times, member))
    return tuple(found)


_LISTS = {"module": "nn.ModuleList", "parameter": "nn.ParameterList", "buffer": "BufferList", "guard": "list"}
_DICTS = {"module": "nn.ModuleDict", "parameter": "nn.ParameterDict", "buffer": "BufferDict", "guard": "dict"}


def container(member: Member, depth: int = 0) -> Expr:
    """The expression that makes a member."""
    if isinstance(member, Leaf):
        return member.value
    if not member.complete:
        return call(_DICTS[member.holds], "{" + ", ".join(_entries(member, depth)) + "}", **_kept(member))
    if len(member.runs) == 1:
        listed = (
            f"({_generator(*member.runs[0], depth)})" if _kept(member) else _generator(*member.runs[0], depth)
        )
        return call(_LISTS[member.holds], listed, **_kept(member))
    parts = [
        f"*({_generator(times, element, depth)})"
        if times > 1
        else str(container(_present(element), depth + 1))
        for times, element in member.runs
    ]
    return call(_LISTS[member.holds], f"[{', '.join(parts)}]", **_kept(member))


def _kept(member: Repeated) -> dict[str, bool]:
    """What lists of buffers are told of the state_dict."""
    first = member.first
    return {"persistent": False} if isinstance(first, Leaf) and not first.persistent else {}


def _generator(times: int, element: Member | None, depth: int) -> str:
    return f"{container(_present(element), depth + 1)} for _ in range({times})"


def _present(element: Member | None) -> Member:
    assert element is not None
    return element


def _entries(member: Repeated, depth: int) -> Iterator[str]:
    start = 0
    for times, element in member.runs:
        if element is not None:
            places = [str(start)] if times == 1 else []
            value = container(element, depth + 1)
            if places:
                yield f'"{start}": {value}'
            else:
                yield f"**{{str(i): {value} for i in range({start}, {start + times})}}"
        start += times


def leaf_init(member: Member) -> str | None:
    """How the tensors of a member start, None for modules."""
    return member.init if isinstance(member, Leaf) else leaf_init(member.first)
