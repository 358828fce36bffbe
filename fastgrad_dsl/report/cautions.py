"""What a reader of the report must know before trusting a number: warnings; and notes on how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgrad_compiler.attention.table import OWN
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.errors import LOCAL
from fastgrad_dsl.report.words import VACUOUS, folded

if TYPE_CHECKING:
    from fastgrad_dsl.api.measure import ModelErrors

Attentions = Sequence[Mapping[str, Any]]
Warned = tuple[str, str, list[str]]  # kind, text, paths
TRUSTED = {
    "data": "R is measured on data, with a margin",
    "asserted": "R rests on assume_bound, the file's word",
}


def warnings(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`kind`, `text` and the paths of the `attentions` concerned, the gravest first."""
    found = (
        *_budget(document["headline"]),
        *_broken(document["attentions"]),
        *_ranges(document["attentions"], document["budget"]),
        *_vacuous(document["attentions"]),
        *_unbounded(document["attentions"], document["calibration"] is not None),
        *_batch(document["batch"], document["attentions"]),
        *_calibration(document["calibration"]),
    )
    return [{"kind": kind, "text": text, "attentions": paths} for kind, text, paths in found]


def notes(plan: Mapping[str, Any], errors: ModelErrors | None, undeclared: Sequence[str]) -> list[str]:
    """Remarks on what the numbers are."""
    entries = plan["attentions"]
    found = []
    if any(entry["family"] == OWN for entry in entries):
        found.append(
            "weights that are the model's own polynomial stand in for nothing: their error is 0, without a bound of the"
            " logits"
        )
    if any(map(is_approximated, entries)):
        found.append(
            "no useful bound is proved through several layers: of the whole model's errors there are estimates and "
            "measurements only"
        )
    if undeclared:
        found.append(
            f"the file declares no longest {' or '.join(undeclared)}: time and memory are predicted at 65,536"
        )
    zero = [e.path for e in errors.attentions if e.local["dq"].exact_is_zero] if errors is not None else []
    if zero:
        found.append(
            f"{folded(zero)}: the exact dq and dk are 0 on this batch, so that no error is relative to them"
        )
    if errors is not None and errors.loss is None:
        found.append(
            "the file has no objective: gradients are those of a fixed random projection of the output"
        )
    return found


def _budget(headline: Mapping[str, Any]) -> Iterator[Warned]:
    if headline["verdict"]["state"] in ("missed", "unlikely"):
        yield "budget", headline["verdict"]["text"], []


def _broken(attentions: Attentions) -> Iterator[Warned]:
    broken = [
        entry["path"]
        for entry in attentions
        for values in (entry["errors"][what] for what in LOCAL)
        if None not in (values["measured"], values["bound"]) and values["measured"] > values["bound"]
    ]
    if broken:
        paths = list(dict.fromkeys(broken))
        yield (
            "range",
            f"{folded(paths)}: an error is above its bound, so logits left the range of the plan",
            paths,
        )


def _ranges(attentions: Attentions, budget: Mapping[str, Any] | None) -> Iterator[Warned]:
    policy = (budget or {}).get("on_violation", "warn")
    for source, text in TRUSTED.items():
        served = [e for e in attentions if e["range_source"] == source and e["decision"] == "polynomial"]
        for guarded in (True, False):
            paths = [e["path"] for e in served if e["guarded"] == guarded]
            guard = f"a guard watches it, on_violation = {policy}" if guarded else "nothing watches it"
            if paths:
                yield (
                    source,
                    f"{folded(paths)}: {text}; logits beyond it have unbounded error; {guard}",
                    paths,
                )


def _vacuous(attentions: Attentions) -> Iterator[Warned]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in attentions:
        bounds = {what: entry["errors"][what]["bound"] for what in LOCAL}
        names = tuple(what for what, bound in bounds.items() if bound is not None and bound >= VACUOUS)
        if names:
            groups.setdefault(names, []).append(entry["path"])
    for names, paths in groups.items():
        text = f"{folded(paths)}: the bound of {', '.join(names)} is vacuous (100 % or more): trust what was measured"
        yield "vacuous", text, paths


def _unbounded(attentions: Attentions, calibrated: bool) -> Iterator[Warned]:
    paths = [
        entry["path"]
        for entry in attentions
        if entry["decision"] == "exact"
        and entry["bound"] is None
        and not entry["window"]
        and not entry["alibi"]
        and not calibrated
    ]
    if paths:
        yield "unbounded", f"{folded(paths)}: exact, because nothing bounds the logits", paths


def _batch(batch: Mapping[str, Any] | None, attentions: Attentions) -> Iterator[Warned]:
    if batch is None:
        return
    if str(batch["weights"]).startswith("initial weights"):
        yield "weights", f"measured with {batch['weights']}: trained weights have other logits", []
    if str(batch["kind"]).startswith("random"):
        yield "data", "measured on random inputs: real data have other logits", []
    shortest = min((e["break_even"] for e in attentions if e["break_even"] is not None), default=0)
    longest = max(batch["dims"].values(), default=0)
    if longest < shortest:
        text = f"below {shortest} tokens every attention runs exactly: measure a longer batch (--dim)"
        yield "length", text, []


def _calibration(calibration: Mapping[str, Any] | None) -> Iterator[Warned]:
    if calibration is None:
        return
    if str(calibration["weights"]).startswith("initial weights"):
        yield "calibration", f"calibrated with {calibration['weights']}: calibrate again after training", []
    if str(calibration["data"]).startswith("random"):
        yield "calibration", "calibrated on random inputs: estimates hold for those", []
