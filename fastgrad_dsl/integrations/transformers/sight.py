"""What the queries of a call see, read from the masks that Transformers makes.

A mask that is made for "fastgrad" stays a description (`Description`): nothing of the size of n x n is made unless
exact attention needs it. What is not recognised becomes the mask that SDPA takes, and exact attention serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

MaskFunction: TypeAlias = Callable[..., Any]

_MASKS = "transformers.masking_utils"
_CAUSAL = f"{_MASKS}.causal_mask_function"
_PACKED = f"{_MASKS}.packed_sequence_mask_function.<locals>.inner_mask"
_WINDOW = f"{_MASKS}.sliding_window_overlay.<locals>.inner_mask"
_BOTH = f"{_MASKS}.and_masks.<locals>.and_mask"


@dataclass(frozen=True)
class Seen:
    """A query sees the keys up to its own place (`causal`), where `padding` bool [b, m] is true, of its own document.

    documents: int [b, n], as runs of equal ids.
    """

    causal: bool = False
    padding: Tensor | None = None
    documents: Tensor | None = None

    @property
    def everyone_alike(self) -> bool:
        """Whether all queries of a sequence see the same keys."""
        return not self.causal and self.documents is None


@dataclass(frozen=True)
class Description:
    """A mask of a causal model: what queries see, and what it was made of; `dense()` makes it [b, 1, n, m]."""

    seen: Seen
    arguments: Mapping[str, Any]
    made: list[Tensor | None] = field(default_factory=list)

    def dense(self) -> Tensor | None:
        """The mask as SDPA takes it, made once; None: it has to be told that it is causal."""
        if not self.made:
            self.made.append(_sdpa_mask(**self.arguments))
        return self.made[0]


def describe(**arguments: Any) -> Description | Tensor | None:
    """What stands in Transformers' registry of masks: its arguments, for sizes, padding and the function of a mask.

    A mask that cannot be served, or that generation makes beforehand for a static cache, is that of SDPA. None: queries
    see the keys up to their own place, or one query sees all, as SDPA has it.
    """
    queries, keys = len(arguments["cache_position"]), arguments["kv_length"]
    padding = arguments.get("attention_mask")
    function = arguments["mask_function"]
    documents = _documents(function)
    whole = queries == keys and not arguments.get("kv_offset")
    whole = whole and (padding is None or padding.shape[-1] == keys)
    packed = any(_name(part) == _PACKED for part in _parts(function))
    ahead = not (packed or arguments.get("allow_is_causal_skip", True))
    if not whole or ahead or not _is_known(function, keys):
        dense: Tensor | None = _sdpa_mask(**arguments)
        return dense
    if padding is not None and bool(padding.all()):
        padding = None
    if padding is None and documents is None:
        return None
    return Description(Seen(True, padding, documents), arguments)


def _sdpa_mask(**arguments: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**arguments)


def _is_known(function: MaskFunction, keys: int) -> bool:
    """Whether a mask's function is that of a causal mask, with or without packed documents.

    The functions of Transformers are closures; they are told by their names and what they hold.
    """
    known = [_name(part) for part in _parts(function) if not _is_wide(part, keys)]
    return known.count(_CAUSAL) >= 1 and known.count(_PACKED) <= 1 and {*known} <= {_CAUSAL, _PACKED}


def _documents(function: MaskFunction) -> Tensor | None:
    """The ids of packed documents, int [b, n], of a mask's function; None where there is one document."""
    for part in _parts(function):
        if _name(part) == _PACKED:
            ids: Tensor = _held(part)["packed_sequence_mask"]
            return ids if bool((ids != ids[:, :1]).any()) else None
    return None


def _is_wide(part: MaskFunction, keys: int) -> bool:
    """Whether it is a window that hides none of the keys."""
    return _name(part) == _WINDOW and bool(_held(part)["sliding_window"] >= keys)


def _name(function: MaskFunction) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def _parts(function: MaskFunction) -> Iterator[MaskFunction]:
    """The functions of which one is the intersection."""
    if _name(function) == _BOTH:
        for each in _held(function)["mask_functions"]:
            yield from _parts(each)
    else:
        yield function


def _held(function: MaskFunction) -> dict[str, Any]:
    """What a closure holds, by name."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def seen_by(mask: Tensor | Description | None, queries: int, keys: int, causal: bool) -> tuple[Seen, str]:
    """What the queries of a call see, and why that is not known, empty where it is."""
    if isinstance(mask, Description):
        return mask.seen, ""
    if queries != keys:
        return (
            Seen(),
            "new tokens after those of a cache" if causal or mask is not None else "cross-attention",
        )
    if mask is None:
        return Seen(causal and queries > 1), ""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return Seen(), "a mask of another kind"
    padding = _row(mask)
    return (
        (Seen(), "a mask that differs by query or head") if padding is None else (Seen(padding=padding), "")
    )


def _row(mask: Tensor) -> Tensor | None:
    """bool [b, m] of a mask [b, 1, 1 or n, m] whose rows are alike and hide a key or not; else None."""
    first = mask[:, :1, :1]
    alike = all(mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (1, 2))
    if not alike and not torch.equal(mask, first.expand_as(mask)):
        return None
    row = first[:, 0, 0]
    if row.dtype == torch.bool:
        return row
    shown, hidden = row == 0, row <= torch.finfo(row.dtype).min / 2
    return shown if bool((shown | hidden).all()) else None
