"""Packed documents: several texts in one sequence, which do not see each other.

A document is a run of equal ids. Two tokens are of one document where no boundary lies between them, so that what a
query sees is a range of keys, and a running state need only be reset where a document begins.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_runs(ids: Tensor) -> Tensor:
    """int64 [b, n]: how many boundaries lie before each token; ids [b, n] of any integer dtype."""
    return _begins(ids).cumsum(1)


def document_ranges(runs: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [b, n] twice: the first token of each token's document, and the one after its last."""
    n = runs.shape[1]
    begins = _begins(runs)
    place = torch.arange(n, device=runs.device)
    first = torch.where(begins, place, 0).cummax(1).values
    behind = torch.where(begins.roll(-1, 1), place + 1, n)  # of the last token of each document
    return first, behind.flip(1).cummin(1).values.flip(1)


def of_document(runs: Tensor, first: int, last: int, token: int) -> Tensor:
    """bool [b, last - first]: which of the tokens [first, last) are of the document of `token`; runs [b, n]."""
    return runs[:, first:last] == runs[:, token, None]


def same_document(runs: Tensor, queries: slice, keys: slice) -> Tensor:
    """bool [b, 1, 1, queries, keys]: which pairs are of one document."""
    return (runs[:, queries, None] == runs[:, None, keys])[:, None, None]


def keep_document(state: Tensor, runs: Tensor, old: int, new: int) -> None:
    """Zero a state [b * h, ..] of the document of token `old` where token `new` is of another; runs [b, n]."""
    state.view(runs.shape[0], -1).masked_fill_(runs[:, old, None] != runs[:, new, None], 0.0)


def select_tokens(tokens: Tensor, selected: Tensor, out: Tensor) -> Tensor:
    """tokens (b * h, G * t, width), and 0 where `selected` [b, t] is False; `out` may be `tokens` itself."""
    b, t = selected.shape
    shape = (b, -1, t, tokens.shape[-1])
    if out is not tokens:
        out.copy_(tokens)
    out.view(shape).masked_fill_(~selected[:, None, :, None], 0.0)
    return out


def select_columns(gradient: Tensor, selected: Tensor) -> Tensor:
    """gradient (b * h, width, G * t), with 0 in place where `selected` [b, t] is False: there 0 met an overflow."""
    b, t = selected.shape
    gradient.unflatten(0, (b, -1)).unflatten(-1, (-1, t)).masked_fill_(~selected[:, None, None, None], 0.0)
    return gradient


def _begins(ids: Tensor) -> Tensor:
    """bool [b, n]: a document begins here; not at the first token, before which there is none."""
    begins = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    torch.ne(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    return begins
