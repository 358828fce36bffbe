"""The site of `make docs`: complete, without a dead link, and without a request to elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import fastgrad_dsl as fg
from fastgrad_compiler.frontend.modules import standard_library
from fastgrad_grammar.codes import CODES
from tests.dsl.browser import find_chromium, load_file, load_files

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
pytest.importorskip("furo", reason="the extra `docs` is not installed")
pytest.importorskip("myst_nb", reason="the extra `docs` is not installed")

from website import figures
from website.build import build
from website.languages import as_markdown_code, language_of
from website.pages import GROUPS, linked, sources
from website.shown_errors import examples

NOT_PAGES = {"sample-report-page.html"}  # has tests of its own: tests/dsl/test_page_pictures.py
LOADS = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "TOKENS", 64)  # what the report measures has tests of its own
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the notebooks' processes
        assert build(out) == 0  # a warning is an error
    return out


class _Read(HTMLParser):
    """Ids, links and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])


@cache
def read(path: Path) -> _Read:
    return _Read(path.read_text(encoding="utf-8"))


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.glob("*.html") if path.name not in NOT_PAGES)


@pytest.mark.medium
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        for loaded in read(page).loads:
            if loaded.startswith(("data:", "#")):
                continue
            assert not re.match(r"(?:\w+:)?//", loaded), (page.name, loaded)
            assert (site / unquote(loaded.split("?")[0].split("#")[0])).is_file(), (page.name, loaded)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", text), sheet


@pytest.mark.medium
def test_every_link_leads_somewhere(site: Path) -> None:
    """In the site, to the very heading; to elsewhere only where a page of docs/ cites a work."""
    written = "".join((Path(__file__).parents[2] / path).read_text(encoding="utf-8") for path in sources())
    for page in pages(site):
        for link in read(page).links:
            if re.match(r"[a-z]+:", link):
                assert link in written, (page.name, link)
                continue
            file, _, part = link.partition("#")
            target = site / unquote(file) if file else page
            assert target.is_file(), (page.name, link)
            if part and target.suffix == ".html":
                assert unquote(part) in read(target).ids, (page.name, link)


@pytest.mark.medium
def test_a_link_out_of_the_site_is_refused() -> None:
    with pytest.raises(ValueError, match=r"docs/report\.md: \.\./Makefile is no page"):
        linked("docs/report.md", "see [this](../Makefile)")
    assert linked("docs/report.md", "[a](trust.md#bound) `[b](x)`\n\n    [c](y)\n").startswith(
        "[a](trust.md#bound)"
    )


@pytest.mark.medium
def test_every_page_is_in_the_side_bar(site: Path) -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert set(sources().values()) - {"index"} <= set(listed)
    assert len(listed) == len(set(listed))
    for name in listed:
        assert f"{name}.html" in read(site / "index.html").links


@pytest.mark.medium
def test_all_that_the_code_has_is_there(site: Path) -> None:
    library = (site / "library-source.html").read_text(encoding="utf-8")
    assert set(standard_library().blocks) <= set(re.findall(r"<h3>std\.(\w+)", library))
    errors = read(site / "errors.html").ids
    for code, title in CODES.items():
        assert any(each.startswith(f"{code.lower()}-") for each in errors), (code, title)
    api = read(site / "api.html").ids
    modules = {"conversion", "distributed", "functional", "training", "__version__"}
    assert {f"fastgrad_dsl.{name}" for name in fg.__all__ if name not in modules} <= api
    assert {"fastgrad_dsl.functional.polynomial_attention", "fastgrad_dsl.training.train"} <= api


@pytest.mark.medium
def test_codes_are_shown_with_a_bad_file(site: Path) -> None:
    page = (site / "errors.html").read_text(encoding="utf-8")
    assert page.count("<details>") == len(examples())
    assert set(examples()) <= set(CODES)
    text, output = examples()["FG108"]
    assert "FG108" in output
    assert text.split("\n")[0].split(" ")[0] in page


@pytest.mark.medium
def test_code_of_the_language_is_coloured(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert re.search(r'class="kd">model</span>.*?class="nc">gpt</span>', page)
    assert '<div class="highlight-bash' in page


@pytest.mark.medium
def test_languages_of_code() -> None:
    assert language_of("fastgrad check a.tfg\n") == "bash"
    assert language_of("$ fastgrad check a.tfg\nerror") == "console"
    assert language_of("x = x + std.mixer(x; heads)") == "tfg"
    assert language_of("import torch\n") == "python"
    assert language_of("error[FG108]: x\n --> a.tfg:1:1") == "text"
    assert language_of("O(n d^2)") == "text"
    assert as_markdown_code(["A |s|, `a|b`.", "", "    x = 1", "    y", "", "    z"]) == [
        "A \\|s\\|, `a|b`.", "", ".. code-block:: text", "", "    x = 1", "    y", "", "    z",
    ]  # fmt: skip


@pytest.mark.medium
def test_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    for file in (Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        page = (site / f"notebook-{file.stem}.html").read_text(encoding="utf-8")
        assert f"notebook-{file.stem}.html" in read(site / "notebooks.html").links
        assert page.count("cell_input") == sum(cell["cell_type"] == "code" for cell in cells)
        assert "cell_output" in page
    report = (site / "notebook-report.html").read_text(encoding="utf-8")
    assert "measured on one batch of 1,024 tokens" in report
    assert "balanced degree 2, rank 153, near 64</text>" in report  # in the picture


@pytest.mark.medium
def test_the_search_knows_the_pages(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    places = [place for terms in ("terms", "titleterms") for place in _places(index[terms]["checkpoint"])]
    assert {"training", "checkpoints"} <= {index["docnames"][place] for place in places}


def _places(entry: int | list[int]) -> list[int]:
    return [entry] if isinstance(entry, int) else entry


LOOK = """
const wide = document.documentElement;
return {
  title: document.title,
  overflow: wide.scrollWidth - wide.clientWidth,
  copies: document.querySelectorAll("button.copybtn").length,
  background: window.getComputedStyle(document.body).backgroundColor,
  results: [...document.querySelectorAll("#search-results li a")].map(each => each.getAttribute("href")),
};
"""

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium: CHROMIUM names none, and none is on the path"
    ),
]


class TestInABrowser:
    """Pages opened as files, without a server or a network."""

    pytestmark = in_a_browser

    @pytest.mark.parametrize("width", [1300, 390])
    def test_pages_fit_and_write_no_error(self, site: Path, tmp_path: Path, width: int) -> None:
        shown = load_files(pages(site), LOOK, tmp_path, width=width)
        found: dict[str, Any] = dict(zip((page.name for page in pages(site)), shown, strict=True))
        assert {name: each["overflow"] for name, each in found.items() if each["overflow"] > 0} == {}
        assert found["tutorial.html"]["copies"] > 5
        assert len({each["title"] for each in found.values()}) == len(found)

    def test_dark_and_light(self, site: Path, tmp_path: Path) -> None:
        shades: dict[bool, set[str]] = defaultdict(set)
        for dark in (False, True):
            shades[dark].add(load_file(site / "index.html", LOOK, tmp_path, dark=dark)["background"])
        assert shades[False].isdisjoint(shades[True])

    def test_the_search_finds(self, site: Path, tmp_path: Path) -> None:
        found = load_file(site / "search.html", LOOK, tmp_path, query="?q=calibrate")
        assert any(link.startswith("calibration.html") for link in found["results"]), found
