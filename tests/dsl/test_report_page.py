"""The report's page: a view of the JSON that asks for nothing from elsewhere, and works in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace

import fastgrad_dsl as fg
from fastgrad_dsl.documents.base import Document
from fastgrad_dsl.documents.read import parse_document
from fastgrad_dsl.documents.report import Report
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.report.page import render_html
from tests.dsl.browser import evaluate, find_chromium, load
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import EXAMPLES, INPUTS, NAMES, always_polynomial, small, text

browser = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: CHROMIUM names none, and none is on the path"
)
GPT = EXAMPLES / "bounded.tfg"
PAGES = ("measured", "planned", "exact", "own", "none")
LARGEST = 2_000_000  # characters of a page of 24 layers
ORDER = ("headline", "warnings", "spec", "table", "plots", "derivations", "code", "reproduce")


@cache
def report(name: str) -> Report:
    """Reports that differ in what is known."""
    if name == "exact":
        return fg.compile(text("return softmax(x @ x.T) @ x")).report()
    if name == "none":
        return fg.compile(text("return x")).report()
    if name == "own":
        return small("based").report()
    compiled = small("bounded")
    calibration = calibration_of(compiled.plan_document)
    if name == "planned":
        return compiled.report(calibration=replace(calibration, verification=None))
    model = always_polynomial(compiled, compiled.module())
    return compiled.report(model, INPUTS["bounded"] * 2, calibration=calibration)


class Reader(HTMLParser):
    """Collects attributes that name something to fetch, ids of elements, and the texts of the table's cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.cells: list[tuple[str | None, str]] = []
        self.images: list[str] = []
        self.tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element asks for."""
        given = dict(attrs)
        self.tag = tag
        self.ids += [given["id"] or ""] if "id" in given else []
        self.fetched += [
            given[name] or "" for name in ("src", "href", "data", "action", "srcset") if name in given
        ]
        if tag == "td":
            self.cells.append((given.get("data-v"), ""))
        if tag == "svg":
            self.images.append(given.get("aria-labelledby") or "")
            assert given.get("role") == "img"

    def handle_data(self, data: str) -> None:
        """Note the text of a cell."""
        if self.tag == "td" and self.cells:
            value, content = self.cells[-1]
            self.cells[-1] = (value, content + data)

    def handle_endtag(self, tag: str) -> None:
        """A cell ends."""
        self.tag = ""


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_and_every_plot_has_words(name: str) -> None:
    page = render_html(report(name))
    reader = Reader(page)
    assert reader.fetched == ["data:,"]  # the icon: an empty one, so that none is asked for
    outside_code = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp", outside_code)
    assert "default-src 'none'" in page
    assert len(reader.ids) == len(set(reader.ids))
    for names in reader.images:
        assert set(names.split()) <= set(reader.ids)
    assert page.count("<title id=") == page.count("<desc id=") == len(reader.images)


@pytest.mark.parametrize("name", PAGES)
def test_sections_are_in_order(name: str) -> None:
    found = re.findall(r'<section id="(\w+)">', render_html(report(name)))
    assert found == [section for section in ORDER if section in found]
    assert {"headline", "spec", "table", "reproduce"} <= set(found)
    if name == "measured":
        assert tuple(found) == ORDER


def test_without_scripts_every_figure_shows() -> None:
    page = render_html(small("encoder_decoder").report())
    assert page.count(" hidden>") > 0
    assert re.search(r"<noscript><style>\[hidden\]\{display:block!important\}", page)


@pytest.mark.parametrize("name", ["measured", "planned"])
def test_numbers_of_the_table_are_those_of_the_json(name: str) -> None:
    found = report(name)
    values = [json.loads(value) for value, _ in Reader(render_html(found)).cells if value is not None]
    expected: list[float] = []
    for entry in found["attentions"]:
        errors = entry["errors"]
        rounded = entry["rounding"]["weights"] if entry["rounding"] else None
        row = [entry["degree"], entry["rank"], entry["bound"], rounded, *errors["output"].values()]
        row += [errors["gradient"]["estimate"]]
        row += [errors[what][kind] for what in ("dq", "dk", "dv") for kind in ("bound", "measured")]
        expected += [value for value in row if value is not None]
        for head in entry["per_head"]:
            expected += [v for v in (head["range"], *head["output"].values()) if v is not None]
    assert values == expected
    assert found["headline"]["verdict"]["text"] in render_html(found)


def test_texts_are_escaped() -> None:
    found = report("measured")
    assert found.calibration is not None
    seen, *others = found.calibration.attentions
    first, *rest = found.attentions
    calibration = replace(found.calibration, attentions=(replace(seen, path="</script><i>"), *others))
    attentions = (replace(first, path="</script><i>"), *rest)
    page = render_html(replace(found, model="<b>bold</b>", calibration=calibration, attentions=attentions))
    assert "<b>bold" not in page
    assert "<i>" not in page


def test_same_report_same_page() -> None:
    assert render_html(report("measured")) == render_html(
        parse_document(to_json(report("measured")).encode(), Report, "report.json")
    )


def test_a_page_of_many_layers_is_small() -> None:
    compiled = fg.compile(GPT, params={"depth": 24, "d_model": 512, "heads": 16})
    page = render_html(compiled.report(calibration=calibration_of(compiled.plan_document)))
    assert page.count("<tbody>") == 24 + 1  # the weights of all rows are the same
    assert page.count('class="head"') == 24 * 16
    assert len(page) < LARGEST


# ---------------------------------------------------------------- in a browser


@pytest.mark.sampled(2)
@browser
@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_a_phone(name: str, tmp_path: Path) -> None:
    script = """
        const root = document.documentElement, widths = () => [root.clientWidth, root.scrollWidth];
        const before = widths();
        document.querySelectorAll("details").forEach(folded => (folded.open = true));
        document.querySelectorAll("input").forEach(box => (box.checked = true));
        const after = widths();
        document.querySelector("h1").style.width = "500px";
        return [before, after, root.scrollWidth];
    """
    before, after, broken = evaluate(render_html(report(name)), script, tmp_path, width=360)
    for client, scroll in (before, after):
        assert scroll == client <= 360
    assert broken > 500


@browser
@pytest.mark.parametrize(
    "body", ["<script>throw Error('no')</script>", "<img src='https://example.org/a.png'>"]
)
def test_the_browser_tells_of_errors_and_requests(body: str, tmp_path: Path) -> None:
    page = render_html(report("none")).replace("</main>", f"{body}</main>")
    with pytest.raises(AssertionError, match=r"no|example\.org"):
        evaluate(page, "return 0;", tmp_path)


@browser
def test_nothing_is_asked_for_at_run_time(tmp_path: Path) -> None:
    script = "return window.performance.getEntriesByType('resource').map(entry => entry.name);"
    assert evaluate(render_html(report("measured")), script, tmp_path) == []


@browser
def test_the_table_sorts_attentions_with_their_heads(tmp_path: Path) -> None:
    found = report("measured")
    script = """
        const heads = [...document.querySelectorAll("#attentions th button")];
        const bodies = () => [...document.querySelectorAll("#attentions tbody")];
        const names = () => bodies().map(body => body.rows[0].cells[0].textContent);
        const results = [names()];
        const column = 9;  // the measured error of the output
        for (let i = 0; i < 2; i++) { heads[column].click(); results.push(names()); }
        const rows = bodies().map(body => body.rows.length);
        return [heads[column].textContent, results, rows, heads[column].parentElement.getAttribute("aria-sort")];
    """
    heading, (before, ascending, descending), rows, order = evaluate(render_html(found), script, tmp_path)
    by_error = sorted(found["attentions"], key=lambda entry: entry["errors"]["output"]["measured"])
    assert heading == "measured"
    assert before == [entry["path"] for entry in found["attentions"]]
    assert ascending == [entry["path"] for entry in by_error]
    assert descending == ascending[::-1]
    assert rows == [1 + 2] * len(before)
    assert order == "descending"


@browser
def test_menus_show_the_chosen_head(tmp_path: Path) -> None:
    found = report("measured")
    script = """
        const menu = document.querySelector("select[data-shows=curve]");
        const shown = () => [...document.querySelectorAll("[data-figure=curve]")].filter(f => !f.hidden);
        const path = () => shown()[0].querySelector(".histogram").getAttribute("d");
        const first = path();
        menu.value = "3";
        menu.dispatchEvent(new Event("change"));
        return [menu.options.length, shown().length, shown()[0].querySelector(".logits").textContent, first !== path()];
    """
    count, shown, logits, changed = evaluate(render_html(found), script, tmp_path)
    assert count == sum(len(entry["per_head"]) for entry in found["attentions"])
    assert shown == 1
    assert logits.startswith("layers.1.attention.attend, head 1: logits from ")
    assert changed


@pytest.mark.medium
@browser
def test_light_and_dark(tmp_path: Path) -> None:
    script = """
        const style = window.getComputedStyle(document.body);
        return [style.backgroundColor, window.getComputedStyle(document.querySelector("svg text")).fill];
    """
    page = render_html(report("measured"))
    assert evaluate(page, script, tmp_path) == ["rgb(255, 255, 255)", "rgb(31, 35, 40)"]
    assert evaluate(page, script, tmp_path, dark=True) == ["rgb(13, 17, 23)", "rgb(230, 237, 243)"]


@browser
def test_folded_parts_open_for_print(tmp_path: Path) -> None:
    script = """
        const open = () => [...document.querySelectorAll("details")].map(folded => folded.open);
        const before = open();
        window.dispatchEvent(new Event("beforeprint"));
        return [before.some(x => x), open().every(x => x)];
    """
    assert evaluate(render_html(report("measured")), script, tmp_path) == [False, True]


@pytest.mark.medium
@browser
@pytest.mark.parametrize("name", NAMES)
def test_examples_load_without_a_complaint(name: str, tmp_path: Path) -> None:
    page = small(name).files["report.html"]
    assert evaluate(page, "return document.querySelectorAll('#attentions tbody').length;", tmp_path) == len(
        small(name).plan
    )


# ---------------------------------------------------------------- hostile reports


ATTACKS = (
    "</title><script>window.pwned = 1</script>",
    "\"><img src=x onerror='window.pwned = 1'>",
    "' onmouseover='window.pwned = 1",
    "</style></script><svg onload='window.pwned = 1'>",
    "</pre></text></svg><body onload=window.pwned=1>",
    "{{ 7 * 7 }}\x00\x1b\u202e\u2028\ud800",
)


OPEN = ("code", "params", "dims")  # tables whose names come from outside too
FIXED = (
    "decision",
    "family",
    "range_source",
    "kind",
    "state",
    "precision",
    "device",
    "dtype",
    "error_kind",
    "exact_zero",
    "format",
)


def hostile(value: Any, attack: str, *, named: bool = False) -> Any:
    """A document whose texts end with an attack, and the names of its open tables too."""
    if isinstance(value, str):
        return value + attack
    if isinstance(value, tuple):
        return tuple(hostile(item, attack) for item in value)
    if isinstance(value, dict):
        return {name + attack * named: hostile(item, attack) for name, item in value.items()}
    if isinstance(value, Document):
        return type(value)(**{
            name: item if name in FIXED else hostile(item, attack, named=name in OPEN)
            for name, item in asdict(value).items()
        })  # fmt: skip
    return value


class Elements(HTMLParser):
    """Counts elements and the names of attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.found.append((tag, *(name for name, _ in attrs)))


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
@pytest.mark.parametrize("name", ["measured", "own"])
def test_a_hostile_document_makes_no_element(name: str, attack: str) -> None:
    found = report(name)
    page = render_html(hostile(found, attack))
    page.encode()
    drawn, expected = Counter(Elements(page).found), Counter(Elements(render_html(found)).found)
    assert set(drawn - expected) <= {
        ("wbr",)
    }  # without attributes: a longer path has more places to break it
    assert {name for name, *_ in expected - drawn} <= {"text"}  # a plot leaves out a name that finds no room


@browser
def test_a_hostile_document_runs_nothing_and_looks_as_it_should(tmp_path: Path) -> None:
    page = render_html(hostile(report("measured"), "".join(ATTACKS[:5])))
    script = """
        const style = window.getComputedStyle(document.querySelector(".verdict"));
        const track = document.querySelector(".track");
        return [window.pwned === undefined, style.fontWeight, track.getBoundingClientRect().height > 5,
                document.querySelectorAll("[data-figure=curve]:not([hidden])").length];
    """
    assert evaluate(page, script, tmp_path) == [True, "600", True, 1]


@pytest.mark.sampled(2)
@browser
@pytest.mark.parametrize(
    "body",
    [
        "<script>window.pwned = 1</script>",
        "<img src='data:,' onerror='window.pwned = 1'>",
        "<a id=go href='javascript:window.pwned = 1'>a</a>",
        "<style>h1 { display: none }</style>",
        "<p id=p style='position:fixed'>a</p>",
        "<base href='https://example.org/'><script src='a.js'></script>",
    ],
)
def test_the_policy_refuses_what_is_not_ours(body: str, tmp_path: Path) -> None:
    """Were anything ever written without being escaped, the browser would not run it."""
    page = render_html(report("none")).replace("</main>", f"{body}</main>")
    script = """
        if (document.getElementById("go")) document.getElementById("go").click();
        const placed = document.getElementById("p");
        return [window.pwned === undefined, window.getComputedStyle(document.querySelector("h1")).display,
                placed ? window.getComputedStyle(placed).position : "static"];
    """
    found, console = load(page, script, tmp_path)
    assert found == [True, "block", "static"]
    assert any("Content Security Policy" in line for line in console)


def test_the_policy_allows_the_very_texts_of_the_page() -> None:
    for name in PAGES:
        page = render_html(report(name))
        policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]+)"', page)[0])
        assert "unsafe" not in policy
        texts = re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
        assert [kind for kind, _ in texts] == ["style", "style", "script"]
        for kind, content in texts:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy.split(f"{kind}-src ")[1].split(";")[0]
        assert not re.search(r'\sstyle="|\son\w+="', page)
