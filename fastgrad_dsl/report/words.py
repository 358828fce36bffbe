"""How reports write numbers and lists; one place for the texts in the JSON and for its views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgrad_compiler.attention.value import OWN

if TYPE_CHECKING:  # `check` starts without msgspec
    from fastgrad_compiler.attention.table import AttentionEntry
    from fastgrad_dsl.documents.calibration import Calibration, Verification
    from fastgrad_dsl.documents.plan import Attention
    from fastgrad_dsl.documents.report import Entropy, Report, ServedPace

VACUOUS = 1.0  # a proved relative error of 1 and more says nothing: 0 as an output would do as well
ONE_BATCH = "one batch"  # how a calibration says that nothing was held out
NO_ERROR = "no approximation error at all: every attention runs as the file defines it"
SOURCES = {
    "program": "proved from the program",
    "weights": "proved from the weights",
    "data": "measured on data, with a margin",
    "asserted": "asserted, not proved",
}
"""Where R comes from, in words."""
LARGEST_SHARE = (
    "largest share: the most that one key beyond a near field gets of a row's weight, where a query sees all keys at "
    "the longest lengths (bound)"
)
KEYS_USED = (
    "keys used: e^entropy of a row's weights, the number of keys that it is with equal weights, beside the keys that a "
    "row sees; means on this batch"
)


def number(value: float | None) -> str:
    """Two digits of a float, all of an int; `-` for what is not known."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def bound(value: float | None) -> str:
    """A proved relative error, or that it says nothing."""
    return "vacuous" if value is not None and value >= VACUOUS else number(value)


def percent(share: float) -> str:
    """A share, as in `4.2 %`; what is over 1000 % is written as a multiple."""
    if share >= 10:
        return f"{share:,.0f} times" if share < 1e6 else f"{share:.3g} times"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def of_budget(share: float) -> str:
    """The use of a budget, as in `4.2 % of the budget used` and `31 times the budget used`."""
    return f"{percent(share)} {'the' if share >= 10 else 'of the'} budget used"


def factor(value: float) -> str:
    """A factor, as in `31` and `1.7`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def share(known: float | None) -> str:
    """A share as `percent`; `-` for what is not known."""
    return "-" if known is None else percent(known)


def number_of_keys(count: float | None) -> str:
    """A mean number of keys, as in `7.5` and `1,024`; `-` for what is not known."""
    if count is None:
        return "-"
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def keys_used(found: Entropy | None) -> str:
    """To how many keys with equal weights a row comes."""
    return number_of_keys(found.keys if found else None)


def times(value: float) -> str:
    """A factor, as in `31 times`."""
    return f"{factor(value)} times"


def as_exact(value: float) -> str:
    """How fast beside exact attention, as in `31 times as fast as exact`."""
    return "as fast as exact" if factor(value) == "1" else f"{times(value)} as fast as exact"


def counted(count: int, noun: str) -> str:
    """As in `1 token` and `2,048 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def pace(found: ServedPace) -> str:
    """What predicted times rest on: rates of arithmetic, and where exact attention is slow."""
    where = "measured on this machine" if found.kind == "measured" else f"usual for target {found.target}"
    speed = f"{found.speed:.2g} times " if f"{found.speed:.2g}" != "1" else ""
    slow = f", which reaches half of its full speed at {found.keys:,} tokens" if found.keys else ""
    return (
        f"Other times are computed from operation counts: a polynomial runs at {speed}the arithmetic rate of exact "
        f"attention{slow} (estimate; rates {where})."
    )


def run_on(report: Report) -> str:
    """What the model was run on, or what the numbers rest on where it was not."""
    batch = report.batch
    if batch is not None:
        sizes = ", ".join(f"{name} = {size}" for name, size in batch.dims.items())
        return ", ".join(filter(None, (f"on {batch.kind}", sizes, batch.weights)))
    calibration = report.calibration
    if calibration is None:
        return "no model was run: this is what is known before any data"
    measured = "estimates and measurements" if calibration.verification else "estimates"
    return f"no model was run for this report: {measured} are those of the calibration on {calibration.data}"


def seconds(time: float) -> str:
    """Seconds, as in `0.12 s` and `2,614 s`."""
    return f"{time:,.0f} s" if time >= 100 else f"{time:.2g} s"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def sample(batches: int, tokens: int) -> str:
    """What was measured on, as in `one batch of 2,048 tokens` and `3 batches of 6,144 tokens in all`."""
    size = f" of {counted(tokens, 'token')}"
    return f"one batch{size}" if batches == 1 else f"{batches} batches{size} in all"


def verified_on(calibration: Calibration, verification: Verification) -> str:
    """What a calibration verified its plan on, as in `one batch of 512 tokens that it held out`."""
    same = ONE_BATCH in calibration.data
    seen = "it planned on" if same else "it held out"
    return f"{sample(verification.batches, verification.tokens)} that {seen}"


def folded(paths: Sequence[str]) -> str:
    """Paths as one: the first, the last and how many."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]} ({len(paths)})"


def decision(entry: Attention) -> str:
    """What an attention of a plan will be, as in `balanced degree 2, near 64`."""
    if entry.decision != "polynomial":
        window = entry.window
        return "exact" if window is None else f"exact, window {window}"
    near = "" if entry.near is None else f", near {entry.near}"
    return f"{family(entry.family)} degree {entry.degree}{near}"


def family(name: str | None) -> str:
    """Whose polynomial it is."""
    return "own polynomial" if name == OWN else str(name)


def decided(entry: AttentionEntry) -> str:
    """What an attention will be, in a few words: `minimax degree 4, rank 70`."""
    polynomial, window = entry.attention.polynomial, entry.attention.mask.window
    if polynomial is None:
        return "exact" if window is None else f"exact, window {window}"
    near = entry.attention.near
    parts = [f"{family(polynomial.family)} degree {polynomial.degree}"]
    parts += [f"rank {entry.rank:,}"] if entry.rank is not None else []
    parts += [f"near {near}"] if near is not None else []
    return ", ".join(parts)
