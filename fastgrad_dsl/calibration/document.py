"""What calibration measured and what the planner made of it, as a document."""

from __future__ import annotations

from fastgrad_dsl.calibration.calibrate import Attention, Calibration
from fastgrad_dsl.calibration.plan import Plan, Serving, ways_of
from fastgrad_dsl.documents import calibration as documents
from fastgrad_dsl.documents.base import picked
from fastgrad_dsl.documents.form import format_of


def calibration_document(
    calibration: Calibration, plan: Plan, verification: documents.Verification
) -> documents.Calibration:
    """The document (docs/calibration.md gives its fields)."""
    pairs = zip(calibration.attentions, plan.ways, strict=True)
    return picked(
        documents.Calibration,
        calibration.used,
        format=format_of(documents.Calibration),
        trust="certified" if calibration.certified else "calibrated",
        pace=calibration.pace.document,
        attentions=tuple(_attention(each, way, calibration) for each, way in pairs),
        planned=plan.planned,
        verification=verification,
    )


def _attention(each: Attention, taken: Serving, calibration: Calibration) -> documents.CalibratedAttention:
    return documents.CalibratedAttention(
        path=each.entry.path,
        full_path=each.entry.full_path,
        obstacle=each.obstacle or None,
        heads=_heads(each),
        gains=each.gains,
        candidates=tuple(
            _candidate(way, way.parts == taken.parts, each, calibration.certified)
            for way in ways_of(each, calibration)
        ),
    )


def _heads(each: Attention) -> tuple[documents.HeadLogits, ...]:
    logits = next(iter(each.logits.values()), None)
    if logits is None:
        return ()
    return tuple(
        documents.HeadLogits(
            head=head,
            least=logits.least[head],
            largest=logits.largest[head],
            centred=None if logits.centred is None else logits.centred[head],
            histogram=documents.Histogram(tuple(logits.edges), tuple(logits.counts[head])),
        )
        for head in range(each.heads)
    )


def _candidate(way: Serving, chosen: bool, each: Attention, proved: bool) -> documents.Candidate:
    served = [part.candidate for part in way.parts if part.candidate]
    first = served[0] if served else None
    return documents.Candidate(
        name=_name(way),
        family=first.polynomial.family if first else None,
        degree=max((c.polynomial.degree for c in served), default=None),
        near=first.near if first else None,
        centred=first is not None and _centred(each, first.near),
        bound=max((c.polynomial.bound for c in served), default=None),
        source=each.served[first.near].range.source if first else None,
        seconds=way.option.seconds,
        output=way.option.output,
        gradient=way.option.gradient,
        proved=proved,
        chosen=chosen,
    )


def _centred(each: Attention, near: int | None) -> bool:
    served = each.served[near]
    return served.mean or served.range.centre is not None


def _name(way: Serving) -> str:
    texts = []
    for part in way.parts:
        c = part.candidate
        text = "exact" if c is None else f"{c.polynomial.family} {c.polynomial.degree}"
        if c is not None and c.near is not None:
            text += f", near {c.near}"
        if part.precision == "float64":
            text += ", float64"
        texts.append(text if len(way.parts) == 1 else f"{len(part.heads)} heads {text}")
    return "; ".join(texts)
