"""What a checkpoint is in the language: its family, its spec, and the place of each of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_dsl.checkpoints.families.family import Family
from fastgrad_dsl.checkpoints.families.table import FAMILIES
from fastgrad_dsl.checkpoints.fields import Config, read_fields, refused
from fastgrad_dsl.checkpoints.mapping import Places, Shape, expanded, match
from fastgrad_dsl.checkpoints.read import CONFIG
from fastgrad_dsl.documents.form import shown
from fastgrad_grammar.diagnostics import nearest
from fastgrad_grammar.format import format_source
from fastgrad_grammar.source import Source


@dataclass(frozen=True)
class Imported:
    """A family and what it read of config.json."""

    family: Family
    config: Config

    @cached_property
    def spec(self) -> str:
        """The spec, as `fastgrad fmt` lays it out."""
        return format_source(self.family.spec(self.config).lstrip("\n"))

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each weight of the spec, by path; nothing of their size is allocated."""
        program = elaborate(Source("the imported spec", self.spec))
        weights = (node for node in flatten(program).nodes if node.op in ("weight", "buffer"))
        return {node.name: tuple(dim.evaluate({}) for dim in node.tensor.shape) for node in weights}

    def places(self, names: Iterable[str]) -> Places:
        """The place of each tensor of a checkpoint. Raises TfgError FG603 for names that do not fit the family."""
        there = set(names)
        family = self.family
        prefixed = family.prefix and any(name.startswith(family.prefix) for name in there)
        prefix = family.prefix if prefixed else ""
        rules = expanded(family.rules(self.config), family.layers(self.config), prefix)
        return match(rules, [pattern.replace("{p}", prefix) for pattern in family.kept(self.config)], there)


def recognise(data: Mapping[str, object], tensors: Iterable[str] | None = None) -> Imported:
    """The family of a checkpoint, by the data of its JSON files and the names of its tensors.

    Raises TfgError FG602 where it is not supported.
    """
    config = data[CONFIG]
    assert isinstance(config, Mapping)
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        near = nearest(str(kind), FAMILIES)
        help_ = (*((f"did you mean {near}?",) if near else ()), f"read are {', '.join(sorted(FAMILIES))}")
        raise refused(f"model_type is {shown(kind)}, which is not read", *help_)
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            raise refused(f"{name} is set: weights that are quantised are not read")
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if named is None:
        architecture = family.architectures[0]
    if architecture not in family.architectures:
        said = f"architectures is {shown(named)}, expected one of {', '.join(family.architectures)}"
        raise refused(said)
    others = {name: value for name, value in data.items() if name != CONFIG}
    names = None if tensors is None else frozenset(tensors)
    values, given = read_fields(family.fields, config), frozenset(config)
    found = Config(values, str(architecture), others, names, given)
    family.check(found)
    return Imported(family, found)
