"""plan.json: what a compiled model takes, its budget, and for each attention the decision and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, get_args

from msgspec import UNSET, Meta, UnsetType

from fastgrad_compiler.attention.value import OWN
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_dsl.documents.base import (
    Count,
    DimText,
    Document,
    Family,
    Name,
    Part,
    Place,
    Size,
    Source,
    Target,
    Trust,
)
from fastgrad_dsl.documents.form import shown

LONGEST = 65536  # of a dim for which the file declares no limit
MOST_TOKENS = 1 << 63  # of a sequence

Heads = Annotated[int, Meta(ge=1, le=65536)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]
Degree = Annotated[int, Meta(ge=0, le=64)]
Coefficients = Annotated[tuple[Annotated[float, Meta(ge=-1e30, le=1e30)], ...], Meta(min_length=1)]
Precision = Literal["float32", "float64"]


class Dim(Document, frozen=True):
    """A run-time dim, and what the file declares of it."""

    name: Name
    at_most: Size | None
    multiple_of: Size


class TensorEntry(Document, frozen=True):
    """A tensor that the model or its objective takes; `ids` are less than `below`; others may name `documents`."""

    name: str
    dtype: Literal["float", "int", "bool"]
    shape: tuple[DimText, ...]
    below: Size
    documents: bool
    ids: bool


class Budget(Document, frozen=True):
    """The budget of the file; None is what it does not limit."""

    output: Part | None
    gradient: Part | None
    memory: Part | None
    near: Size | None
    trust: Trust
    on_violation: Literal["exact", "warn", "raise"]


class MemoryPoint(Document, frozen=True):
    """A way to run a training step: bytes at its peak, time over that of one that keeps all; both are estimates.

    `piece`: tokens of a piece where sequences run in pieces.
    """

    bytes: Part
    time: Annotated[float, Meta(ge=1)]
    piece: Size | None
    chosen: bool


class StepMemory(Document, frozen=True):
    """How a training step keeps to the budget's bytes; all numbers but `limit` and `sizes` are estimates.

    `sizes`: of run-time dims, that it is planned for; `unlimited`: bytes of a step that keeps all; `gap`: a bound, by
    the model of bytes and flops, of how much faster another plan may be that fits, None in pieces; `recomputed`: the
    calls that are made again, by graph and node: in how many first iterations of the repeat around them.
    """

    limit: Part
    sizes: dict[str, Size]
    piece: Size | None
    bytes: Part
    unlimited: Part
    time: Annotated[float, Meta(ge=1)]
    gap: Part | None
    recomputed: dict[str, Size]
    points: tuple[MemoryPoint, ...]


class Work(Document, frozen=True):
    """Floating-point operations of one head and sequence."""

    forward: Count
    backward: Count


class Flops(Document, frozen=True):
    """The work of both ways at n queries and m keys, the longest declared lengths."""

    n: Size
    m: Size
    exact: Work
    polynomial: Work | UnsetType = UNSET


class RoundingRun(Document, frozen=True):
    """Bounds of what rounding adds on one device in one dtype; None: there is no bound."""

    device: Literal["cpu", "gpu"]
    dtype: Literal["float32", "bfloat16", "float16"]
    weights: Part | None
    slopes: Part | None
    output: Part | None
    value_gradient: Part | None
    score_gradient: Part | None


class Rounding(Document, frozen=True):
    """Bounds of what rounding adds to eps and eps', at n queries and m keys, `declared` by the file or not.

    `holds_to`: the greatest length at which eps and rounding are below 1 together, None where any length will do;
    `weights`, `slopes`: added to eps and eps' in a float32 run on a CPU.
    """

    n: Size
    m: Size
    declared: bool
    reach: Part | None
    holds_to: Count | None
    weights: Part | None
    slopes: Part | None
    runs: tuple[RoundingRun, ...]


class CertificateTerms(Document, frozen=True):
    """Proved worst cases that need no data (docs/mathematics.md, sections 7 and 10); None is infinite."""

    output_of_value_range: Part | None
    value_gradient_of_upstream: Part | None
    score_gradient_of_omega: Part | None
    output_rounding_of_largest_value: Part | None
    value_rounding_of_upstream: Part | None
    score_rounding_of_products: Part | None


class Attention(Document, frozen=True):
    """One attention; numbers that do not exist for it (a degree of an exact one) are None.

    A polynomial that is the model's own has the family "own", an error of 0 and no `bound`: it needs none. `queries`,
    `keys` are the two lengths, dims as text; `d`, `dv` the widths of a head; `kernel` is the module that
    serves the attention, None where PyTorch does; `precision` is that of its arithmetic at least.

    It is exact below `break_even` tokens on the device that the target is for, on a GPU below `break_even_gpu`; one
    that is the model's own has the same weights there, of all pairs one by one.

    `bound` is R with its `proof`, its `range_source` and whether it is only `asserted`; `guarded` says whether a run
    checks it; `certificate` holds for a float32 run on a CPU; `reach` bounds |scale| sum_a |q_a k_a|.
    """

    path: str
    source: str | None
    decision: Literal["exact", "polynomial"]
    why: str | None
    family: Literal["taylor", "minimax", "balanced", "own", None]
    degree: Degree | None
    coefficients: Coefficients | None
    rank: Size | None
    scale: float
    causal: bool
    near: Size | None
    window: Size | None
    alibi: bool
    roles: tuple[Literal["padding", "documents", "near_q", "near_k", "forget"], ...]
    queries: DimText
    keys: DimText
    query_heads: Heads
    key_heads: Heads
    d: Width | None
    dv: Width | None
    kernel: Name | None
    bound: Part | None
    range_source: Source | None
    guarded: bool
    asserted: bool
    proof: tuple[str, ...]
    eps: Part | None
    eps_prime: Part | None
    positive_from: float | None
    break_even: Count | None
    break_even_gpu: Count | None
    flops: Flops | None
    precision: Precision | None
    reach: Part | None
    rounding: Rounding | None
    certificate: CertificateTerms | None

    def narrowest(self) -> type[Document]:
        """Approximated or Polynomial, where it is one."""
        if type(self) is not Attention or self.decision == "exact":
            return type(self)
        return Polynomial if self.family == OWN else Approximated


class Polynomial(Attention, frozen=True):
    """An attention that a polynomial serves."""

    family: Literal["taylor", "minimax", "balanced", "own"]
    degree: Degree
    coefficients: Coefficients
    rank: Size
    d: Width
    dv: Width
    precision: Precision


class Approximated(Polynomial, frozen=True):
    """An attention in which a polynomial stands in for exp; the model's own stands in for nothing."""

    family: Family
    bound: Annotated[float, Meta(ge=0, le=100)]
    range_source: Source
    eps: Part
    eps_prime: Part
    reach: Part


def _narrowed(kind: str, **more: object) -> dict[str, object]:
    properties = {"decision": {"const": "polynomial"}, **more}
    return {"if": {"properties": properties}, "then": {"$ref": f"#/$defs/{kind}"}}


_FAMILIES = {"enum": list(get_args(Family))}
_KINDS = Meta(
    extra_json_schema={"allOf": [_narrowed("Polynomial"), _narrowed("Approximated", family=_FAMILIES)]}
)
"""Of Attention.narrowest, for the schema."""


class Plan(Document, frozen=True):
    """What a compiled model takes, its budget, and what was decided of each attention. See docs/report.md."""

    format: Literal["fastgrad-plan-5"]
    model: str
    source: str
    target: Target
    params: dict[str, str]
    dims: tuple[Dim, ...]
    inputs: tuple[TensorEntry, ...]
    targets: tuple[TensorEntry, ...]
    budget: Budget | None
    memory: StepMemory | None
    attentions: tuple[Annotated[Attention, _KINDS], ...]

    def faults(self) -> Iterator[tuple[Place, str]]:
        """What it says twice, of dims that it does not have, or of lengths that nothing has."""
        paths: set[str] = set()
        names = {dim.name for dim in self.dims}
        sizes, _ = longest_sizes(self)
        for index, entry in enumerate(self.attentions):
            place: Place = ("attentions", index)
            if entry.path in paths:
                yield (*place, "path"), f"{shown(entry.path)} comes twice"
            paths.add(entry.path)
            for key, dim in (("queries", entry.queries), ("keys", entry.keys)):
                unknown = sorted(parse_dim(dim).names - names)
                if unknown:
                    yield (*place, key), f"no dim {shown(unknown[0])} is declared"
            if max(lengths_of(entry, sizes)) > MOST_TOKENS:
                yield place, f"sequences of more than {MOST_TOKENS} tokens"
            if isinstance(entry, Polynomial) and len(entry.coefficients) != entry.degree + 1:
                yield (*place, "coefficients"), f"expected {entry.degree + 1} for this degree"


def is_approximated(entry: Attention) -> bool:
    """Whether a polynomial stands in for the exp of an attention; the model's own stands in for nothing."""
    return entry.decision == "polynomial" and entry.family != OWN


def approximated_of(plan: Plan) -> list[bool]:
    """`is_approximated` of each attention that a polynomial serves."""
    return [is_approximated(entry) for entry in plan.attentions if entry.decision == "polynomial"]


def longest_sizes(plan: Plan) -> tuple[dict[str, int], list[str]]:
    """Sizes of the dims that lengths of attentions are made of, and those among them that the file leaves open."""
    texts = {text for entry in plan.attentions for text in (entry.queries, entry.keys)}
    names = {name for text in texts for name in parse_dim(text).names}
    sizes, undeclared = {}, []
    for dim in plan.dims:
        if dim.name in names:
            sizes[dim.name] = dim.at_most or max(LONGEST // dim.multiple_of, 1) * dim.multiple_of
            undeclared += [dim.name] if dim.at_most is None else []
    return sizes, undeclared


def lengths_of(entry: Attention, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Queries and keys of an attention at these sizes of dims."""
    n, m = (max(parse_dim(text).evaluate(sizes), 1) for text in (entry.queries, entry.keys))
    return n, m
