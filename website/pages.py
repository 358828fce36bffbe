"""The pages of the site: those of docs/ with their links, and those that are made from the code."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from website.api import api_page
from website.figures import write_figures
from website.library import library_page
from website.shown_errors import with_examples

ROOT = Path(__file__).parent.parent

GROUPS: dict[str, tuple[str, ...]] = {
    "Start": ("tutorial", "first-sessions", "which-attention", "from-pytorch", "from-transformers"),
    "Use": (
        *(
            "training",
            "generation",
            "calibration",
            "memory",
            "report",
            "guards",
            "checkpoints",
            "conversion",
            "transformers",
            "distributed",
            "pytorch",
        ),
        *("targets", "editors", "notebooks", "notebook-report", "notebook-degrees"),
    ),
    "Reference": (
        "language",
        "operations",
        "standard-library",
        "library-source",
        "examples",
        "errors",
        "api",
    ),
    "Results": ("performance", "scaling", "quality", "benchmark", "sample-report"),
    "Foundations": ("mathematics", "theory", "trust", "security", "architecture", "contributing"),
}
"""The pages in the order of the side bar; a test asserts that it has each page of docs/."""

NOTEBOOKS = ROOT / "examples" / "notebooks"
DATA = (".svg", ".json")  # beside the pages: plots, and the numbers that pages are made of
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)?(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^(?:```.*?^```|(?: {4}[^\n]*\n)+)|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def sources() -> dict[str, str]:
    """Paths in the repository of the pages that a person wrote, and their names in the site."""
    docs = {f"docs/{path.name}": path.stem for path in sorted((ROOT / "docs").glob("*.md"))}
    return {"README.md": "index", "CONTRIBUTING.md": "contributing", **docs}


def write_pages(folder: Path) -> None:
    """Write everything that Sphinx reads to `folder`/pages."""
    pages = folder / "pages"
    pages.mkdir(parents=True)
    for path, name in sources().items():
        text = linked(path, (ROOT / path).read_text(encoding="utf-8"))
        if name == "errors":
            text = with_examples(text)
        if name == "index":
            text += _tables_of_contents()
        (pages / f"{name}.md").write_text(_one_title(text), encoding="utf-8")
    for file in (ROOT / "docs").iterdir():
        if file.name.endswith(DATA):
            shutil.copy(file, pages)
    (pages / "library-source.md").write_text(library_page(), encoding="utf-8")
    (pages / "examples.md").write_text(_examples(), encoding="utf-8")
    (pages / "api.md").write_text(api_page(), encoding="utf-8")
    write_figures(pages)
    for file in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(file, pages / f"notebook-{file.name}")
    shutil.copy(ROOT / "examples" / "bounded.tfg", folder)  # the notebooks find it in the folder above theirs


def linked(path: str, text: str) -> str:
    """A page whose links lead to pages of the site; ValueError where one leads out of it."""

    def target(found: re.Match[str]) -> str:
        file, part = found[1], found[2] or ""
        return part if file is None else _target(path, file) + part

    return _outside_code(text, lambda prose: _LINK.sub(target, prose))


def _target(page: str, file: str) -> str:
    """What a link of a page to a file of the repository becomes."""
    whole = posixpath.normpath(posixpath.join(posixpath.dirname(page), file))
    if whole in sources():
        return f"{sources()[whole]}.md"
    if whole.startswith("examples/notebooks/") and (ROOT / whole).is_file():
        return f"notebook-{posixpath.basename(whole)}"
    if whole == "examples" or whole.startswith("examples/"):
        return "examples.md"
    if whole.startswith("docs/") and whole.endswith(DATA):
        return posixpath.basename(whole)
    raise ValueError(f"{page}: {file} is no page of the site")


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    done, at = [], 0
    for code in _FENCE.finditer(text):
        done += [change(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*done, change(text[at:])])


def _one_title(text: str) -> str:
    """A page whose further titles are headings below the first: errors.md has one for each group of codes."""
    first, rest = text.split("\n", 1)
    if not re.search(r"^# ", _FENCE.sub("", rest), re.MULTILINE):
        return text
    return (
        first + "\n" + _outside_code(rest, lambda prose: re.sub(r"^(#+ )", r"#\1", prose, flags=re.MULTILINE))
    )


def _tables_of_contents() -> str:
    tables = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in GROUPS.items()
    ]
    return "\n" + "\n".join(tables)


def _examples() -> str:
    parts = ["# Examples\n\nThe models of the folder `examples/`, as they are.\n"]
    for path in sorted((ROOT / "examples").glob("*.tfg")):
        parts.append(f"## {path.name}\n\n```tfg\n{path.read_text(encoding='utf-8')}```\n")
    data = (ROOT / "examples/data/README.md").read_text(encoding="utf-8")
    parts.append(re.sub(r"^# ", "## ", data, flags=re.MULTILINE))
    return "\n".join(parts)
