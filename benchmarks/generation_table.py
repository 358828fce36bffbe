"""The section of docs/performance.md on generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import Columns, Section, heading_of, ratio, table_of

Row = Mapping[str, Any]


def generation(section: Section) -> str:
    """A token after contexts of several lengths, what bounds it, and prompts."""
    rows = [_pair(section["tokens"], key) for key in _keys(section["tokens"], ("batch", "context"))]
    prompts = [_pair(section["prompts"], key) for key in _keys(section["prompts"], ("length",))]
    return "\n".join(
        [
            heading_of("Generation", section),
            "One token of examples/gpt.tfg, and of the same model on softmax with its cache of keys and values; "
            "milliseconds, medians of turns in one process, and the bytes of the state. Lower is better. The states "
            "are filled with random numbers; -: the cache was too large to be measured here.\n",
            table_of(_TOKENS, rows, left=0),
            *(_bound(section, batch) for batch in (1, 16)),
            "The first token of a prompt, in seconds, beside the forward pass of the whole text:\n",
            table_of(_PROMPTS, prompts, left=0),
        ]
    )


def _keys(rows: list[Row], names: tuple[str, ...]) -> list[dict[str, Any]]:
    found = {tuple(row[name] for name in names): None for row in rows}
    return [dict(zip(names, key, strict=True)) for key in found]


def _pair(rows: list[Row], key: dict[str, Any]) -> Row:
    """What both models took."""
    chosen = {row["model"]: row for row in rows if all(row[name] == value for name, value in key.items())}
    return {**key, **chosen}


def _bound(section: Section, batch: int) -> str:
    """What a token takes beside its products with weights, and which share of the memory's pace it reads at."""
    own = [row for row in section["tokens"] if row["model"] == "mixer" and row["batch"] == batch]
    first, last = own[0], own[-1]
    products = next(row["seconds"] for row in section["products"] if row["batch"] == batch)
    pace = (section["weights_bytes"] + first["state_bytes"]) / first["seconds"] / section["bytes_per_second"]
    return (
        f"Batch {batch}: a token after {last['context']:,} takes {last['seconds'] / first['seconds']:.2f} times that "
        f"after {first['context']:,}. It takes {first['seconds'] / products:.1f} times its products with weights alone "
        f"({1e3 * products:.1f} ms), and reads weights and state at {pace:.0%} of the pace at which this machine sums "
        f"up 256 MiB ({section['bytes_per_second'] / 1e9:.0f} GB/s).\n"
    )


def _milliseconds(row: Row) -> str:
    return "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"


def _faster(pair: Row) -> str:
    exact, own = (pair[name]["seconds"] for name in ("softmax", "mixer"))
    return "-" if exact is None or own is None else ratio(exact, own)


def _megabytes(row: Row) -> str:
    return f"{row['state_bytes'] / 1e6:,.1f} MB"


_TOKENS: Columns = (
    ("batch", lambda pair: str(pair["batch"])),
    ("context", lambda pair: f"{pair['context']:,}"),
    ("mixer", lambda pair: _milliseconds(pair["mixer"])),
    ("softmax", lambda pair: _milliseconds(pair["softmax"])),
    ("times faster", _faster),
    ("state of the mixer", lambda pair: _megabytes(pair["mixer"])),
    ("cache of softmax", lambda pair: _megabytes(pair["softmax"])),
)
_PROMPTS: Columns = (
    ("tokens", lambda pair: f"{pair['length']:,}"),
    ("mixer", lambda pair: f"{pair['mixer']['seconds']:.2f}"),
    ("its forward pass", lambda pair: f"{pair['mixer']['forward_seconds']:.2f}"),
    ("softmax", lambda pair: f"{pair['softmax']['seconds']:.2f}"),
    ("its forward pass", lambda pair: f"{pair['softmax']['forward_seconds']:.2f}"),
    ("times faster", _faster),
)
