"""The plan of a compiled program as a document."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.rounding import EXACT, USUAL_LENGTH, Rounding, Sizes
from fastgrad_compiler.attention.table import (
    AttentionEntry,
    Lengths,
    attention_table,
    is_guarded,
    range_source,
)
from fastgrad_compiler.codegen.attention_kernels import kernel_module
from fastgrad_compiler.ir.graph import Attribute, Node, Program
from fastgrad_compiler.planning.cost import Flops as Work
from fastgrad_compiler.planning.cost import Shape, Way, flops
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents import plan
from fastgrad_dsl.documents.base import narrowed
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.models.attention_rounding import entry_rounding, rounding_document
from fastgrad_dsl.models.batches import Input, model_inputs, target_inputs


def plan_document(
    program: Program, source: str, target: Any, params: Mapping[str, object] | None = None
) -> plan.Plan:
    """The plan of a compiled program; deterministic. `params` are those that override the file's."""
    budget = program.budget
    return plan.Plan(
        format=format_of(plan.Plan),
        model=program.name,
        source=source,
        target=target,
        params={name: str(value) for name, value in (params or {}).items()},
        dims=tuple(plan.Dim(d.name, d.at_most, d.multiple_of) for d in program.dims),
        inputs=tuple(_input(tensor) for tensor in model_inputs(program)),
        targets=tuple(_input(tensor) for tensor in target_inputs(program)),
        budget=None
        if budget is None
        else plan.Budget(
            output=budget.output,
            gradient=budget.gradient,
            near=budget.near,
            trust=_any(program.trust),
            on_violation=_any(program.on_violation),
        ),
        attentions=tuple(_attention(program, entry, target) for entry in attention_table(program)),
    )


def _attention(program: Program, entry: AttentionEntry, target: str) -> plan.Attention:
    node = entry.node
    polynomial = node.get("decision") == "polynomial" or node.op == "poly_attention"

    def of_polynomial(value: Any) -> Any:
        return value if polynomial else None

    document = narrowed(
        plan.Attention(
            path=entry.path,
            source=entry.place or None,
            decision="polynomial" if polynomial else "exact",
            why=_any(node.get("why")),
            family=of_polynomial(node.get("family")),
            degree=of_polynomial(node.get("degree")),
            coefficients=of_polynomial(_listed(node.get("coefficients"))),
            rank=of_polynomial(entry.rank),
            scale=_any(node["scale"]),
            causal=_any(node["causal"]),
            near=_any(node["near"]),
            window=_any(node.get("window")),
            alibi=_any(node.get("alibi", False)),
            roles=_listed(node["roles"]),
            queries=str(entry.queries),
            keys=str(entry.keys),
            query_heads=_heads(program, entry, 0),
            key_heads=_heads(program, entry, 1),
            d=entry.d,
            dv=entry.dv,
            kernel=kernel_module(program[entry.graph], node, BACKENDS[target]),
            bound=_number(node["bound"]),
            range_source=_any(range_source(node)),
            guarded=is_guarded(node),
            asserted=_any(node.get("asserted", False)),
            proof=_listed(node.get("proof")),
            eps=of_polynomial(_number(node.get("eps"))),
            eps_prime=of_polynomial(_number(node.get("eps_prime"))),
            positive_from=of_polynomial(_number(node.get("positive_from"))),
            break_even=of_polynomial(node.get("break_even")),
            break_even_gpu=of_polynomial(node.get("break_even_gpu")),
            flops=_flops(program, entry, polynomial),
            precision=of_polynomial(node.get("precision") or "float32"),
            reach=_reach(node),
            rounding=None,
            certificate=None,
        )
    )
    if document.eps is None or document.eps_prime is None:
        return document
    added, found = EXACT, None
    if isinstance(document, plan.Approximated) and entry.d is not None and entry.dv is not None:
        lengths = Lengths(program)
        declared = [lengths.longest(dim) for dim in (entry.queries, entry.keys)]
        n, m = (length or USUAL_LENGTH for length in declared)
        sizes = Sizes(n, m, entry.groups)
        found = rounding_document(document, target, sizes, None not in declared)
        added = entry_rounding(document, target, sizes)
    proved = _certificate(document.eps, document.eps_prime, added)
    return replace(document, rounding=found, certificate=proved)


def _reach(node: Node) -> float | None:
    return _number(node["bound"] if node.get("reach") is None else node.get("reach"))


def _heads(program: Program, entry: AttentionEntry, place: int) -> int:
    """Heads of the queries (0) or the keys (1); 1 for tensors without an axis of heads."""
    shape = program[entry.graph][entry.node.inputs[place]].tensor.shape
    return (shape[-3].constant if len(shape) > 2 else None) or 1


def _flops(program: Program, entry: AttentionEntry, polynomial: bool) -> plan.Flops | None:
    """Of both ways at the longest declared lengths; None where none is declared."""
    node, lengths = entry.node, Lengths(program)
    n, m = lengths.longest(entry.queries), lengths.longest(entry.keys)
    if n is None or m is None or entry.d is None or entry.dv is None:
        return None
    near, window, degree, roles = (node.get(key) for key in ("near", "window", "degree", "roles"))
    shape = Shape(
        n=n,
        m=m,
        d=entry.d,
        dv=entry.dv,
        causal=bool(node["causal"]),
        near=_any(near),
        documents=isinstance(roles, tuple) and "documents" in roles,
        window=_any(window),
    )
    served = polynomial and isinstance(degree, int)
    return plan.Flops(
        n=n,
        m=m,
        exact=_work(flops(shape)),
        polynomial=_work(flops(shape, Way(_any(degree)))) if served else UNSET,
    )


def _work(found: Work) -> plan.Work:
    return plan.Work(found.forward, found.backward)


def _certificate(eps: float, eps_prime: float, added: Rounding) -> plan.CertificateTerms:
    worst = certificate(eps, eps_prime, added)
    return plan.CertificateTerms(
        output_of_value_range=_number(worst.output),
        value_gradient_of_upstream=_number(worst.value_gradient),
        score_gradient_of_omega=_number(worst.score_gradient),
        output_rounding_of_largest_value=_number(worst.output_rounding),
        value_rounding_of_upstream=_number(worst.value_rounding),
        score_rounding_of_products=_number(worst.score_rounding),
    )


def _input(tensor: Input) -> plan.TensorEntry:
    return plan.TensorEntry(
        name=tensor.name,
        dtype=_any(tensor.dtype),
        shape=tuple(str(dim) for dim in tensor.shape),
        below=tensor.below,
        documents=tensor.documents,
        ids=tensor.ids,
    )


def _number(value: Attribute) -> float | None:
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def _listed(value: Attribute) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def _any(value: object) -> Any:
    """An attribute of a node, whose type the verifier has checked."""
    return value
