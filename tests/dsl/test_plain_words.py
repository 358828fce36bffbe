"""What reports say is true and plain: no line contradicts another, and what is 0 or unknown is called so."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch

import fastgrad_dsl as fg
from fastgrad_dsl.commands.terminal import print_report
from fastgrad_dsl.documents.report import Report, ServedPace
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.report.words import as_exact, counted, pace
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import INPUTS, NAMES, always_polynomial, small
from tests.dsl.schemas import validator

WAYS = ("planned", "calibrated", "unverified", "measured", "measured and calibrated")
CASES = [
    (name, way) for name in NAMES for way in WAYS if "measured" not in way or name in ("bounded", "based")
]
JARGON = ("flops", "keys more", "in the time of one", "pace", "inf", "nan", "None")


@cache
def report(name: str, way: str) -> Report:
    """A report of a small example, by what was done before it."""
    compiled = small(name)
    calibration = calibration_of(compiled.plan_document) if "calibrated" in way else None
    if way == "unverified":
        calibration = calibration_of(compiled.plan_document, verification=None)
    if "measured" in way:
        model = always_polynomial(compiled, compiled.module(dtype=torch.float64))
        return compiled.report(model, INPUTS[name], calibration=calibration)
    return compiled.report(calibration=calibration)


def printed(found: Report, *, wide: bool = False) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        print_report(found, wide=wide)
    return out.getvalue()


def words_of(page: str) -> str:
    """The texts of a page, without spec and code."""
    page = re.sub(r"<(pre|script|style|desc)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


@cache
def texts(name: str, way: str) -> tuple[str, str, str]:
    """What is read of a report: the terminal's text, all of it, and the page's."""
    found = report(name, way)
    return printed(found), printed(found, wide=True), words_of(render_html(found))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_line_contradicts_another(name: str, way: str) -> None:
    found = report(name, way)
    for said in texts(name, way):
        lower = said.lower()
        if "before any data" in lower or "nothing was measured" in lower:
            assert "measured on" not in lower
            assert "held out" not in lower
        if "no model was run" in lower:
            assert found["batch"] is None
            if found["calibration"] is not None:
                assert "before any data" not in lower
                assert "those of the calibration" in lower
        if "every attention is exact" in lower:
            assert all(entry["decision"] == "exact" for entry in found["attentions"])
        assert "bounds only" not in lower
    assert "on this batch" not in texts(name, way)[0] or found["batch"] is not None


@pytest.mark.parametrize(("name", "way"), CASES)
def test_what_the_legend_explains_is_in_the_table(name: str, way: str) -> None:
    """A kind of number that is explained has a column, and each column has numbers in it."""
    found = report(name, way)
    for said in texts(name, way)[:2]:
        for kind in ("measured", "estimate", "bound"):
            explained = (
                f"{kind}: " in said.split("relative L2 errors")[-1] if "relative L2 errors" in said else False
            )
            known = [
                entry["errors"][what][kind]
                for entry in found["attentions"]
                for what in ("output", "gradient")
                if entry["decision"] == "polynomial" and entry["family"] != "own"
            ]
            if explained:
                assert any(value is not None for value in known)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_words_are_plain(name: str, way: str) -> None:
    for said in texts(name, way):
        used = [word for word in JARGON if re.search(rf"\b{word}\b", said)]
        assert used == (["pace"] if "By the calibration, at the" in said else [])


def test_a_pace_is_told_in_words() -> None:
    found = ServedPace(target="cpp", kind="measured", speed=2.12, keys=106)
    assert pace(found) == (
        "Other times are computed from operation counts: a polynomial runs at 2.1 times the arithmetic rate of exact "
        "attention, which reaches half of its full speed at 106 tokens (estimate; rates measured on this machine)."
    )
    assert pace(ServedPace(target="torch", kind="default", speed=1.0, keys=0)) == (
        "Other times are computed from operation counts: a polynomial runs at the arithmetic rate of exact attention "
        "(estimate; rates usual for target torch)."
    )


def test_one_is_one() -> None:
    assert (counted(1, "token"), counted(2048, "token")) == ("1 token", "2,048 tokens")
    assert (as_exact(1.0), as_exact(31.4), as_exact(0.5)) == (
        "as fast as exact", "31 times as fast as exact", "0.5 times as fast as exact",
    )  # fmt: skip


def test_an_exact_gradient_of_zero_has_no_relative_error() -> None:
    """Of one token, softmax is 1 whatever the logits are: dq and dk are 0, and what is measured of them is rounding."""
    compiled = small("spelled_out")
    model = always_polynomial(compiled, compiled.module(dtype=torch.float64))
    found = compiled.report(model, [INPUTS["spelled_out"][0][:, :1]] * 2)
    validator("report.json").validate(json.loads(to_json(found)))
    for entry in found["attentions"]:
        assert entry["exact_zero"] == ["dq", "dk"]
        for what in ("dq", "dk"):
            assert entry["errors"][what] == {"bound": None, "estimate": None, "measured": None}
        assert entry["errors"]["gradient"]["measured"] == entry["errors"]["dv"]["measured"] < 1e-3
    said = printed(found)
    assert "the exact dq and dk are 0 on this batch" in said
    assert not re.search(r"\binf\b|e\+\d\d", said)
    assert words_of(render_html(found)).count("exact is 0") == 4 * len(found["attentions"])


def test_a_gradient_that_is_not_zero_is_compared() -> None:
    for entry in report("bounded", "measured")["attentions"]:
        assert entry["exact_zero"] == []
        assert all(entry["errors"][what]["measured"] > 0 for what in ("dq", "dk", "dv"))


def test_no_gradient_at_all_is_said_to_be_zero() -> None:
    """An objective that ignores the output: all gradients are 0."""
    text = (
        "use std\ndim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n"
        "    return std.attention(x; heads = 2, qk_dim = 4, gain = 1.0) * 0.0\n}\n"
        'budget {\n    at "*" degree = 2\n}\n'
    )
    compiled = fg.compile(text, target="torch")
    model = always_polynomial(compiled, compiled.module(dtype=torch.float64))
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (entry,) = compiled.report(model, [x])["attentions"]
    assert entry["exact_zero"] == ["dq", "dk", "dv", "gradient"]
