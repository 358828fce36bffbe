"""Rendering of the Jinja templates in this folder, which are the text of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def render(template: str, context: Mapping[str, object]) -> str:
    """The text of a template, named by its path in this folder; an unknown name in it is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    return environment.get_template(template).render(context)
