"""(e) plan.json, report.json, the tables on a terminal and the module itself say the same of each attention."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from attack.cases import Case, Finding
from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.text import print_program
from fastgrad_compiler.ir.text_parser import parse_program
from fastgrad_dsl.commands.terminal import print_plan, print_report
from fastgrad_dsl.documents.report import Report
from fastgrad_dsl.report import words
from fastgrad_dsl.report.words import folded, number, share
from fastgrad_grammar.format import format_source
from fastgrad_grammar.source import Source

Entry = Mapping[str, Any]
SHARED = ("path", "decision", "family", "degree", "coefficients", "bound", "range_source", "asserted", "eps",
          "eps_prime", "why", "rank", "near", "break_even", "guarded", "certificate", "proof")  # fmt: skip
_DECISION = re.compile(r"^  (.+?)  (exact|(\w+|own polynomial) degree (\d+))(?:, .*)?  \(.*\)$")


def check_texts(case: Case) -> None:
    """Files against each other and against the program; text forms against what they are read back as."""
    compiled = case.compiled
    plan = json.loads(compiled.files["plan.json"])
    report = json.loads(compiled.files["report.json"])
    _same_entries(plan["attentions"], report["attentions"])
    _same_as_program(plan["attentions"], compiled.plan)
    _check_text(case, plan["attentions"])
    _report_text(compiled.report())
    _read_back(case)


def _same_entries(plan: list[Entry], report: list[Entry]) -> None:
    paths, others = ([entry["path"] for entry in entries] for entries in (plan, report))
    if paths != others:
        raise Finding("e", "paths", f"plan.json has {paths}, report.json {others}")
    for one, other in zip(plan, report, strict=True):
        for key in SHARED:
            if one[key] != other[key]:
                words = f"{one['path']}: {one[key]} in plan.json, {other[key]} in report.json"
                raise Finding("e", f"{key} of report", words)


def _same_as_program(plan: list[Entry], table: tuple[AttentionEntry, ...]) -> None:
    for said, entry in zip(plan, table, strict=True):
        node = entry.node
        polynomial = node.op == "poly_attention"
        runs = {
            "path": entry.path,
            "decision": "polynomial" if polynomial else "exact",
            "degree": node.get("degree") if polynomial else None,
            "bound": node["bound"],
            "range_source": Attention.of(node).range.origin,
            "eps": node.get("eps") if polynomial else None,
        }
        for key, value in runs.items():
            if said[key] != value:
                words = f"{entry.path}: {said[key]} in plan.json, {value} in what runs"
                raise Finding("e", f"{key} of plan", words)


def _printed(show: Callable[[], None]) -> list[str]:
    out = io.StringIO()
    with redirect_stdout(out):
        show()
    return out.getvalue().splitlines()


def _check_text(case: Case, plan: list[Entry]) -> None:
    """What `fastgrad check` prints: one line for each group of equal attentions."""
    planned = case.stage("plan")
    lines = _printed(lambda: print_plan(planned, "attack.tfg"))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry, row in zip(plan, attention_table(planned), strict=True):
        family = words.family(entry["family"])
        decision = f"{family} degree {entry['degree']}" if entry["decision"] == "polynomial" else "exact"
        near = f", in blocks of {entry['near']}" if entry["near"] is not None and decision != "exact" else ""
        place = row.span.short_place if row.span else ""
        groups.setdefault((place, decision + near, str(entry["why"])), []).append(entry["path"])
    wanted = [(folded(paths), decision.split(",")[0], why) for (_, decision, why), paths in groups.items()]
    found = []
    lines = [line for line in lines[1:] if not line.startswith("      warning: ")]
    for line, why in zip(lines[::2], lines[1::2], strict=False):
        if "  as it is written, on all pairs" in line:  # a gate that no attention has
            continue
        match = _DECISION.match(line)
        if match is None:
            raise Finding("e", "a line of check", f"{line!r} is not of the form that is documented")
        found.append((match[1], match[2], why.strip()))
    if found != [(path, decision, why.strip()) for path, decision, why in wanted]:
        raise Finding("e", "text of check", f"{found} is printed, {wanted} is planned")


def _report_text(report: Report) -> None:
    """The table of `fastgrad report --wide`: decision, rank, R, largest share and eps of each attention."""
    lines = _printed(lambda: print_report(report, wide=True))
    for entry in report["attentions"]:
        line = next((line for line in lines if re.match(rf"{re.escape(entry['path'])}\s", line)), None)
        if line is None:
            raise Finding("e", "a row of report", f"{entry['path']} is not in the table")
        family = words.family(entry["family"])
        decision = f"{family} {entry['degree']}" if entry["decision"] == "polynomial" else "exact"
        if entry["near"] is not None and decision != "exact":
            decision += f", near {entry['near']}"
        rank, most = number(entry["rank"]), share(entry["largest_share"])
        cells = [decision, rank, number(entry["bound"]), most, number(entry["eps"])]
        if not re.match(r"\s*".join(map(re.escape, [entry["path"], *cells])) + r"\s", line):
            raise Finding("e", "a row of report", f"{line!r} does not say {cells}")


def _read_back(case: Case) -> None:
    """A program's text form is read back as the program, and a formatted text means the same."""
    for stage in case.compiled.stages:
        text = print_program(stage.program)
        if print_program(parse_program(text)) != text:
            raise Finding("e", "text form", f"the stage {stage.name} is not what its text is read back as")
    source = Source("<attack>", case.text)
    formatted = format_source(source)
    again = elaborate(Source("<attack>", formatted))
    if again != elaborate(source):
        raise Finding("e", "format", "the formatted text is another program")
    if format_source(Source("<attack>", formatted)) != formatted:
        raise Finding("e", "format", "formatting twice is not formatting once")
