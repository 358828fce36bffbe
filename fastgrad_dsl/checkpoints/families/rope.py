"""Rotary positions as config.json describes them, with the kinds of scaling that the language has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from fastgrad_dsl.checkpoints.fields import (
    Config,
    Field,
    anything,
    number,
    one_of,
    read_fields,
    refused,
    size,
)
from fastgrad_dsl.documents.form import shown


def positions(context: int, base: float = 10000.0) -> tuple[Field, ...]:
    """What a family with rotary positions reads of them, with its defaults of the longest text and of the base."""
    return (
        number("rope_theta", base),
        anything("rope_scaling"),
        anything("rope_parameters"),
        size("max_position_embeddings", context, most=1 << 40),
        one_of("partial_rotary_factor", 1.0, 1.0, 1),
    )


_FACTOR = number("factor")
_KINDS: dict[str, tuple[Field, ...]] = {
    "default": (),
    "linear": (_FACTOR,),
    "dynamic": (_FACTOR,),
    "llama3": (
        _FACTOR,
        number("low_freq_factor"),
        number("high_freq_factor"),
        size("original_max_position_embeddings", most=1 << 40),
    ),
    "yarn": (
        _FACTOR,
        size("original_max_position_embeddings", None, optional=True, most=1 << 40),
        number("attention_factor", None, optional=True),
        number("mscale", None, optional=True, least=0),
        number("mscale_all_dim", None, optional=True, least=0),
        number("beta_fast", None, optional=True),
        number("beta_slow", None, optional=True),
        one_of("truncate", True, True, False),
    ),
}
"""What each kind of scaling reads beside its name."""

_OBJECTS = ("rope_scaling", "rope_parameters")
_NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """`stretch` is an expression of the language, or none; queries and keys are scaled by `scale`."""

    base: float
    stretch: str | None = None
    scale: float = 1.0

    @property
    def block(self) -> str:
        """A block `turned` for positions that are more than an operation, else nothing."""
        if self.stretch is None:
            return ""
        scale = "" if self.scale == 1.0 else "rope_scale * "
        return f"""
block turned(x: float[b, h, n, width]) -> float[b, h, n, width] {{
    return {scale}rotary(x; base = rope_base, stretch = {self.stretch})
}}
"""

    def turned(self, name: str) -> str:
        """An expression for `name` at its place."""
        return f"rotary({name}; base = rope_base)" if self.stretch is None else f"turned({name})"


def rope_of(config: Config) -> Rope:
    """The rotary positions of a config.

    Raises TfgError FG602 for scaling that is not known, by name, and for two fields that disagree, of which the
    versions of Transformers take one or the other.
    """
    base, scaling, parameters = (config.values[name] for name in ("rope_theta", *_OBJECTS))
    found = parameters if scaling is None else scaling
    if found is None:
        return Rope(config.real("rope_theta"))
    for name in _OBJECTS:
        if not isinstance(config.values[name], Mapping | None):
            raise refused(f"{name} is {shown(config.values[name])}, expected an object")
    assert isinstance(found, Mapping)
    # rope_parameters are a newer format, which has the base in them alone
    base = _base(found, base, fixed=scaling is not None or "rope_theta" in config.given)
    if isinstance(scaling, Mapping) and isinstance(parameters, Mapping):
        _base(parameters, base, fixed=True)
        if _without_base(scaling) != _without_base(parameters):
            raise refused("rope_scaling and rope_parameters disagree")
    kind = found.get("rope_type", found.get("type", "default"))
    if found.get("type", kind) != kind:
        raise refused(f"rope_type is {shown(kind)}, and type beside it {shown(found['type'])}: they disagree")
    if kind not in _KINDS or not isinstance(kind, str):
        raise refused(f"rope_type is {shown(kind)}, expected one of {', '.join(_KINDS)}")
    read = read_fields((*_KINDS[kind], one_of("partial_rotary_factor", 1.0, 1.0, 1)), found)
    unknown = sorted(set(found) - set(read) - set(_NAMES) - {"original_max_position_embeddings"})
    if unknown:
        raise refused(f"rope_scaling has {unknown[0]}, which rope_type {kind} does not")
    return _scaled(kind, base, Config(read, config.architecture, {}), config)


def _base(found: Mapping[str, object], base: object, *, fixed: bool) -> float:
    """The base that is in an object, or the given one. Raises TfgError FG602 for another, if that is `fixed`."""
    inner = cast(float, read_fields([number("rope_theta", base)], found)["rope_theta"])
    if fixed and inner != base:
        raise refused(f"rope_theta is {shown(base)}, and {shown(inner)} beside the scaling: they disagree")
    return float(inner)


def _without_base(found: Mapping[str, object]) -> dict[str, object]:
    """What an object says beside the base; the kind under its newer name."""
    names = {name: "rope_type" if name == "type" else name for name in found if name != "rope_theta"}
    return {new: found[name] for name, new in names.items()}


def _scaled(kind: str, base: float, read: Config, config: Config) -> Rope:
    """Scaling that stays the same for every length: `dynamic` is none up to the length that the spec allows."""
    if kind == "linear":
        return Rope(base, f"({read.real('factor')!r},)")
    if kind == "llama3":
        low, high = read.real("low_freq_factor"), read.real("high_freq_factor")
        if low >= high:
            raise refused("low_freq_factor is not below high_freq_factor")
        context = read.integer("original_max_position_embeddings")
        limits = {"low": (low, 1.0), "high": (high, 4.0)}
        return Rope(base, _call("rope_llama3", read.real("factor"), context, limits))
    if kind == "yarn":
        return _yarn(base, read, config)
    return Rope(base)


def _yarn(base: float, read: Config, config: Config) -> Rope:
    context = read.either("original_max_position_embeddings", config.integer("max_position_embeddings"))
    fast = read.real("beta_fast") if read.values["beta_fast"] else 32.0
    slow = read.real("beta_slow") if read.values["beta_slow"] else 1.0
    if slow > fast:
        raise refused("beta_slow is above beta_fast")
    if base <= 1:
        raise refused("rope_theta is at most 1, which rope_type yarn is not made for")
    whole = "true" if read.flag("truncate") else "false"
    settings = {"fast": (fast, 32.0), "slow": (slow, 1.0), "whole": (whole, "true")}
    stretch = _call("rope_yarn", read.real("factor"), context, settings)
    return Rope(base, stretch, _attention_factor(read))


def _attention_factor(read: Config) -> float:
    """What cosines and sines are multiplied by (arXiv 2309.00071, section 3.4)."""
    if read.values["attention_factor"] is not None:
        return read.real("attention_factor")
    factor = read.real("factor")
    if read.values["mscale"] and read.values["mscale_all_dim"]:
        return _growth(factor, read.real("mscale")) / _growth(factor, read.real("mscale_all_dim"))
    return _growth(factor, 1.0)


def _growth(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _call(name: str, factor: float, context: int, others: Mapping[str, tuple[object, object]]) -> str:
    """A call with what differs from its default in `others`."""
    rest = "".join(f", {key} = {value}" for key, (value, default) in others.items() if value != default)
    return f"{name}(width, rope_base; factor = {factor!r}, context = {context}{rest})"
