"""Logits of queries and keys whose rows are known: the norm of their bilinear form, head by head.

With q = a + sum_s x_s M_s, ||x_s|| <= rho_s, and k = b + sum_t y_t N_t, ||y_t|| <= tau_t:

    |q.k| <= sum_st rho_s tau_t sigma(M_s N_t^T) + sum_s rho_s ||M_s b|| + sum_t tau_t ||N_t a|| + |a.b|

and at most ||q|| ||k||. A centre, which softmax ignores, is subtracted from b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from fastgrad_compiler.analysis.weights.rows import Rows, Term, product_norm
from fastgrad_compiler.ir.words import number

_SLACK = 1 + 1e-6  # for the rounding of float64


@dataclass(frozen=True, slots=True)
class Logits:
    """R of each query head, why, and the part that all keys share [key heads, d].

    `norms`: |scale| max ||q|| max ||k|| of each query head, which R may be below.
    """

    heads: tuple[float, ...]
    norms: tuple[float, ...]
    reasons: tuple[str, ...]
    shared: Tensor

    @property
    def largest(self) -> float:
        """R of the widest head."""
        return max(self.heads)


def logits(q: Rows, k: Rows, heads: int, groups: int, scale: float, centre: Tensor | None) -> Logits:
    """R of |scale * q.(k - centre)| for `heads` query heads, each `heads / groups` of which share a key head.

    `centre` is [groups, d] and None where nothing is subtracted.
    """
    query, key = _by_head(q, heads), _by_head(k, groups)
    shared, size = key.offset, abs(scale)
    offset = shared if centre is None else shared - centre
    key = replace(key, offset=offset).on_lead(lambda x, _: x.repeat_interleave(heads // groups, 0))
    form, constant = _form(query, key), _constant(query, key)
    by_norms = size * query.norm * key.norm
    by_form = size * (form + constant)
    least = torch.minimum(by_norms, by_form).nan_to_num(nan=inf, posinf=inf)
    head = int(least.argmax())
    most, named = float(least[head]), _named(q, k)
    if not isfinite(most):
        line = f"the weights{named} hold entries that are not finite, or too large"
    elif by_form[head] < by_norms[head]:
        more = f", biases and other offsets add {number(float(constant[head]))}" if constant[head] > 0 else ""
        line = f"sigma(W_q W_k^T){named} times the radii gives {number(float(form[head]))}{more}"
    else:
        norms = f"{number(float(query.norm[head]))} and {number(float(key.norm[head]))}"
        line = f"queries and keys{named} have norms at most {norms}"
    if isfinite(most):
        line += f"; times the scale {number(size)}, " if size != 1 else ": "
        line += f"|s| is at most {number(most)}"
    if heads > 1:
        line = f"head {head}, the widest: {line}"
    reasons = [*q.sources, *k.sources, line]
    if heads > 1 and float(least.min()) < 0.99 * float(least.max()):
        reasons.append(f"R of the other heads goes down to {number(float(least.min()))}")
    values, most_norms = (
        tuple((each.nan_to_num(nan=inf, posinf=inf) * _SLACK).tolist()) for each in (least, by_norms)
    )
    return Logits(values, most_norms, tuple(dict.fromkeys(reasons)), shared)


def _named(q: Rows, k: Rows) -> str:
    paths = dict.fromkeys((*q.weights, *k.weights))
    return f" of {', '.join(f'`{path}`' for path in paths)}" if paths else ""


def _form(query: Rows, key: Rows) -> Tensor:
    """What the bilinear form of the varying parts is at most, [h]."""
    total = torch.zeros(query.offset.shape[0], dtype=torch.float64)
    for left in query.terms:
        for right in key.terms:
            total = total + left.radius * right.radius * product_norm(left.matrix, right.matrix)
    return total


def _constant(query: Rows, key: Rows) -> Tensor:
    """What offsets add to that, [h]."""
    total = (query.offset * key.offset).sum(-1).abs()
    for terms, offset in ((query.terms, key.offset), (key.terms, query.offset)):
        for term in terms:
            total = total + term.radius * (term.matrix @ offset.unsqueeze(-1)).squeeze(-1).norm(dim=-1)
    return total


def _by_head(rows: Rows, heads: int) -> Rows:
    """Rows [.., h, n, d] as [h, d], one of each head; where they differ along another axis, that becomes a ball around
    their mean.
    """
    offset, others = rows.offset, tuple(axis for axis in range(rows.rank - 1) if axis != rows.rank - 3)
    centre = offset.mean(others, keepdim=True)
    drift = (offset - centre).norm(dim=-1).amax(others)
    terms = [_term_by_head(term, others, heads) for term in rows.terms]
    if bool(drift.any()):
        terms.append(_any_row(drift, heads, rows.width))
    return Rows(tuple(terms), centre.reshape(-1, rows.width).expand(heads, rows.width))


def _term_by_head(term: Term, others: tuple[int, ...], heads: int) -> Term:
    matrix = term.dense
    if any(x.shape[axis] != 1 for x in (term.radius, matrix) for axis in others):
        return _any_row(term.norm.amax(others), heads, matrix.shape[-1])
    k, d = matrix.shape[-2:]
    return Term(term.radius.reshape(-1).expand(heads), matrix.reshape(-1, k, d).expand(heads, k, d))


def _any_row(radius: Tensor, heads: int, width: int) -> Term:
    identity = torch.eye(width, dtype=torch.float64)
    return Term(radius.reshape(-1).expand(heads), identity.expand(heads, width, width))
