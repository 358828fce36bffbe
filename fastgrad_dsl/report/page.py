"""The report as one HTML page: a view of the JSON that opens offline, and is complete without its script."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from markupsafe import Markup
from msgspec.structs import asdict

from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_dsl.documents.report import Report, Spec
from fastgrad_dsl.report import figures, words
from fastgrad_dsl.report.columns import COLUMNS, GROUPS, attention_rows, column_labels, weight_rows
from fastgrad_dsl.report.entries import calibration_of
from fastgrad_grammar import quote

if TYPE_CHECKING:
    from jinja2 import Template

FEW_HEADS = 16  # rows of heads that are shown from the start
FOLDER = Path(__file__).parent
PASSES: tuple[Literal["forward", "total"], ...] = ("forward", "total")


def render_html(report: Report) -> str:
    """The page of a report; deterministic."""
    heads = _heads(report)
    shown = {name: Markup((FOLDER / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return _template().render(
        report=report,
        uses=[(what, of(report.headline, what)) for what in WHATS],
        groups=GROUPS,
        columns=COLUMNS,
        labels=column_labels(),
        rows=attention_rows(report),
        weights=weight_rows(report),
        remarks=_remarks(report.spec),
        waterfalls=[
            (what, figures.waterfall(what, each), each.basis)
            for what in WHATS
            if (each := of(report.waterfall, what)).steps
        ],
        heads=heads,
        head_data=[head._asdict() for head in heads],
        memory=None if report.memory is None else figures.memory(report.memory),
        curves=[
            figures.curve(place, document, next((h.path for h in heads if h.curve == place), None))
            for place, document in enumerate(report.curves)
        ],
        candidates=[
            (document, [figures.pareto(place, what, document) for what in WHATS])
            for place, document in enumerate(report.candidates)
        ],
        costs=[
            (document, [figures.cost(place, what, document) for what in PASSES])
            for place, document in enumerate(report.costs)
        ],
        shows_heads=sum(len(entry.per_head or ()) for entry in report.attentions) <= FEW_HEADS,
        served={
            file: words.folded([e.path for e in report.attentions if file in e.code]) for file in report.code
        },
        versions=asdict(report.versions),
        words=words,
        **shown,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=lambda value: quote.html(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["hash"] = source_hash
    environment.filters["path"] = _path
    return environment.get_template("page.html.j2")


def _path(text: str) -> Markup:
    """A path, whose line may be broken after a dot or an underscore."""
    return quote.html(text).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def source_hash(text: str) -> str:
    """The source of a content security policy that allows an element with this very text."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _remarks(spec: Spec) -> dict[int, list[str]]:
    """The remarks by line; 0 holds those of a spec whose text is not known."""
    remarks: dict[int, list[str]] = {}
    for remark in spec.remarks:
        line = remark.line if spec.lines is not None else 0
        remarks.setdefault(line, []).append(remark.text)
    return remarks


class _Shown(NamedTuple):
    """What the menu of heads offers."""

    label: str
    curve: int
    path: str
    text: str


def _heads(report: Report) -> list[_Shown]:
    """Label, curve, the histogram's path and a sentence for each head; empty without a calibration."""
    found = []
    for entry in report.attentions:
        calibration = calibration_of(entry, report.calibration)
        if entry.curve is None or calibration is None:
            continue
        rows = {row.head: row for row in entry.per_head or ()}
        for head in calibration.heads:
            row = rows.get(head.head)
            if row is None:
                continue  # of another group of heads
            found.append(
                _Shown(
                    f"{entry.path}, head {head.head}",
                    entry.curve,
                    figures.histogram_path(head.histogram, report.curves[entry.curve].range),
                    f"logits from {words.number(row.least)} to {words.number(row.largest)} (measured); "
                    f"{words.percent(row.outside)} beyond the range"
                    if row.outside is not None
                    else "",
                )
            )
    return found
