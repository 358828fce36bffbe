"""The report's page as it is drawn, on a phone and a desk, light and dark: nothing is cut or overlaps, all can be read.

A browser draws the page; a script measures every text, plot and table in it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.report.page import render_html
from tests.dsl.browser import evaluate, find_chromium
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import INPUTS, always_polynomial, small
from tests.dsl.test_tables import NESTED

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: CHROMIUM names none, and none is on the path"
)
CONTRAST = 4.5  # least ratio of WCAG 2, level AA, for text
SMALLEST = 9.0  # px, of letters in plots

MEASURE = """
document.querySelectorAll("details").forEach(folded => { folded.open = true; });
document.querySelectorAll("[hidden]").forEach(figure => { figure.hidden = false; });
const wide = window.innerWidth;
const found = {cut: [], scrolled: [], outside: [], overlaps: [], small: [], faint: [], texts: 0};
found.page = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const name = element => `${element.tagName} ${element.className.baseVal ?? element.className}`;
const code = element => element.closest("pre");  // code scrolls in a box of its own
document.querySelectorAll("body *").forEach(element => {
  const isBox = window.getComputedStyle(element).overflowX !== "visible";
  const scrolls = element.scrollWidth > element.clientWidth + 1 && isBox;
  if (scrolls && !element.closest("svg, select") && element.tagName !== "PRE" && !element.querySelector("pre"))
    found.scrolled.push(name(element));
});
// Contrast: of each element with a text of its own, against the first background below it.
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const linear = c => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = colour => {
  const [r, g, b] = channels(colour).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = window.getComputedStyle(at).backgroundColor, parts = channels(colour);
    if (parts.length === 3 || parts[3] > 0.99) return colour;
  }
  return "rgb(255, 255, 255)";
};
const walker = document.createTreeWalker(document.body, window.NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.textContent.trim() || element.closest("script, style, noscript, title, desc, option")) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const boxes = [...range.getClientRects()].filter(box => box.width > 0);
  if (!boxes.length || boxes.every(box => box.right < 0)) continue;  // headings that a phone keeps for screen readers
  found.texts += 1;
  const style = window.getComputedStyle(element), svg = element.closest("svg");
  if (!code(element) && boxes.some(box => box.right > wide + 0.5 || box.left < -0.5)) found.cut.push(node.textContent);
  const [one, two] = [luminance(svg ? style.fill : style.color), luminance(background(element))];
  const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (ratio < CONTRAST) found.faint.push([node.textContent, ratio]);
}
document.querySelectorAll("svg").forEach(svg => {
  const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  if (12 * scale < SMALLEST) found.small.push(12 * scale);
  texts.forEach(([text, box], place) => {
    const inside = box.left >= frame.left - 0.5 && box.right <= frame.right + 0.5 && box.top >= frame.top - 0.5
      && box.bottom <= frame.bottom + 0.5;
    if (!inside) found.outside.push(text);
    texts.slice(place + 1).forEach(([other, second]) => {
      const across = Math.min(box.right, second.right) - Math.max(box.left, second.left);
      const down = Math.min(box.bottom, second.bottom) - Math.max(box.top, second.top);
      if (across > 1 && down > 4 * scale) found.overlaps.push([text, other]);
    });
  });
});
// Words of headings and parts of paths: one that is drawn on two lines has two boxes.
const named = "#attentions th, #attentions tr:not(.head) td:first-child";
found.broken = [...document.querySelectorAll(named)].flatMap(cell => {
  const texts = document.createTreeWalker(cell, window.NodeFilter.SHOW_TEXT), words = [];
  while (texts.nextNode())
    for (const word of texts.currentNode.textContent.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (range.getClientRects().length > 1) words.push(word[0]);
    }
  return words;
});
found.plots = document.querySelectorAll("svg").length;
const cells = [...document.querySelectorAll("#attentions tbody tr:first-child td")].filter(cell => cell.textContent);
found.cells = cells.filter(cell => cell.getBoundingClientRect().width > 0).length;
found.filled = cells.length;
return found;
""".replace("CONTRAST", str(CONTRAST)).replace("SMALLEST", str(SMALLEST))


@cache
def page(name: str) -> str:
    """Pages that differ in what they hold."""
    if name == "nested":
        compiled = fg.compile(NESTED, target="torch", validate=False)
        return render_html(compiled.report(calibration=calibration_of(compiled.plan_document)))
    compiled = small(name)
    if name != "bounded":
        return render_html(compiled.report())
    calibration = calibration_of(compiled.plan_document)
    model = always_polynomial(compiled, compiled.module())
    return render_html(compiled.report(model, INPUTS["bounded"] * 2, calibration=calibration))


def check(name: str, width: int, folder: Path, *, dark: bool) -> None:
    found: dict[str, Any] = evaluate(page(name), MEASURE, folder, width=width, dark=dark)
    assert found.pop("texts") > 50
    assert found.pop("cells") == found.pop("filled") > 0
    assert found.pop("plots") > 0
    assert found == {
        "page": 0, "cut": [], "scrolled": [], "outside": [], "overlaps": [], "small": [], "faint": [], "broken": [],
    }  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize(("width", "dark"), [(400, True), (1280, False)])
def test_nothing_is_cut_or_faint(width: int, dark: bool, tmp_path: Path) -> None:
    check("bounded", width, tmp_path, dark=dark)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 400, 700, 1200, 1280])
@pytest.mark.parametrize("name", ["nested", "bounded", "encoder_decoder", "based"])
def test_no_page_is_cut_or_faint_at_any_width(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    check(name, width, tmp_path, dark=dark)


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ((".muted,figcaption{color:var(--muted)}", ".muted,figcaption{color:#aaa}"), "faint"),
        (("figure svg{width:100%;", "figure svg{width:600px;"), "cut"),
        (("text-anchor=\"end\">0<", "text-anchor=\"end\">a number of many digits<"), "outside"),
        ((";overflow-wrap:normal", ""), "broken"),
        (("<wbr>", ""), "broken"),
        (("td:not(:first-child)::before", "td{flex:none;width:900px}td:not(:first-child)::before"), "scrolled"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_wrong_is_seen(broken: tuple[str, str], key: str, tmp_path: Path) -> None:
    text = page("bounded")
    assert broken[0] in text
    policy = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:policy] + text[text.index(">", policy) + 1 :]  # its hashes are of the sound page
    width = 1280 if key == "broken" else 400  # the headings of a desk
    assert evaluate(text.replace(*broken), MEASURE, tmp_path, width=width)[key]
