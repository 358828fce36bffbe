"""From the tensors of a checkpoint to the weights of a spec and back: names, layouts, and a place for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from fastgrad_grammar.diagnostics import TfgError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
SHOWN = 3  # names in a diagnostic
LONGEST = 200  # of their characters


@dataclass(frozen=True)
class Layout:
    """How a tensor of a checkpoint holds one or several weights of a spec, whose shapes are given.

    `shape` gives the tensor's, `into` takes it apart, `out` puts it together: no number is changed on the way.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    into: Callable[[Tensor, Sequence[Shape]], Sequence[Tensor]]
    out: Callable[[Sequence[Tensor]], Tensor]


def _joined(shapes: Sequence[Shape]) -> Shape:
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(tuple(tensors), -1)


SAME = Layout(lambda shapes: shapes[0], lambda tensor, shapes: (tensor,), lambda tensors: tensors[0])

TRANSPOSED = Layout(
    lambda shapes: shapes[0][::-1], lambda tensor, shapes: (tensor.T,), lambda tensors: tensors[0].T
)
"""torch.nn.Linear stores [out, in], a spec [in, out]."""

COLUMNS = Layout(_joined, lambda tensor, shapes: tensor.split([shape[-1] for shape in shapes], -1), _join)
"""Several weights side by side along the last axis, as GPT-2 stores queries, keys and values."""


def convolution(channels: int, side: int) -> Layout:
    """A convolution [width, channels, side, side] over patches that do not overlap: a matrix [in, width]."""
    return Layout(
        lambda shapes: (shapes[0][1], channels, side, side),
        lambda tensor, shapes: (tensor.flatten(1).T,),
        lambda tensors: tensors[0].T.reshape(-1, channels, side, side),
    )


@dataclass(frozen=True)
class Rule:
    """A tensor of a checkpoint by its name, and the paths of the weights that it holds.

    In both, `{i}` stands for the number of a layer. `{p}` stands for the prefix that a family's backbone may have.
    Rules with equal paths are names for the same weights: one of them must be there, and all that are must be equal.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout = SAME

    def of_layer(self, layer: int, prefix: str) -> Rule:
        """The rule with its placeholders filled."""
        name = self.name.replace("{p}", prefix).replace("{i}", str(layer))
        return Rule(name, tuple(path.replace("{i}", str(layer)) for path in self.paths), self.layout)


def linear(
    name: str, path: str, *, bias: bool = True, weight: str = ".w", offset: str = ".b"
) -> tuple[Rule, ...]:
    """Rules of a torch.nn.Linear: `weight` and `offset` follow `path` in the spec."""
    rules = (Rule(f"{name}.weight", (path + weight,), TRANSPOSED),)
    return (*rules, Rule(f"{name}.bias", (path + offset,))) if bias else rules


def norm(name: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a norm with weights `w` and, with `bias`, `b`."""
    rules = (Rule(f"{name}.weight", (f"{path}.w",)),)
    return (*rules, Rule(f"{name}.bias", (f"{path}.b",))) if bias else rules


def expanded(rules: Iterable[Rule], layers: int, prefix: str) -> dict[str, Rule]:
    """The rules of all layers, by the name of the tensor."""
    found: dict[str, Rule] = {}
    for rule in rules:
        for layer in range(layers if "{i}" in rule.name else 1):
            each = rule.of_layer(layer, prefix)
            found[each.name] = each
    return found


@dataclass(frozen=True)
class Places:
    """Every tensor of a checkpoint: `rules` by name for those that hold weights, `kept` for those that hold none."""

    rules: Mapping[str, Rule]
    kept: tuple[str, ...]


def match(rules: dict[str, Rule], kept: Sequence[str], names: Iterable[str]) -> Places:
    """Find the rule of each tensor; `kept` are patterns of tensors that no computation reads.

    Raises TfgError FG603 for weights without a tensor, and for tensors that are unknown.
    """
    there = sorted(names)
    known = {name: rules[name] for name in there if name in rules}
    others = tuple(name for name in there if name not in rules)
    unknown = [name for name in others if not any(fnmatchcase(name, pattern) for pattern in kept)]
    found = {rule.paths for rule in known.values()}
    missing = {rule.paths: name for name, rule in reversed(rules.items()) if rule.paths not in found}
    for wrong, candidates, said in (
        (list(missing.values())[::-1], unknown, "lacks"),
        (unknown, list(rules), "has what this model has no place for:"),
    ):
        if wrong:
            near = nearest(wrong[0], candidates)
            help_ = (f"{wrong[0][:LONGEST]}: did you mean {near[:LONGEST]}?",) if near else ()
            raise TfgError.of("FG603", f"the checkpoint {said} {_listed(wrong)}", *help_)
    return Places(known, others)


def check_shape(name: str, rule: Rule, shapes: Mapping[str, Shape], found: Shape) -> None:
    """Whether a tensor has the shape that its rule asks for. Raises TfgError FG603, which says if it is transposed."""
    wanted = rule.layout.shape([shapes[path] for path in rule.paths])
    if found == wanted:
        return
    said = f"{name} has shape {_shown(found)}, expected {_shown(wanted)}"
    if found == wanted[::-1]:
        raise TfgError.of("FG603", f"{said}: it is transposed")
    if math.prod(found) == math.prod(wanted):
        raise TfgError.of("FG603", f"{said}: it has the same number of entries in another layout")
    raise TfgError.of("FG603", said, "config.json is another checkpoint's, or the file was changed")


def _shown(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:LONGEST] for name in names[:SHOWN]) + more
