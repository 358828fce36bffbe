"""Stretches of rotary positions: how many times longer each pair takes for a turn, so that a model reads longer texts.

The numbers of `rope_llama3` and `rope_yarn` in the language, for the `stretch` of `rotary`. Pair i of d/2 turns by
base^(-2 i / d) at each place, so that it makes context * base^(-2 i / d) / (2 pi) turns in a text of `context` tokens.
Pairs of many turns tell close tokens apart and stay as they are; those of few are stretched by the factor.
"""

from __future__ import annotations

import math


def llama3(
    width: int, base: float, factor: float, context: int, low: float, high: float
) -> tuple[float, ...]:
    """Llama 3.1's: pairs of at most `low` turns are stretched by the factor, those of at least `high` are not.

    Between them the speed, not the stretch, is interpolated by the number of turns. `low` is below `high`.
    """
    found = []
    for pair in range(width // 2):
        turns = context * base ** (-2 * pair / width) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(found)


def yarn(
    width: int, base: float, factor: float, context: int, fast: float, slow: float, whole: bool
) -> tuple[float, ...]:
    """YaRN's (arXiv 2309.00071, section 3.2): the speed is interpolated by the number of the pair.

    Pairs up to the one that makes `fast` turns are not stretched, those from the one that makes `slow` turns are
    stretched by the factor; `whole`: both numbers are rounded, outwards. `base` is above 1, `slow` at most `fast`.
    """

    def pair_of(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(fast), pair_of(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 0.001
    found = []
    for pair in range(width // 2):
        stretched = min(max((pair - first) / span, 0.0), 1.0)
        found.append(1.0 / (stretched / factor + 1.0 - stretched))
    return tuple(found)
