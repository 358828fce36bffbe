"""The spec with a remark at each attention's line, and the generated code of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastgrad_compiler.codegen.kernel import ENDINGS
from fastgrad_dsl.documents.plan import Attention
from fastgrad_dsl.documents.report import Remark, ReportedAttention, Spec
from fastgrad_dsl.report.words import SOURCES, decision, folded, number


def annotated_spec(path: str, text: str | None, attentions: Sequence[ReportedAttention]) -> Spec:
    """The file's lines, and `remarks`: {line (from 1), text} for the attentions that stand there."""
    groups: dict[tuple[int, str], list[ReportedAttention]] = {}
    for entry in attentions:
        line = _line(path, entry)
        if line is not None:
            groups.setdefault((line, _remark(entry)), []).append(entry)
    remarks = tuple(
        Remark(line, f"{folded([e.path for e in entries])}: {remark}{_largest(entries)}")
        for (line, remark), entries in sorted(groups.items(), key=lambda group: group[0][0])
    )
    return Spec(path, None if text is None else tuple(text.removesuffix("\n").split("\n")), remarks)


def kernel_code(
    attentions: Sequence[Attention], files: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """The texts of the kernels by file name, and the files of each attention."""
    names = [
        tuple(sorted(files.keys() & {f"{entry.kernel}{ending}" for ending in ENDINGS}))
        for entry in attentions
    ]
    return {file: files[file] for file in sorted({file for each in names for file in each})}, names


def _line(path: str, entry: Attention) -> int | None:
    """The line of the spec, None for an attention that stands in another file."""
    file, _, place = (entry.source or "").rpartition(":")
    file, _, line = file.rpartition(":")
    return int(line) if file == path and line.isdecimal() and place else None


def _remark(entry: Attention) -> str:
    source = entry.range_source
    known = "" if source is None else f"; |s| <= {number(entry.bound)}, {SOURCES[source]}"
    return f"{decision(entry)}{known}"


def _largest(entries: Sequence[ReportedAttention]) -> str:
    """The largest measured error of the output, where there is one."""
    measured = [e.errors.output.measured for e in entries if e.decision == "polynomial"]
    known = [value for value in measured if value is not None]
    return f"; output error at most {number(max(known))} (measured)" if known else ""
