"""Work buffers of a polynomial attention kernel: monomial features, their cotangents, values with their ones.

Features are feature-major, (rows, rank, tokens), so that one index of one level is one vector operation on contiguous
memory: `phi[target] = x[index] * phi[source]`. Views are made once a buffer, not once a chunk: making them
costs as much as the products do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .monomials import Block


class Workspace:
    """Named buffers that are allocated at first use, grown where needed and reused over chunks, sweeps and rows."""

    def __init__(self, like: Tensor, dtype: torch.dtype, d: int, blocks: Sequence[Block]) -> None:
        self.dtype, self.device = dtype, like.device
        self.d, self.blocks = d, blocks
        self.rank = blocks[-1].target[1] if blocks else 1 + d
        self._storage: dict[str, Tensor] = {}
        self._views: dict[tuple[object, ...], Tensor] = {}
        self._features: dict[tuple[int, int], Features] = {}
        self._cotangents: dict[tuple[int, int], Cotangent] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous buffer of that shape, whose content is whatever was there."""
        key = (name, *shape)
        view = self._views.get(key)
        if view is None:
            size = prod(shape)
            storage = self._storage.get(name)
            if storage is None or storage.numel() < size:
                storage = torch.empty(size, dtype=self.dtype, device=self.device)
                self._storage[name] = storage
                self._forget(name)
            view = storage[:size].view(shape)
            self._views[key] = view
        return view

    def _forget(self, name: str) -> None:
        """Drop what points into a storage that was replaced, so that its memory is free at once."""
        self._views = {key: view for key, view in self._views.items() if key[0] != name}
        if name == "features":
            self._features.clear()
            self._cotangents.clear()
        elif name in ("cotangent", "product", "gradient"):
            self._cotangents.clear()

    def zeros(self, name: str, *shape: int) -> Tensor:
        """The same, filled with zeros."""
        return self.take(name, *shape).zero_()

    def features(self, rows: int, width: int) -> Features:
        """The features of `width` tokens in each of `rows` rows; all widths share one storage."""
        phi = self.take("features", rows, self.rank, width)
        found = self._features.get((rows, width))
        if found is None:
            found = self._features[rows, width] = Features(phi, self.d, self.blocks)
        return found

    def cotangent(self, rows: int, width: int) -> Cotangent:
        """The cotangent of `features(rows, width)`."""
        features = self.features(rows, width)
        largest = max((block.size for block in self.blocks), default=0)
        levels = self.blocks[-1].level if self.blocks else 1
        upstream = self.take("cotangent", rows, self.rank, width)
        product = self.take("product", rows * largest * width)
        gradient = self.take("gradient", rows, levels, self.d, width)
        found = self._cotangents.get((rows, width))
        if found is None:
            found = self._cotangents[rows, width] = Cotangent(
                features, self.blocks, upstream, product, gradient
            )
        return found


class Features:
    """phi (rows, rank, width) of one tile: row 0 is 1, rows 1..d are x itself, the rest are the blocks' products."""

    def __init__(self, phi: Tensor, d: int, blocks: Sequence[Block]) -> None:
        self.phi, self.x = phi, phi[:, 1 : 1 + d]
        self.ones, self.tokens = phi[:, 0], phi.mT
        self.steps = [
            (phi[:, 1 + block.index, None], phi[:, slice(*block.source)], phi[:, slice(*block.target)])
            for block in blocks
        ]

    def load(self, tokens: Tensor) -> Tensor:
        """Fill phi from tokens [b, h, t, d] or [b, h, G, t, d]; b * h = rows, G * t = width. Returns phi."""
        self.load_tokens(tokens)
        self.ones.fill_(1.0)
        for factor, source, target in self.steps:
            torch.mul(factor, source, out=target)
        return self.phi

    def load_tokens(self, tokens: Tensor) -> Tensor:
        """Only x, for where the scores alone are needed. Returns x (rows, d, width)."""
        feature_major = tokens.movedim(-1, 2)
        target = self.x.unflatten(0, feature_major.shape[:2]).unflatten(-1, feature_major.shape[3:])
        target.copy_(feature_major)
        return self.x


class Cotangent:
    """The vector-Jacobian product of `Features`: the blocks walked backwards."""

    def __init__(
        self, features: Features, blocks: Sequence[Block], upstream: Tensor, product: Tensor, gradient: Tensor
    ) -> None:
        rows, _, width = upstream.shape
        self.upstream, self.gradient = upstream, gradient
        self.linear = upstream[:, 1 : 1 + gradient.shape[2]]
        self.steps = [
            (
                features.phi[:, 1 + block.index, None],
                features.phi[:, slice(*block.source)],
                upstream[:, slice(*block.target)],
                upstream[:, slice(*block.source)],
                product[: rows * block.size * width].view(rows, block.size, width),
                gradient[:, block.level - 1, block.index],
            )
            for block in reversed(blocks)
        ]

    def pull(self) -> Tensor:
        """The gradient (rows, d, width) of x, from `upstream` (rows, rank, width), which it overwrites."""
        for factor, source, above, below, product, total in self.steps:
            torch.mul(above, source, out=product)
            torch.sum(product, 1, out=total)
            below.addcmul_(factor, above)
        total = self.gradient[:, 0]
        total.copy_(self.linear)
        for level in range(1, self.gradient.shape[1]):
            total.add_(self.gradient[:, level])
        return total


def load_tokens(work: Workspace, name: str, tokens: Tensor) -> Tensor:
    """Token-major copy (rows, t, width) of [b, h, t, width] or [b, h, G, t, width], in the dtype of the work."""
    b, h, *tile, width = tokens.shape
    buffer = work.take(name, b * h, prod(tile), width)
    buffer.view(tokens.shape).copy_(tokens)
    return buffer


def add_product(work: Workspace, state: Tensor, left: Tensor, right: Tensor) -> None:
    """state += left @ right, in one addition: a library may add the terms of a product to the state one by one."""
    state.add_(torch.bmm(left, right, out=work.take("addend", *state.shape)))


def load_values(work: Workspace, v: Tensor, mask: Tensor | None) -> Tensor:
    """v~ = [v, 1] (rows, t, dv + 1) of v [b, h, t, dv]; zero where the mask [b, t] is False, which hides the key."""
    b, h, t, dv = v.shape
    buffer = work.take("values", b * h, t, dv + 1)
    view = buffer.view(b, h, t, dv + 1)
    view[..., :dv].copy_(v)
    if mask is None:
        view[..., dv].fill_(1.0)
    else:
        view[..., dv].copy_(mask[:, None].expand(b, h, t))
        view[..., :dv].masked_fill_(~mask[:, None, :, None], 0.0)
    return buffer


def scale_tokens(tokens: Tensor, factors: Tensor) -> None:
    """tokens (b * h, G * t, width) *= factors [b, h, t], the same for each of G."""
    b, h, t = factors.shape
    tokens.view(b, h, -1, t, tokens.shape[-1]).mul_(factors[:, :, None, :, None])


def store_output(total: Tensor, out: Tensor, denominator: Tensor) -> None:
    """Write N / D to out [b, h, G, t, dv] and D to denominator [b, h, G, t] from total (rows, G * t, dv + 1).

    A row that sees no key has D = 0, and gives 0.
    """
    dv = out.shape[-1]
    total = total.view(*out.shape[:-1], dv + 1)
    denominator.copy_(total[..., dv])
    torch.mul(total[..., :dv], inverse(denominator).unsqueeze(-1), out=out)


def load_cotangent(work: Workspace, gradient: Tensor, out: Tensor, denominator: Tensor) -> Tensor:
    """u~ = [dO / D, -(dO . O) / D] (rows, G * t, dv + 1); gradient, out [b, h, G, t, dv], denominator [b, h, G, t]."""
    b, h, groups, t, dv = gradient.shape
    buffer = work.take("output_cotangent", b * h, groups * t, dv + 1)
    view = buffer.view(b, h, groups, t, dv + 1)
    scale = inverse(denominator)
    head, last = view[..., :dv], view[..., dv]
    head.copy_(gradient)
    product = work.take("output_product", b, h, groups, t, dv)
    torch.mul(head, out, out=product)
    torch.sum(product, -1, out=last)
    last.mul_(scale).neg_()
    head.mul_(scale.unsqueeze(-1))
    return buffer


def inverse(denominator: Tensor) -> Tensor:
    """1 / D, and 0 where D is 0."""
    return torch.where(denominator == 0, 0.0, denominator.reciprocal())


def store_tokens(gradient: Tensor, target: Tensor) -> None:
    """Write a feature-major gradient (rows, width, G * t) to target [b, h, G, t, width]."""
    b, h, groups, t, width = target.shape
    target.copy_(gradient.view(b, h, width, groups, t).permute(0, 1, 3, 4, 2))


def add_rows(addend: Tensor, target: Tensor) -> None:
    """target [b, h, t, width] += addend (rows, t, width), of which more columns than `width` are ignored."""
    target.add_(addend.view(*target.shape[:3], addend.shape[-1])[..., : target.shape[-1]])


def add_tokens(gradient: Tensor, target: Tensor) -> None:
    """Add a feature-major gradient (rows, width, G * t) to target [b, h, G, t, width]."""
    b, h, groups, t, width = target.shape
    target.add_(gradient.view(b, h, width, groups, t).permute(0, 1, 3, 4, 2))


def horner(coefficients: Sequence[float], scores: Tensor, out: Tensor) -> Tensor:
    """The polynomial of `scores` with these coefficients, by ascending power, written to `out`."""
    *rest, last = coefficients
    if not rest:
        return out.fill_(last)
    torch.mul(scores, last, out=out).add_(rest.pop())
    while rest:
        out.mul_(scores).add_(rest.pop())
    return out


def derivative(coefficients: Sequence[float]) -> list[float]:
    """The coefficients of the derivative of a polynomial, by ascending power."""
    return [power * c for power, c in enumerate(coefficients)][1:]


def near_and_far(
    queries: range, keys: range, block: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Masks (queries, keys): |floor(i/w) - floor(j/w)| <= 1, and the rest; only the past of it if causal."""
    own = torch.arange(queries.start, queries.stop, device=device).div_(block, rounding_mode="floor")
    other = torch.arange(keys.start, keys.stop, device=device).div_(block, rounding_mode="floor")
    distance = own[:, None] - other
    if not causal:
        distance.abs_()
    return distance.abs() <= 1, distance > 1


def row_maximum(local: Tensor, far: Tensor, out: Tensor) -> None:
    """m (rows, queries, 1) from near logits (rows, queries, keys), -inf where hidden, and the sums of far weights.

    The greatest near logit; at least 0 where there are far weights, so that these stay finite. A row without them may
    be as far below 0 as it likes, where exp(t) alone would underflow. 0 for a row that sees nothing.
    """
    if local.shape[-1]:
        torch.amax(local, -1, keepdim=True, out=out)
    else:
        out.fill_(-math.inf)
    torch.maximum(out, torch.where(far == 0, -math.inf, 0.0), out=out)
    out.masked_fill_(out == -math.inf, 0.0)


def far_decay(maximum: Tensor) -> Tensor:
    """e^-m, at most 1: m is below 0 only where there is nothing far to scale."""
    return maximum.clamp(min=0.0).neg_().exp_()
