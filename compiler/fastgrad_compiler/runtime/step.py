"""What generated step forms need beyond a whole text's functions: tokens that go on from those of the calls before.

Each function gives the results for c >= 1 new tokens, and keeps in its part of a `State` what it needs of them later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolution import depthwise, shift
from .parted import is_parted, of_own_heads
from .positions import turned, turns
from .state import Scope


def place_of(tokens: int, state: Scope, device: torch.device) -> Tensor:
    """int64 [c]: the places of new tokens in their sequence."""
    return torch.arange(tokens, device=device) + state.past.to(device)


def rows_of(x: Tensor, axis: int, first: int, tokens: int, state: Scope) -> Tensor:
    """The entries of x for new tokens along an axis, of which the first token of all has entry `first`.

    IndexError where there are none for so many tokens.
    """
    return x.index_select(axis, place_of(tokens, state, x.device) + first)


def rotary_step(
    x: Tensor,
    base: float,
    *,
    stretch: Sequence[float] | None = None,
    inverse: bool = False,
    state: Scope,
) -> Tensor:
    """`rotary` of new tokens x [.., c, d]; what turns them is found once in a call."""
    if is_parted(x):

        def turn(own: Tensor) -> Tensor:
            return rotary_step(own, base, stretch=stretch, inverse=inverse, state=state)

        return of_own_heads(turn, (x,))
    kind = (base, stretch, x.shape[-2:], x.dtype, x.device)
    cos, sin = state.once(("turns", *kind), lambda: turns(x, base, state.past, stretch))
    if x.shape[-2] > 1 or state.known_past is None:
        return turned(x, cos, sin, inverse=inverse)

    def rotation() -> Tensor:
        return turned(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), cos, sin, inverse=inverse)

    matrix: Tensor = state.once(("rotation", inverse, *kind), rotation)
    return x @ matrix  # of one token, in one operation


def shift_step(x: Tensor, ids: Tensor | None = None, *, by: int, state: Scope) -> Tensor:
    """`shift` of new tokens x [.., c, width]."""
    if by == 0:
        return x
    tokens, documents = _before(x, ids, by, state)
    return shift(tokens, documents, by=by)[..., by:, :]


def depthwise_step(x: Tensor, w: Tensor, ids: Tensor | None = None, *, state: Scope) -> Tensor:
    """`depthwise` of new tokens x [.., c, width] by w [k, width]."""
    before = w.shape[0] - 1
    if before == 0:
        return depthwise(x, w, ids)
    tokens, documents = _before(x, ids, before, state)
    if documents is None and x.shape[-2] == 1:
        return (tokens * w.flip(0)).sum(-2, keepdim=True)
    return depthwise(tokens, w, documents)[..., before:, :]


def _before(x: Tensor, ids: Tensor | None, count: int, state: Scope) -> tuple[Tensor, Tensor | None]:
    """New tokens, and their documents, after the last `count` of those before, zeros where there were none."""
    if (pieces := state.root.pieces) is not None:
        tokens = torch.cat((pieces.before(x, -2, count), x), -2)
        return tokens, None if ids is None else torch.cat((pieces.before(ids, -1, count), ids), -1)
    recent = state.get("recent", lambda: x.new_zeros((*x.shape[:-2], count, x.shape[-1])))
    tokens = torch.cat((recent, x), -2)
    recent.copy_(tokens[..., x.shape[-2] :, :])
    if ids is None:
        return tokens, None
    last = state.get("documents", lambda: ids.new_zeros((ids.shape[0], count)))
    documents = torch.cat((last, ids), -1)
    last.copy_(documents[..., ids.shape[-1] :])
    return tokens, documents
