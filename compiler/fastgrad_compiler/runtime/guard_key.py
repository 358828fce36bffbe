"""The key of a guard: one string that is unique across processes and says what is watched, and what is done.

The operation of an attention is given the key as a constant, and a compiled or exported program keeps it. Where a
process has no guard of that id, as one that loaded such a program, the key is enough to make it again.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any

POLICIES = ("warn", "exact", "clamp", "raise")
PREFIX = "fastgrad-guard-1:"
ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class GuardKey:
    """What identifies a guard, and all that its work depends on.

    Args:
        id: 32 hexadecimal digits, drawn anew for every guard and for every copy of one.
        bound: R, finite and at least 0: one number or one a head.
        source: where R comes from: weights, data or asserted.
        policy: what happens where a logit is beyond R: warn, exact, clamp or raise.
        label: the attention's name below its block's path; empty where it is the block's only one.
        path: of the attention in the model.

    Raises:
        ValueError: a field that cannot be such a thing.
    """

    id: str
    bound: float | tuple[float, ...]
    source: str
    policy: str
    label: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"the policy of a guard is one of {', '.join(POLICIES)}, not {self.policy!r}")
        if not (isinstance(self.id, str) and ID.fullmatch(self.id)):
            raise ValueError(f"the id of a guard has 32 hexadecimal digits: not {self.id!r}")
        if not all(isinstance(text, str) for text in (self.source, self.label, self.path)):
            raise ValueError("the source, the label and the path of a guard are texts")
        if not self.bounds or not all(map(_is_range, self.bounds)):
            raise ValueError(f"the range of a guard is a finite number of at least 0: not {self.bound!r}")

    @property
    def bounds(self) -> tuple[float, ...]:
        """R as a tuple, of one number or of one a head."""
        return self.bound if isinstance(self.bound, tuple) else (self.bound,)

    def another(self) -> GuardKey:
        """The same with an id of its own."""
        return replace(self, id=new_id())

    def __str__(self) -> str:
        return PREFIX + json.dumps(asdict(self))


def new_id() -> str:
    """An id that no other guard of any process has."""
    return uuid.uuid4().hex


@lru_cache(maxsize=4096)
def read_key(text: str) -> GuardKey:
    """The key that a text is; ValueError where it is none."""
    try:
        if not text.startswith(PREFIX):
            raise ValueError(f"it does not begin with {PREFIX}")
        fields: dict[str, Any] = json.loads(text.removeprefix(PREFIX))
        if isinstance(bound := fields["bound"], list):
            fields["bound"] = tuple(bound)
        return GuardKey(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{text!r} is not the key of a guard: {error}") from None


def _is_range(bound: object) -> bool:
    return isinstance(bound, int | float) and not isinstance(bound, bool) and isfinite(bound) and bound >= 0
