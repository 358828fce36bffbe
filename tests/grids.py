"""What of a wide grid `make test` runs; `make test-all` runs the whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def wide(values: Iterable[Any], *, few: Collection[Any]) -> list[Any]:
    """The values for `parametrize`, all but the few marked slow; a tuple is a value for each of several arguments."""
    known = list(values)
    assert all(each in known for each in few), "the few are some of all"
    return [value if value in few else _slow(value) for value in known]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
