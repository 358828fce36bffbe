"""Rows as the analysis of given weights knows them: sums of images x M of balls, and an offset.

A row, along the last axis of a tensor of rank r, is c + sum over terms of x M with ||x||_2 <= rho. The r - 1 other
axes are its lead axes; radius, matrix and offset have them too, each with the tensor's size or, where all rows are
alike along it, 1. Terms are independent of each other, which can only widen what is said of their sum. Everything is
float64; shapes below leave the lead axes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, TypeAlias

import torch
from torch import Tensor

_TERMS = 4  # of one row; more are taken together as one ball

Form: TypeAlias = Literal["dense", "diagonal", "centred"]


@dataclass(frozen=True, slots=True)
class Term:
    """The image x M of a ball.

    Args:
        radius: rho [..], the largest norm of x.
        matrix: M [.., k, w]; in the form "diagonal" its diagonal [.., 1, w]; "centred" is (I - 11^T/w) times that.
        form: which of the three.
    """

    radius: Tensor
    matrix: Tensor
    form: Form = "dense"

    @property
    def dense(self) -> Tensor:
        """M in full, [.., k, w]."""
        if self.form == "dense":
            return self.matrix
        full = torch.diag_embed(self.matrix.squeeze(-2))
        return full - full.mean(-2, keepdim=True) if self.form == "centred" else full

    @property
    def norm(self) -> Tensor:
        """rho sigma(M) [..], the norm of the longest row; at most that in the form "centred"."""
        if self.form == "dense":
            return self.radius * spectral_norm(self.matrix)
        return self.radius * self.matrix.abs().amax((-2, -1))

    def times(self, factor: Tensor) -> Term:
        """Each entry times a factor [.., 1 or w]."""
        return replace(self, matrix=self.matrix * factor.unsqueeze(-2))

    def through(self, weight: Tensor) -> Term:
        """Rows times a matrix [.., w, v], whose lead axes are those of a matrix product."""
        if weight.dim() > 2:
            weight = weight.unsqueeze(-3)
        if self.form == "dense":
            return replace(self, matrix=self.matrix @ weight)
        product = self.matrix.mT * weight
        if self.form == "centred":
            product = product - product.mean(-2, keepdim=True)
        return Term(self.radius, product)


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the rows of a tensor of rank at least 1.

    Args:
        terms: what varies; none where the tensor is computed from weights and constants alone.
        offset: c [.., w].
        sources: sentences on where the radii come from.
        weights: the weights that the rows were multiplied by or that were added to them, by path.
    """

    terms: tuple[Term, ...]
    offset: Tensor
    sources: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Of the tensor."""
        return self.offset.dim()

    @property
    def width(self) -> int:
        """Of a row."""
        return self.offset.shape[-1]

    @property
    def norm(self) -> Tensor:
        """The norm of the longest row [..]."""
        return sum((term.norm for term in self.terms), self.offset.norm(dim=-1))

    def on_lead(self, function: Callable[[Tensor, int], Tensor]) -> Rows:
        """With a function applied to radii, matrices and offset that moves lead axes: (tensor, further axes)."""
        terms = tuple(
            replace(t, radius=function(t.radius, 0), matrix=function(t.matrix, 2)) for t in self.terms
        )
        return replace(self, terms=terms, offset=function(self.offset, 1))

    def shaped(self, rank: int, width: int) -> Rows:
        """Broadcast to a rank, and rows of one entry to a width."""
        if self.rank < rank:
            more = rank - self.rank
            return self.on_lead(lambda x, _: x.reshape((*[1] * more, *x.shape))).shaped(rank, width)
        if self.width == width:
            return self
        terms = tuple(Term(t.radius, t.dense.expand(*t.dense.shape[:-1], width)) for t in self.terms)
        return replace(self, terms=terms, offset=self.offset.expand(*self.offset.shape[:-1], width))

    def because(self, *others: Rows) -> Rows:
        """With the sources and weights of others after its own."""
        several = (self, *others)
        return replace(
            self,
            sources=tuple(dict.fromkeys(line for rows in several for line in rows.sources)),
            weights=tuple(dict.fromkeys(path for rows in several for path in rows.weights)),
        )


def ball(radius: Tensor, width: int, sources: tuple[str, ...] = ()) -> Rows:
    """Any rows of norm at most `radius` [..]."""
    lead = (1,) * radius.dim()
    one = radius.new_ones((*lead, 1, width))
    return Rows((Term(radius, one, "diagonal"),), radius.new_zeros((*lead, width)), sources)


def add(left: Rows, right: Rows) -> Rows:
    """The sum of two tensors of one rank and width."""
    terms, offset = left.terms + right.terms, left.offset + right.offset
    if len(terms) > _TERMS:
        radius = sum((term.norm for term in terms[1:]), terms[0].norm)
        terms = ball(radius, offset.shape[-1]).terms
    return Rows(terms, offset).because(left, right)


def times(rows: Rows, factor: Rows) -> Rows:
    """Each entry times a factor that is known; both of one rank and width."""
    terms = tuple(term.times(factor.offset) for term in rows.terms)
    return Rows(terms, rows.offset * factor.offset).because(rows, factor)


def through(rows: Rows, weight: Rows) -> Rows:
    """A matrix product with a factor that is known."""
    rows = rows.shaped(max(rows.rank, weight.rank), rows.width)
    terms = tuple(term.through(weight.offset) for term in rows.terms)
    return Rows(terms, rows.offset @ weight.offset).because(rows, weight)


def releaded(rows: Rows, source: tuple[object, ...], target: tuple[object, ...]) -> Rows:
    """Lead axes of sizes `source` regrouped into `target`, in row-major order."""
    kept = 0
    while kept < min(len(source), len(target)) and source[-1 - kept] == target[-1 - kept]:
        kept += 1
    cut = len(source) - kept
    if any(size != 1 for x in _leads(rows) for size in x[:cut]):
        every = tuple(range(cut))
        rows = ball(rows.norm.amax(every, keepdim=True), rows.width).because(rows)
    ones = [1] * (len(target) - kept)
    return rows.on_lead(lambda x, _: x.reshape((*ones, *x.shape[cut:])))


def _leads(rows: Rows) -> list[torch.Size]:
    """The sizes of the lead axes of all parts."""
    parts = [(rows.offset, 1), *((t.radius, 0) for t in rows.terms), *((t.matrix, 2) for t in rows.terms)]
    return [x.shape[: x.dim() - further] for x, further in parts]


def split(rows: Rows, heads: int) -> Rows:
    """Rows [h * w] cut into h, which become the last lead axis."""
    width = rows.width // heads

    def cut(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], heads, width)

    terms = tuple(Term(t.radius.unsqueeze(-1), cut(t.dense).movedim(-2, -3)) for t in rows.terms)
    return replace(rows, terms=terms, offset=cut(rows.offset))


def merge(rows: Rows, heads: int) -> Rows:
    """Rows of the last lead axis, of size h, joined to one: what varies becomes a ball, whose parts may add up."""
    offset = rows.offset.expand(*rows.offset.shape[:-2], heads, rows.width).flatten(-2)
    known = replace(rows, terms=(), offset=offset)
    if not rows.terms:
        return known
    parts = sum((term.norm for term in rows.terms[1:]), rows.terms[0].norm)
    radius = parts.expand(*parts.shape[:-1], heads).square().sum(-1).sqrt()
    return add(known, ball(radius, offset.shape[-1]).because(rows))


def swap_heads(rows: Rows) -> Rows:
    """The last two lead axes exchanged."""
    return rows.on_lead(lambda x, further: x.transpose(-2 - further, -1 - further))


def spectral_norm(matrix: Tensor) -> Tensor:
    """sigma [..], the largest singular value of matrices [.., k, w], from the smaller Gram matrix.

    Infinite where an entry is not finite, or too large for its square.
    """
    rows, columns = matrix.shape[-2:]
    gram = matrix.mT @ matrix if columns <= rows else matrix @ matrix.mT
    if not bool(gram.isfinite().all()):
        return gram.new_full(gram.shape[:-2], inf)
    largest: Tensor = torch.linalg.eigvalsh(gram)[..., -1]
    return largest.clamp(min=0).sqrt()


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """sigma(M N^T) [..] of M [.., k, w] and N [.., l, w], from their triangular factors and not the k x l matrix.

    Infinite where an entry is not finite.
    """
    if not bool(left.isfinite().all() and right.isfinite().all()):
        return left.new_full(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), inf)
    return spectral_norm(_triangular(left) @ _triangular(right).mT)


def _triangular(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape[-2:]
    return torch.linalg.qr(matrix, mode="r").R if rows > columns else matrix
