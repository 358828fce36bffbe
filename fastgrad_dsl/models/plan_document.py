"""The plan of a compiled program as a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.rounding import EXACT, USUAL_LENGTH, Rounding, Sizes
from fastgrad_compiler.attention.table import AttentionEntry, Lengths, attention_table
from fastgrad_compiler.codegen.attention_kernels import kernel_module
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.cost import Way, flops, shape_of
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents import plan
from fastgrad_dsl.documents.base import finite, narrowed, picked
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.models.attention_rounding import entry_rounding, rounding_document
from fastgrad_dsl.models.batches import Input, model_inputs, target_inputs
from fastgrad_dsl.models.memory import memory_document

OF_POLYNOMIAL = ("family", "degree", "coefficients", "eps", "eps_prime", "positive_from", "precision")


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
        dims=tuple(picked(plan.Dim, dim) for dim in program.dims),
        inputs=tuple(_input(tensor) for tensor in model_inputs(program)),
        targets=tuple(_input(tensor) for tensor in target_inputs(program)),
        budget=None
        if budget is None
        else picked(plan.Budget, budget, trust=program.trust, on_violation=program.on_violation),
        memory=memory_document(program),
        attentions=tuple(_attention(program, entry, target) for entry in attention_table(program)),
    )


def _attention(program: Program, entry: AttentionEntry, target: str) -> plan.Attention:
    attention = entry.attention
    polynomial, verdict, known = attention.polynomial, attention.verdict, attention.range
    document = narrowed(
        picked(
            plan.Attention,
            entry,
            source=entry.place or None,
            decision="polynomial" if polynomial else "exact",
            why=verdict.why if verdict else None,
            **{name: getattr(polynomial, name, None) for name in OF_POLYNOMIAL},
            scale=attention.scale,
            causal=attention.mask.causal,
            near=attention.near,
            window=attention.mask.window,
            alibi=attention.alibi,
            roles=attention.roles,
            queries=str(entry.queries),
            keys=str(entry.keys),
            query_heads=entry.heads,
            kernel=kernel_module(program[entry.graph], entry.node, BACKENDS[target]),
            bound=finite(known.limit),
            range_source=known.origin,
            guarded=attention.is_guarded,
            asserted=known.asserted,
            proof=known.proof,
            break_even=verdict.break_even if polynomial and verdict else None,
            break_even_gpu=verdict.break_even_gpu if polynomial and verdict else None,
            flops=_flops(program, entry),
            reach=attention.reach,
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


def _flops(program: Program, entry: AttentionEntry) -> plan.Flops | None:
    """Of both ways at the longest declared lengths; None where none is declared."""
    attention, lengths = entry.attention, Lengths(program)
    n, m = lengths.longest(entry.queries), lengths.longest(entry.keys)
    if n is None or m is None or entry.d is None or entry.dv is None:
        return None
    shape, polynomial = shape_of(attention, n, m, entry.d, entry.dv), attention.polynomial
    return plan.Flops(
        n=n,
        m=m,
        exact=picked(plan.Work, flops(shape)),
        polynomial=picked(plan.Work, flops(shape, Way(polynomial.degree))) if polynomial else UNSET,
    )


def _certificate(eps: float, eps_prime: float, added: Rounding) -> plan.CertificateTerms:
    worst = certificate(eps, eps_prime, added)
    return plan.CertificateTerms(
        output_of_value_range=finite(worst.output),
        value_gradient_of_upstream=finite(worst.value_gradient),
        score_gradient_of_omega=finite(worst.score_gradient),
        output_rounding_of_largest_value=finite(worst.output_rounding),
        value_rounding_of_upstream=finite(worst.value_rounding),
        score_rounding_of_products=finite(worst.score_rounding),
    )


def _input(tensor: Input) -> plan.TensorEntry:
    return picked(plan.TensorEntry, tensor, shape=tuple(map(str, tensor.shape)))
