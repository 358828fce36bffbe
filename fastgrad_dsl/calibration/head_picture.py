"""One picture of a model's heads, layers by heads, coloured by the cheapest form that is within a limit."""

from __future__ import annotations

from fastgrad_dsl.calibration.heads import HeadForm, HeadFound, Heads
from fastgrad_dsl.plots.svg import COLOURS, element

CELL, GAP, LEFT, TOP, BOTTOM = 22.0, 2.0, 190.0, 30.0, 24.0
EXACT = "#868e96"


def head_picture(heads: Heads) -> str:
    """SVG text: a row for each attention, a column for each head, and a key of the forms."""
    paths = heads.paths
    columns = max((head.head + 1 for head in heads.heads), default=0)
    chosen = {(head.path, head.head): head.best(heads.limit) for head in heads.heads}
    names = sorted({str(form) for form in chosen.values()} - {"exact"})
    colours = {"exact": EXACT} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, height = LEFT + CELL * max(columns, 8) + 10, TOP + CELL * len(paths) + BOTTOM * (len(colours) + 1)
    parts = [_title(heads)]
    for row, path in enumerate(paths):
        y = TOP + row * CELL
        parts.append(_text(LEFT - 8, y + CELL * 0.65, path[-26:], "end"))
        for head in heads.heads:
            if head.path == path:
                parts.append(_cell(head, chosen[path, head.head], colours, y))
    for place, (name, colour) in enumerate(colours.items()):
        y = TOP + CELL * len(paths) + BOTTOM * (place + 0.5)
        square = '<rect x="{}" y="{}" width="12" height="12" fill="{}"/>'
        parts += [element(square, LEFT, y, colour), _text(LEFT + 20, y + 10, name, "start")]
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" font-family="sans-serif"'
        ' font-size="12">'
    )
    return str(element(opening, width, height)) + "".join(parts) + "</svg>\n"


def _title(heads: Heads) -> str:
    words = (
        f"The cheapest form of each head with an error of at most {heads.limit:.3g}, {heads.tokens} tokens"
    )
    return element("<title>{}</title>", words) + _text(10, 18, words, "start")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return str(element('<text x="{}" y="{}" text-anchor="{}">{}</text>', x, y, anchor, words))


def _cell(head: HeadFound, form: HeadForm, colours: dict[str, str], y: float) -> str:
    logits = f"logits {head.least:.3g} to {head.largest:.3g}"
    words = f"{head.path}, head {head.head}: {form}, error {form.error:.2g}, {logits}"
    template = '<rect x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}</title></rect>'
    size = CELL - GAP
    return str(element(template, LEFT + head.head * CELL, y, size, size, colours[str(form)], words))
