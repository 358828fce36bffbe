"""Sphinx's settings: Markdown by MyST, the theme Furo, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes

from fastgrad_dsl import __version__
from fastgrad_grammar.highlight import TfgLexer
from website.languages import as_markdown_code, language_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "fastgrad-dsl"
release = __version__
html_title = f"fastgrad {__version__}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nb_execution_mode = "force"  # the notebooks hold no outputs
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would be loaded from elsewhere
html_theme = "furo"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
templates_path = [str(Path(__file__).parent / "templates")]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it fetches pages, which a browser refuses to pages that are files
html_domain_indices = False
pygments_style = "default"
pygments_dark_style = "github-dark"
highlight_language = "default"
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # sections of errors.md begin at the level of the page's title
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures say them; they name what is imported for types alone
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def setup(app: Sphinx) -> None:
    """Colours for .tfg, languages of code that does not say its own, and docstrings in their own style."""
    app.add_lexer("tfg", TfgLexer)
    app.connect("doctree-read", _guess_languages)
    app.connect("autodoc-process-docstring", _read_docstring)


def _guess_languages(app: Sphinx, doctree: nodes.document) -> None:
    for block in doctree.findall(nodes.literal_block):
        if block.get("language", "default") in ("default", "none"):
            block["language"] = language_of(block.astext())


def _read_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    lines[:] = as_markdown_code(lines)
