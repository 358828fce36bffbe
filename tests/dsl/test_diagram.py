"""The picture of a model, and what notebooks show: complete, quoted, and as large as it says."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fastgrad_dsl as fg
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.pipeline import run
from fastgrad_dsl.report.diagram import COLOURS, LARGEST, draw
from fastgrad_grammar.highlight import ProgramLexer, coloured
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.html_tags import Tags

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def planned(text: str) -> Program:
    return run(elaborate(Source("a.tfg", text)), until="plan", validate=False)[-1].program


def texts(svg: str) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.tfg")), ids=lambda path: path.stem)
def test_boxes_lie_within_the_picture_and_apart(path: Path) -> None:
    program = run(elaborate(read_source(path)), until="plan", validate=False)[-1].program
    svg = draw(program)
    assert svg == draw(program)
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes = []
    for each in root.iter(f"{SVG}rect"):
        if each.get("class") == "box":
            x, y, wide, high = (float(each.attrib[name]) for name in ("x", "y", "width", "height"))
            assert x >= 0
            assert y >= 0
            assert x + wide <= width
            assert y + high <= height
            boxes.append((x, y, x + wide, y + high))
    assert len(boxes) > 3
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            within = one[0] < other[0] and one[1] < other[1] and one[2] > other[2] and one[3] > other[3]
            assert apart or within, (one, other)


def test_decisions_have_their_colours() -> None:
    own = draw(
        run(elaborate(read_source(ROOT / "examples/gpt.tfg")), until="plan", validate=False)[-1].program
    )
    assert COLOURS["own"] in own
    assert COLOURS["exact"] not in own
    bounded = run(elaborate(read_source(ROOT / "examples/bounded.tfg")), until="plan", validate=False)[
        -1
    ].program
    assert "balanced degree 2, rank 153, near 64" in texts(draw(bounded))
    assert "6 times" in texts(draw(bounded))


def test_the_picture_of_the_page_is_the_present_one() -> None:
    """If not: fastgrad graph examples/bounded.tfg -o docs/model-bounded.svg"""
    program = run(elaborate(read_source(ROOT / "examples/bounded.tfg")), until="plan", validate=False)[
        -1
    ].program
    assert (ROOT / "docs/model-bounded.svg").read_text(encoding="utf-8") == draw(program)


HEAD = "dim b\ndim n <= 64\n"


def test_a_residual_is_a_join_of_two_lines() -> None:
    svg = draw(
        planned(
            HEAD
            + "model m(x: float[b, n, 8]) -> float[b, n, 8] {\n    return x + relu(softmax(x @ x.T) @ x)\n}\n"
        )
    )
    assert "+" in texts(svg)
    assert "exact attention" in texts(svg)


def test_a_text_that_grows_without_limit_is_drawn_closed() -> None:
    """Each block calls the one before it twice: 2^13 boxes if all were open."""
    blocks = ["block b0(x: float[b, n, 8]) -> float[b, n, 8] {\n    return softmax(x @ x.T) @ x\n}\n"]
    for level in range(1, 13):
        blocks.append(
            f"block b{level}(x: float[b, n, 8]) -> float[b, n, 8] {{\n"
            f"    return b{level - 1}(b{level - 1}(x) as one) as two\n}}\n"
        )
    svg = draw(
        planned(
            HEAD + "".join(blocks) + "model m(x: float[b, n, 8]) -> float[b, n, 8] {\n    return b12(x)\n}\n"
        )
    )
    assert any(re.fullmatch(r"\d+ boxes inside, not drawn", each) for each in texts(svg))
    assert svg.count("<rect") < 4 * LARGEST


def test_notebooks_show_text_from_outside_as_text(tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.tfg"
    path.write_text((ROOT / "examples/bounded.tfg").read_text())
    compiled = fg.compile(path, params={"depth": 1}, validate=False)
    shown = compiled._repr_html_()
    assert {"img", "script"}.isdisjoint(Tags(shown).tags)
    assert {"table", "svg", "details"} <= Tags(shown).tags
    stage = compiled.stages[3]._repr_html_()
    assert Tags(stage).tags == {"pre", "span"}
    assert "&lt;img src=x" in stage
    report = compiled.report()
    assert report._repr_html_() is not None
    assert report.headline._repr_html_() is None  # a part shows itself as the text that it is


def test_nothing_is_called_measured_that_was_not(tmp_path: Path) -> None:
    path = tmp_path / "exact.tfg"
    path.write_text(
        "use std\ndim b\ndim n <= 64\n"
        "model m(x: float[b, n, 16]) -> float[b, n, 16] {\n    return std.attention(x; heads = 2)\n}\n"
    )
    shown = fg.compile(path, validate=False)._repr_html_()
    assert shown.count("0 (bound)") == 2  # an exact attention's output and gradient
    assert "measured" not in shown


def test_colours_change_no_letter() -> None:
    text = str(fg.compile(ROOT / "examples/based.tfg", validate=False).stages[-1])
    shown = coloured(text, ProgramLexer())
    plain = re.sub(r"<[^>]*>", "", shown)
    for code, sign in (("&lt;", "<"), ("&gt;", ">"), ("&#34;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        plain = plain.replace(code, sign)
    assert plain.strip() == text.strip()
