"""The error-budget report: one JSON document, of which terminal and HTML page are views (docs/report.md)."""

from __future__ import annotations

from fastgrad_dsl.report.document import FORMAT, build_report, to_json, write_json
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
