"""plan.json: what a compiled model takes, its budget, and for each attention the decision and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.rounding import EXACT, USUAL_LENGTH, Rounding, Sizes
from fastgrad_compiler.attention.table import (
    OWN,
    AttentionEntry,
    Lengths,
    attention_table,
    is_guarded,
    range_source,
)
from fastgrad_compiler.codegen.attention_kernels import kernel_module
from fastgrad_compiler.ir.graph import Attribute, Node, Program
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_compiler.planning.cost import Shape, Way, flops
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.api.attention_rounding import entry_rounding, rounding_document
from fastgrad_dsl.api.batches import Input, model_inputs, target_inputs

FORMAT = "fastgrad-plan-4"


def plan_document(
    program: Program, source: str, target: str, params: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """The plan of a compiled program as plain data; deterministic. `params` are those that override the file's."""
    budget = program.budget
    return {
        "format": FORMAT,
        "model": program.name,
        "source": source,
        "target": target,
        "params": {name: str(value) for name, value in (params or {}).items()},
        "dims": [{"name": d.name, "at_most": d.at_most, "multiple_of": d.multiple_of} for d in program.dims],
        "inputs": [_input(tensor) for tensor in model_inputs(program)],
        "targets": [_input(tensor) for tensor in target_inputs(program)],
        "budget": None
        if budget is None
        else {
            "output": budget.output,
            "gradient": budget.gradient,
            "near": budget.near,
            "trust": program.trust,
            "on_violation": program.on_violation,
        },
        "attentions": [attention_document(program, entry, target) for entry in attention_table(program)],
    }


def attention_document(program: Program, entry: AttentionEntry, target: str) -> dict[str, Any]:
    """One attention: numbers that do not exist for it (a degree of an exact one) are None.

    A polynomial that is the model's own has the family "own", an error of 0 and no `bound`: it needs none. `queries`,
    `keys` are the two lengths, dims as text; `d`, `dv` the widths of a head; `kernel` is the module that
    serves the attention, None where PyTorch does; `precision` is that of its arithmetic at least.

    It is exact below `break_even` tokens on the device that the target is for, on a GPU below `break_even_gpu`.

    `bound` is R with its `proof`, its `range_source` (one of ranges.SOURCES) and whether it is only `asserted`;
    `guarded` says whether a run checks it; `flops` are per head and sequence at the longest declared length;
    `certificate` holds the proved worst cases that need no data (docs/mathematics.md, section 7), those of
    rounding (section 10) for a float32 run on a CPU; `reach` bounds |scale| sum_a |q_a k_a|; `rounding` says more.
    """
    node = entry.node
    polynomial = node.get("decision") == "polynomial" or node.op == "poly_attention"
    eps, eps_prime = (_number(node.get(key)) if polynomial else None for key in ("eps", "eps_prime"))
    document: dict[str, Any] = {
        "path": entry.path,
        "source": entry.place or None,
        "decision": "polynomial" if polynomial else "exact",
        "why": node.get("why"),
        "family": node.get("family") if polynomial else None,
        "degree": node.get("degree") if polynomial else None,
        "coefficients": _listed(node.get("coefficients")) if polynomial else None,
        "rank": entry.rank if polynomial else None,
        "scale": node["scale"],
        "causal": node["causal"],
        "near": node["near"],
        "window": node.get("window"),
        "alibi": node.get("alibi", False),
        "roles": _listed(node["roles"]),
        "queries": str(entry.queries),
        "keys": str(entry.keys),
        "query_heads": _heads(program, entry, 0),
        "key_heads": _heads(program, entry, 1),
        "d": entry.d,
        "dv": entry.dv,
        "kernel": kernel_module(program[entry.graph], node, BACKENDS[target]),
        "bound": _number(node["bound"]),
        "range_source": range_source(node),
        "guarded": is_guarded(node),
        "asserted": node.get("asserted", False),
        "proof": _listed(node.get("proof")),
        "eps": eps,
        "eps_prime": eps_prime,
        "positive_from": _number(node.get("positive_from")) if polynomial else None,
        "break_even": node.get("break_even") if polynomial else None,
        "break_even_gpu": node.get("break_even_gpu") if polynomial else None,
        "flops": _flops(program, entry, polynomial),
        "precision": (node.get("precision") or "float32") if polynomial else None,
        "reach": _reach(node),
        "rounding": None,
        "certificate": None,
    }
    if eps is None or eps_prime is None:
        return document
    added = EXACT
    if is_approximated(document) and entry.d is not None and entry.dv is not None:
        lengths = Lengths(program)
        declared = [lengths.longest(dim) for dim in (entry.queries, entry.keys)]
        n, m = (length or USUAL_LENGTH for length in declared)
        sizes = Sizes(n, m, entry.groups)
        document["rounding"] = rounding_document(document, target, sizes, None not in declared)
        added = entry_rounding(document, target, sizes)
    return document | {"certificate": _certificate(eps, eps_prime, added)}


def _reach(node: Node) -> float | None:
    return _number(node["bound"] if node.get("reach") is None else node.get("reach"))


def is_approximated(entry: Mapping[str, Any]) -> bool:
    """Whether a polynomial stands in for the exp of this attention of a plan; the model's own stands in for nothing."""
    return bool(entry["decision"] == "polynomial" and entry["family"] != OWN)


def _heads(program: Program, entry: AttentionEntry, place: int) -> int:
    """Heads of the queries (0) or the keys (1); 1 for tensors without an axis of heads."""
    shape = program[entry.graph][entry.node.inputs[place]].tensor.shape
    return (shape[-3].constant if len(shape) > 2 else None) or 1


def _flops(program: Program, entry: AttentionEntry, polynomial: bool) -> dict[str, Any] | None:
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
        near=near if isinstance(near, int) else None,
        documents=isinstance(roles, tuple) and "documents" in roles,
        window=window if isinstance(window, int) else None,
    )
    document: dict[str, Any] = {"n": n, "m": m, "exact": asdict(flops(shape))}
    if polynomial and isinstance(degree, int):
        document["polynomial"] = asdict(flops(shape, Way(degree)))
    return document


def _certificate(eps: float, eps_prime: float, added: Rounding) -> dict[str, float | None]:
    worst = certificate(eps, eps_prime, added)
    return {
        "output_of_value_range": _number(worst.output),
        "value_gradient_of_upstream": _number(worst.value_gradient),
        "score_gradient_of_omega": _number(worst.score_gradient),
        "output_rounding_of_largest_value": _number(worst.output_rounding),
        "value_rounding_of_upstream": _number(worst.value_rounding),
        "score_rounding_of_products": _number(worst.score_rounding),
    }


def _input(tensor: Input) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": [str(dim) for dim in tensor.shape],
        "below": tensor.below,
        "documents": tensor.documents,
        "ids": tensor.ids,
    }


def input_of(document: Mapping[str, Any]) -> Input:
    """The input that an entry of a plan's `inputs` or `targets` describes."""
    return Input(**{**document, "shape": tuple(map(parse_dim, document["shape"]))})


def _number(value: Attribute) -> float | None:
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def _listed(value: Attribute) -> list[Attribute]:
    return list(value) if isinstance(value, tuple) else []
