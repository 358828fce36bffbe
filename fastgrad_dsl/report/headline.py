"""The headline: how much of the budget is used, in numbers and in words, and the budget's way through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgrad_compiler.approximation.elementary import added
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.entries import Entry
from fastgrad_dsl.report.errors import calibrated_estimates
from fastgrad_dsl.report.words import number, percent, sample, verified_on

WHATS = ("output", "gradient")
EFFECTS = "how far the model moves when this attention alone is made exact"
CALIBRATED = "what the calibration expects of each attention"
CERTIFICATES = "certificates added up, every gain taken as 1"
FACTORS = {
    "output": ("output_of_value_range", "output_rounding_of_largest_value"),
    "gradient": ("score_gradient_of_omega", "score_rounding_of_products"),
}  # in a plan's `certificate`: what is added up


def headline(
    plan: Mapping[str, Any],
    whole: Mapping[str, Any],
    batch: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
    prediction: Any,
) -> dict[str, Any]:
    """`verdict`, the use of the budget by output and gradient, and the prediction of time and memory.

    What was measured says on how many batches and tokens: it holds there, and nowhere else.
    """
    use = {what: _use(what, plan, whole, batch, calibration) for what in WHATS}
    return {"verdict": _verdict(plan, use), **use, "prediction": prediction}


def summary(plan: Mapping[str, Any], whole: Mapping[str, Any], batch: Mapping[str, Any] | None) -> list[str]:
    """Errors of the whole against the budget, and the two losses; empty where nothing was measured."""
    budget = plan["budget"] or {}
    lines = []
    for what in WHATS:
        measured, estimate, limit = whole[what]["measured"], whole[what]["estimate"], budget.get(what)
        if measured is None or estimate is None or batch is None:
            return []
        kept = "kept" if limit is None or measured <= limit else "EXCEEDED"
        verdict = "" if limit is None else f"; budget {limit:g}: {kept} on {_sample(batch)}"
        lines.append(f"{what} error {measured:.2e} (measured), {estimate:.2e} (estimate){verdict}")
    if whole["loss"] is not None and whole["exact_loss"] is not None:
        lines.append(
            f"loss {whole['loss']:.5f} compiled, {whole['exact_loss']:.5f} exact, same weights and batch (measured)"
        )
    return lines


def waterfall(
    plan: Mapping[str, Any],
    attentions: Sequence[Mapping[str, Any]],
    whole: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """For output and gradient: each attention's part, from `start` to `end`, beside the limit and the whole.

    The parts are estimates: effects on the batch, what a calibration expects, else certificates with gains taken as 1.
    """
    return {what: _waterfall(what, plan, attentions, whole, calibration) for what in WHATS}


def _sample(batch: Mapping[str, Any]) -> str:
    return sample(batch["batches"], batch["tokens"])


def _use(
    what: str,
    plan: Mapping[str, Any],
    whole: Mapping[str, Any],
    batch: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The error by the best that is known: measured here or by the calibration, estimated, added up from proofs."""
    limit = (plan["budget"] or {}).get(what)
    verified = calibration if calibration and calibration["verification"] else None
    known = (
        (whole[what]["measured"] if batch else None, "measured", f"on {_sample(batch)}" if batch else None),
        (
            verified["verification"].get(what) if verified else None,
            "measured",
            f"by the calibration, on {verified_on(verified)}" if verified else None,
        ),
        (whole[what]["estimate"], "estimate", "of the plan, from the calibration"),
        (_added_up(what, plan["attentions"]), "estimate", CERTIFICATES),
    )
    value, kind, basis = next((k for k in known if k[0] is not None), (None, None, None))
    if not any(map(is_approximated, plan["attentions"])):
        value, kind, basis = 0.0, "bound", "nothing is approximated"
    share = value / limit if value is not None and limit else None
    use = {"limit": limit, "value": value, "kind": kind, "basis": basis, "share": share}
    return {**use, "words": _words(use)}


def _added_up(what: str, entries: Sequence[Entry]) -> float | None:
    factors = [_factor(e["certificate"], what) for e in entries if is_approximated(e) and e["certificate"]]
    known = [factor for factor in factors if factor is not None]
    return added(known) if factors and len(known) == len(factors) else None


def _factor(found: Mapping[str, Any], what: str) -> float | None:
    """Of one certificate, with rounding; None where it is infinite or there is none."""
    terms = [found.get(name) for name in FACTORS[what]]
    return None if None in terms else added(float(str(term)) for term in terms)


def _verdict(plan: Mapping[str, Any], use: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`state`: exact, unlimited, kept, missed, likely, unlikely or open; and `text`."""
    if not any(map(is_approximated, plan["attentions"])):
        own = any(entry["decision"] == "polynomial" for entry in plan["attentions"])
        every = "runs as the file defines it" if own else "is exact"
        why = f"every attention {every}" if plan["attentions"] else "no attentions"
        return {"state": "exact", "text": f"Nothing is approximated: {why}."}
    limited = {what: each for what, each in use.items() if each["limit"] is not None}
    if not limited:
        return {"state": "unlimited", "text": "The file sets no budget, so that none can be missed."}
    unknown = [what for what, each in limited.items() if each["share"] is None]
    if unknown:
        return {
            "state": "open",
            "text": f"Open: nothing is known yet of the error of the {' and '.join(unknown)}.",
        }
    over = {what: each for what, each in limited.items() if each["share"] > 1}
    shown = over or limited
    said = ", ".join(
        f"{what} {number(each['value'])} of {each['limit']:g} ({each['kind']})"
        for what, each in shown.items()
    )
    if all(each["kind"] == "measured" for each in shown.values()):
        state, words = ("missed", "is missed") if over else ("kept", "is kept")
        basis = next(iter(shown.values()))["basis"]
        return {"state": state, "text": f"The budget {words}, measured {basis}: {said}."}
    proved = any(each["basis"] == CERTIFICATES for each in shown.values())
    state, words = {
        (False, False): ("likely", "The plan is expected to keep the budget: {}."),
        (True, False): ("unlikely", "The plan is expected to miss the budget: {}."),
        (False, True): ("likely", "Worst cases added up stay within the budget: {}. Nothing was measured."),
        (True, True): (
            "open",
            "Open: worst cases added up exceed the budget: {}. What a batch measures decides.",
        ),
    }[bool(over), proved]
    return {"state": state, "text": words.format(said)}


def _waterfall(
    what: str,
    plan: Mapping[str, Any],
    attentions: Sequence[Mapping[str, Any]],
    whole: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    approximated = [entry for entry in attentions if is_approximated(entry)]
    if whole[what]["measured"] is not None:
        basis, parts = EFFECTS, [(entry["path"], entry["errors"][what]["estimate"]) for entry in approximated]
    elif calibration is not None:
        estimates = ((each["path"], calibrated_estimates(each)) for each in calibration["attentions"])
        basis, parts = CALIBRATED, [(path, found[what]) for path, found in estimates if found.get(what)]
    else:
        certificates = ((entry["path"], entry["certificate"] or {}) for entry in approximated)
        basis, parts = CERTIFICATES, [(path, _factor(found, what)) for path, found in certificates]
    steps, total = [], 0.0
    for path, part in parts:
        if part is not None:
            steps.append({"path": path, "value": part, "start": total, "end": total + part})
            total += part
    return {
        "kind": "estimate",
        "basis": basis,
        "limit": (plan["budget"] or {}).get(what),
        "steps": steps,
        "total": total,
        "measured": whole[what]["measured"],
    }


def _words(each: Mapping[str, Any]) -> str:
    """One use of the budget in words: `12 % of the budget used: 0.012 of 0.1 (measured on ...)`."""
    if each["value"] is None:
        return "not known"
    said = f"({each['kind']}, {each['basis']})"
    if each["share"] is None:
        return f"{number(each['value'])} {said}; no limit is set"
    used_up = f"{percent(each['share'])} of the budget used: {number(each['value'])} of {each['limit']:g}"
    return f"{used_up} {said}"
