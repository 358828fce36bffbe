"""The derivation of one attention's rewrite as lines of text: what was recognised, what is proved, what is computed."""

from __future__ import annotations

from math import comb

from msgspec.structs import replace

from fastgrad_dsl.documents.plan import Approximated, Attention, Polynomial
from fastgrad_dsl.documents.report import Derivation
from fastgrad_dsl.report.words import SOURCES, number

MASKS = {
    "forget": "a forget gate: a pair weighs less by the gates after key j, up to query i",
    "padding": "a padding mask over the keys",
    "documents": "keys of the same document only",
}


def derivation_key(entry: Attention) -> object:
    """What the derivation of an attention depends on."""
    return replace(entry, path="", source=None, kernel=None, guarded=False, flops=None, certificate=None)


def derivation(entry: Attention) -> Derivation:
    """The derivation of an attention."""
    lines = [*_recognised(entry), *_range(entry)]
    if isinstance(entry, Polynomial):
        lines += [*_polynomial(entry), *_features(entry), *_rewritten(entry), *_run(entry)]
    else:
        lines.append(f"decision: exact: {entry.why}")
    return Derivation(attentions=(), lines=tuple(lines))


def _recognised(entry: Attention) -> list[str]:
    weights = "the model's own polynomial of" if entry.family == "own" else "softmax of"
    scale = "" if entry.scale == 1 else f"{number(float(entry.scale))} "
    heads = f"{entry.query_heads} heads"
    if entry.key_heads != entry.query_heads:
        heads += f" that share {entry.key_heads} of keys and values"
    lines = [
        f"recognised: {weights} s_ij = {scale}q_i.k_j, times v; {heads}, d = {entry.d or '?'}, "
        f"dv = {entry.dv or '?'}, {entry.queries} queries and {entry.keys} keys"
    ]
    masks = ["causal: query i sees keys up to i"] if entry.causal else []
    masks += [text for role, text in MASKS.items() if role in entry.roles]
    masks += [f"a window: |i - j| < {entry.window}"] if entry.window else []
    masks += ["slopes of ALiBi"] if entry.alibi else []
    lines.append(f"masks: {'; '.join(masks) or 'none'}")
    if entry.near is not None:
        own = ", with logits of their own" if "near_q" in entry.roles else ""
        lines.append(
            f"near field: pairs in the same or touching blocks of {entry.near} tokens weigh exp(t){own}"
        )
    return lines


def _range(entry: Attention) -> list[str]:
    if entry.family == "own":
        return ["range: none is needed, the weights are a polynomial already"]
    lines = [f"  {step}" for step in entry.proof or ()]
    if entry.bound is None:
        return ["range: nothing bounds the logits", *lines]
    source = SOURCES[entry.range_source or "program"]
    return ["range, step by step:", *lines, f"R = {number(entry.bound)}: |s_ij| <= R, {source}"]


def _polynomial(entry: Polynomial) -> list[str]:
    terms = " + ".join(
        f"{c:.6g}" + ("" if power == 0 else " s" if power == 1 else f" s^{power}")
        for power, c in enumerate(entry.coefficients)
    )
    lines = [f"polynomial: p(s) = {terms.replace('+ -', '- ')}"]
    if isinstance(entry, Approximated):
        lines += [
            f"  {entry.family} of degree {entry.degree} on [-R, R]: |p(s)/exp(s) - 1| <= eps = "
            f"{number(entry.eps)}, |p'(s)/exp(s) - 1| <= eps' = {number(entry.eps_prime)} (bounds)",
            f"  positive for s > {number(entry.positive_from)} only"
            if entry.positive_from is not None
            else "  positive for every s <= R",
            *_rounding(entry),
        ]
    return lines


def _rounding(entry: Approximated) -> list[str]:
    """What rounding adds to eps and eps', for each run of which the plan states it."""
    found = entry.rounding
    if found is None:
        return []
    length = f"{max(found.n, found.m):,} tokens"
    undeclared = "" if found.declared else ", where the file declares no longest sequence"
    lines = [
        f"rounding: computed in {entry.precision}; at most {length}{undeclared}, |scale| sum |q_a k_a| <= "
        f"{number(found.reach)}; a bound of what is added to eps and eps' (section 10)"
    ]
    for run in found.runs:
        added = " and ".join(
            "no bound" if value is None else number(value) for value in (run.weights, run.slopes)
        )
        lines.append(f"  {run.dtype} on a {run.device.upper()}: {added}")
    if found.holds_to is not None:
        lines.append(f"  from {found.holds_to + 1:,} tokens on there is no bound in float32 runs")
    return lines


def _features(entry: Polynomial) -> list[str]:
    d, degree, rank = entry.d, entry.degree, entry.rank
    return [
        f"features: phi(q).phi(k) = p(s); the monomials of {d} numbers up to degree {degree}, "
        f"C({d} + {degree}, {degree}) = {comb(d + degree, degree)}, so rank r = {rank}"
    ]


def _rewritten(entry: Polynomial) -> list[str]:
    seen = "j <= i" if entry.causal else "all j"
    lines = [
        f"rewritten: o_i = sum of p(s_ij) v_j / sum of p(s_ij), over {seen}",
        "  = phi(q_i) S_i, without its last column, divided by that; S_i = sum of phi(k_j) [v_j, 1], r x (dv + 1)",
    ]
    if entry.near is not None:
        lines.append(
            "  near pairs: exp(t_ij) replaces p(s_ij), computed block by block; states hold far pairs"
        )
    return [
        *lines,
        "gradient: the exact one of the rewritten function, dS_ij = p'(s_ij)/p(s_ij) f_ij (dO_i.v_j - dO_i.o_i),",
        "  by the same states run the other way; see docs/mathematics.md, sections 4 and 5",
    ]


def _run(entry: Polynomial) -> list[str]:
    even, on_gpu = entry.break_even, entry.break_even_gpu
    below = ""
    if even and isinstance(entry, Approximated):
        elsewhere = f" ({on_gpu} on a GPU)" if on_gpu not in (None, even) else ""
        below = f"; exact below {even} tokens{elsewhere}, where that is faster (estimate)"
    return [f"decision: {entry.why}{below}"]
