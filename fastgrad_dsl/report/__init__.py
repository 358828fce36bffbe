"""The error-budget report: one JSON document, of which terminal and HTML page are views (docs/report.md).

Names are imported when they are first used: `check` prints no report, and starts without what makes one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrad_dsl.documents.write import to_json
    from fastgrad_dsl.report.document import FORMAT, build_report, write_json
    from fastgrad_dsl.report.page import render_html, write_html
    from fastgrad_dsl.report.request import DEFAULT_LENGTH, ReportRequest, Subject, make_report, measure_plan

__all__ = [
    "DEFAULT_LENGTH",
    "FORMAT",
    "ReportRequest",
    "Subject",
    "build_report",
    "make_report",
    "measure_plan",
    "render_html",
    "to_json",
    "write_html",
    "write_json",
]

_HOMES = {
    "document": ("FORMAT", "build_report", "to_json", "write_json"),
    "page": ("render_html", "write_html"),
    "request": ("DEFAULT_LENGTH", "ReportRequest", "Subject", "make_report", "measure_plan"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
