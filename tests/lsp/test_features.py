"""What the server answers about a text: hover, places of names, completion, layout, hints."""

from __future__ import annotations

from pathlib import Path

import pytest
from lsprotocol import types

from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_dsl.lsp.completion import complete
from fastgrad_dsl.lsp.hints import hints
from fastgrad_dsl.lsp.hover import hover
from fastgrad_dsl.lsp.layout import folding, formatting
from fastgrad_dsl.lsp.lenses import lenses
from fastgrad_dsl.lsp.navigation import definition, references
from fastgrad_dsl.lsp.operations import rows, rows_of
from fastgrad_dsl.lsp.outline import outline
from fastgrad_dsl.lsp.rename import Refused, prepare, rename
from fastgrad_dsl.lsp.signature_help import signature_help
from fastgrad_dsl.lsp.tokens import TYPES, semantic_tokens
from fastgrad_grammar.format import format_source
from tests.grids import wide
from tests.lsp.editor import EXAMPLES, ROOT, SPEC, Editor, applied, marked

WHOLE = types.Range(types.Position(0, 0), types.Position(10_000, 0))
PARTS = "block twice(x: float[n, 4]; by: float = 2.0) -> float[n, 4] {\n    return by * x\n}\n"
USER = """\
use "parts.tfg" as parts

dim n

model m(x: float[n, 4]) -> float[n, 4] {
    return parts.twice(x; by = 3.0)
}
"""


def told(editor: Editor, text: str) -> str:
    view, place = editor.at(text)
    found = hover(view, place, editor.known.view)
    if found is None:
        return ""
    assert isinstance(found.contents, types.MarkupContent)
    return found.contents.value


def labels(editor: Editor, text: str) -> list[str]:
    view, place = editor.at(text)
    return [item.label for item in complete(view, place, editor.known.view)]


# ---------------------------------------------------------------- hover


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("sco¦res = 1.5", ["scores: float[b, 4, n, n]", "entries in [-1.5, 1.5]", "Cauchy-Schwarz"]),
        ("causal(sco¦res)", ["scores: float[b, 4, n, n]", "entries in [-1.5, 1.5]"]),
        ("(unit(q) ¦@ unit", ["float[b, 4, n, n]", "entries in [-1, 1]"]),
        ("param dep¦th = 2", ["param depth = 2"]),
        ("dim ¦n <=", ["dim n <= 16384"]),
        ("wq: float[¦d,", ["dim d = 64"]),
        ("; hea¦ds: int", ["heads: 4"]),
        (
            "merge_heads(soft¦max",
            ["softmax(x; axis = -1)", "layers.0", "degree 4, rank 495", "break-even: exact below"],
        ),
        (
            "x = lay¦er(x",
            ["block layer(x: float[b, n, d]; heads: int)", "gives `float[b, n, 64]`", "rank 495"],
        ),
        ("std.swi¦glu", ["block std.swiglu(x: float[b, n, d]; hidden: int", "the gated feed-forward part"]),
        ("hid¦den = 4", ["hidden: int", "a parameter of `swiglu`"]),
        (
            "cross_ent¦ropy",
            ["cross_entropy(logits, targets; smoothing = 0.0", "means over all positions", "float[]"],
        ),
    ],
)
def test_hover_tells_types_ranges_and_decisions(editor: Editor, place: str, parts: list[str]) -> None:
    said = told(editor, marked(place))
    for part in parts:
        assert part in said, said


def test_hover_outlives_a_syntax_error_and_an_error_of_meaning(editor: Editor) -> None:
    editor.open(SPEC)
    for broken in (
        "    y = (\n",
        "    y = softmax(causal(\n",
        "    z = nowhere(q)\n",
        "    weight\n",
        '    "\n',
    ):
        text = SPEC.replace("    y = merge", f"{broken}    y = merge", 1)
        assert "scores: float[b, 4, n, n]" in told(editor, marked("sco¦res = 1.5", text)), broken
        assert "block std.swiglu" in told(editor, marked("std.swi¦glu", text)), broken


def test_the_operations_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs/language.md").read_text(encoding="utf-8")
    assert rows() == rows_of(page), "run python -m fastgrad_dsl.lsp.operations"
    assert rows().keys() == NAMES | {"rope_llama3", "rope_yarn"}


# ---------------------------------------------------------------- places of names


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("in dep¦th {", "param depth = 2"),
        ("lay¦er(x; heads)", "block layer"),
        ("softmax(causal(sco¦res", "    scores ="),
        ("return x + ¦std", "use std"),
        ('at "laye¦rs.0"', "        x = layer"),
        ("tab¦le.T", "    weight table"),
        ("tokens: int[b, ¦n]", "dim n"),
    ],
)
def test_a_name_leads_to_where_it_was_bound(editor: Editor, place: str, line: str) -> None:
    view, at = editor.at(marked(place))
    found = definition(editor.known, view, at)
    assert found is not None
    assert view.lines.text.splitlines()[found.range.start.line].startswith(line)


def test_definitions_in_the_library_and_in_used_files(editor: Editor) -> None:
    (editor.folder / "parts.tfg").write_text(PARTS)
    for text, uri, line in (
        (marked("std.swi¦glu"), "std/linear.tfg", "block swiglu"),
        (USER.replace("twice", "twi¦ce"), "parts.tfg", "block twice"),
        (USER.replace("by = 3", "b¦y = 3"), "parts.tfg", "block twice"),
    ):
        view, at = editor.at(text)
        found = definition(editor.known, view, at)
        assert found is not None
        assert found.uri.endswith(uri)
        target = Path(found.uri.removeprefix("file://")).read_text(encoding="utf-8")
        assert target.splitlines()[found.range.start.line].startswith(line)


def test_references_are_found_in_files_that_are_not_open(editor: Editor) -> None:
    (editor.folder / "user.tfg").write_text(USER)
    view, at = editor.at(PARTS.replace("twice", "twi¦ce"), "parts.tfg")
    found = references(editor.known, view, at, declaration=True)
    assert sorted(each.uri.rpartition("/")[2] for each in found) == ["parts.tfg", "user.tfg"]


def test_renaming_a_block_and_its_parameter_reaches_other_files(editor: Editor) -> None:
    for place, new in (("parts.twi¦ce", "double"), ("b¦y = 3.0", "factor")):
        editor.open(PARTS, "parts.tfg")
        view, at = editor.at(marked(place, USER))
        changes = rename(editor.known, view, at, new).changes or {}
        assert {uri.rpartition("/")[2] for uri in changes} == {"spec.tfg", "parts.tfg"}
        texts = {"spec.tfg": USER, "parts.tfg": PARTS}
        for uri, edits in changes.items():
            name = uri.rpartition("/")[2]
            editor.open(applied(texts[name], list(edits), editor.known), name)
        editor.open(editor.known.documents[view.path].text)
        assert editor.codes() == editor.codes("parts.tfg") == []


@pytest.mark.medium
@pytest.mark.parametrize(
    "path",
    wide(EXAMPLES, few=[path for path in EXAMPLES if path.stem in ("bounded", "vit")]),
    ids=lambda path: path.stem,
)
def test_every_name_of_an_example_can_be_renamed_and_back(editor: Editor, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    document = editor.open(text)
    view = editor.known.view(document.path)
    assert view is not None
    for each in {o.symbol: o for o in view.index.occurrences if o.defines}.values():
        at = view.range(each.span).start
        called = {o.symbol.name for o in view.index.occurrences if o.kind == "block" and not o.defines}
        if each.kind == "use" or (
            each.kind == "label" and each.symbol.name in called
        ):  # of two calls, one path
            with pytest.raises(Refused):
                rename(editor.known, view, at, "fresh_name")
            continue
        (edits,) = (rename(editor.known, view, at, "fresh_name").changes or {}).values()
        renamed = applied(text, list(edits), editor.known)
        other = Editor(editor.folder)
        document = other.open(renamed)
        assert other.codes() == [], each.symbol
        again = other.known.view(document.path)
        assert again is not None
        place = document.lines.position(renamed.index("fresh_name"))
        (edits,) = (rename(other.known, again, place, each.symbol.name).changes or {}).values()
        assert applied(renamed, list(edits), other.known) == text


@pytest.mark.parametrize(
    ("place", "new", "reason"),
    [
        ("std.swi¦glu", "other", "standard library"),
        ("soft¦max(causal", "other", "an operation of the language"),
        ("¦use std", "other", "not a name that the file gives"),
        ("sco¦res = 1.5", "q", "has a meaning in the block already"),
        ("param dep¦th", "heads", "has a meaning here already"),
        ("block lay¦er", "softmax", "has a meaning as an operation already"),
        ("sco¦res = 1.5", "repeat", "a reserved word"),
        ("sco¦res = 1.5", "a b", "is not a name"),
    ],
)
def test_what_cannot_be_renamed_is_refused(editor: Editor, place: str, new: str, reason: str) -> None:
    view, at = editor.at(marked(place))
    with pytest.raises(Refused, match=reason):
        rename(editor.known, view, at, new)


def test_a_text_with_syntax_errors_is_not_renamed(editor: Editor) -> None:
    view, at = editor.at(marked("sco¦res = 1.5", SPEC.replace("    y = merge", "    z = (\n    y = merge")))
    with pytest.raises(Refused, match="syntax errors"):
        prepare(editor.known, view, at)


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        (
            "    z = ¦",
            ["scores", "q", "x", "wq", "heads", "depth", "layer", "std", "softmax"],
            ["y", "table"],
        ),
        ("    z = std.¦", ["attention", "swiglu"], ["softmax", "layer"]),
        ("    z = std.att¦", ["attention", "attend"], ["q"]),
        ("    z = std.attention(q; heads = 4, ¦", ["kv_heads =", "causal =", "q"], ["heads =", "x ="]),
        ("    z = softmax(q; ¦", ["axis ="], ["x ="]),
        ("    ¦", ["weight", "repeat", "return"], ["budget"]),
        ("    weight k: ¦", ["float["], ["q"]),
        ("    weight k: float[d] = ¦", ["normal", "xavier"], []),
        ("    # ¦", [], ["weight"]),
    ],
)
def test_completion_in_a_block(editor: Editor, line: str, wanted: list[str], unwanted: list[str]) -> None:
    editor.open(SPEC)
    found = labels(editor, SPEC.replace("    y = merge", f"{line}\n    y = merge"))
    assert set(wanted) <= set(found)
    assert not set(unwanted) & set(found)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("    ¦", ["output", "gradient", "memory", "near", "trust", "on_violation", "at"]),
        ('    at "¦"', ["layers.*", "layers.0", "layers.1"]),
        ('    at "layers.*" ¦', ["relative", "degree", "near", "family", "exact"]),
        ("    trust = ¦", ["calibrated", "certified"]),
        ('    at "layers.*" family = ¦', ["balanced", "minimax", "taylor"]),
    ],
)
def test_completion_in_a_budget(editor: Editor, line: str, wanted: list[str]) -> None:
    editor.open(SPEC)
    assert labels(editor, SPEC.replace("    output <= 0.1", line)) == wanted


def test_completion_of_items(editor: Editor) -> None:
    assert {"model", "budget", "dim"} <= set(labels(editor, f"{SPEC}\n¦"))


@pytest.mark.parametrize(
    ("call", "name", "active"),
    [
        ("std.attention(¦", "x", "x: float[b, n, d]"),
        ("std.attention(q; ¦", "x", "heads: int"),
        ("std.attention(q; 4, qk_dim = ¦", "x", "qk_dim: int? = none"),
        ("layer(q, ¦", "x", "heads: int"),
        ("softmax(q; axis = ¦", "x", "axis = -1"),
    ],
)
def test_signature_help_knows_the_parameter(editor: Editor, call: str, name: str, active: str) -> None:
    view, at = editor.at(SPEC.replace("    y = merge", f"    z = {call}\n    y = merge"))
    found = signature_help(view, at, editor.known.view)
    assert found is not None
    assert found.signatures[0].parameters is not None
    assert found.active_parameter is not None
    assert found.signatures[0].parameters[found.active_parameter].label == active


# ---------------------------------------------------------------- layout and what is shown between the lines


def test_formatting_is_that_of_the_project(editor: Editor) -> None:
    for text in (SPEC.replace("    q = split", "\n\n\n  q   =   split"), SPEC + "\n\n\n", SPEC):
        document = editor.open(text)
        view = editor.known.view(document.path)
        assert view is not None
        assert applied(text, formatting(view), editor.known) == format_source(text)
    document = editor.open(SPEC.replace("{", "(", 1))
    view = editor.known.view(document.path)
    assert view is not None
    assert formatting(view) == []


def test_columns_are_utf16_units(editor: Editor) -> None:
    text = SPEC.replace("use std\n", "use std  # 😀 é\n").replace("    q = split", "    q = split")
    view, at = editor.at(marked("sco¦res = 1.5", text))
    assert "scores" in told(editor, marked("sco¦res = 1.5", text))
    place = view.lines.position(text.index("é"))
    assert place.character == len("use std  # ") + 3
    assert view.lines.offset(place) == text.index("é")
    assert at.line == text[: text.index("scores = 1.5")].count("\n")


def test_the_outline_and_what_folds(editor: Editor) -> None:
    document = editor.open(SPEC)
    view = editor.known.view(document.path)
    assert view is not None
    found = {each.name: [child.name for child in each.children or ()] for each in outline(view)}
    assert found["layer"] == ["wq"]
    assert found["tiny"] == ["table", "i"]
    lines = SPEC.splitlines()
    starts = [lines[each.start_line].split("(")[0].split(" {")[0].strip() for each in folding(view)]
    assert starts == ["block layer", "model tiny", "repeat i in depth", "budget"]


def test_tokens_have_meanings(editor: Editor) -> None:
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        document = editor.open(text)
        view = editor.known.view(document.path)
        assert view is not None
        kinds: dict[str, str] = {}
        data, line, column = semantic_tokens(view).data, 0, 0
        for place in range(0, len(data), 5):
            down, right, length, kind, _ = data[place : place + 5]
            line, column = line + down, right if down else column + right
            kinds[text.splitlines()[line][column : column + length]] = TYPES[kind]
        assert kinds["dim"] == kinds["model"] == "keyword"
        assert kinds["n"] == "typeParameter"
        assert "class" in kinds.values()


def test_hints_and_lenses(editor: Editor) -> None:
    document = editor.open(SPEC)
    view = editor.known.view(document.path)
    assert view is not None
    lines = SPEC.splitlines()
    said = {(lines[h.position.line].strip().split(" ")[0], str(h.label)) for h in hints(view, WHOLE)}
    assert ("q", ": float[b, 4, n, 8]") in said
    assert ("scores", ": float[b, 4, n, n]") in said
    assert ("y", "attention: balanced degree 4, rank 495 | balanced degree 3, rank 165") in said
    found = {
        lines[lens.range.start.line].split(" ")[0]: lens.command.title
        for lens in lenses(view)
        if lens.command
    }
    weights = 64 * 64 + 2 * (64 * 32 + 3 * 64 * 256 + 64)
    assert found["model"].startswith(f"{weights:,} parameters")
    plan = "1 balanced degree 4, rank 495; 1 balanced degree 3, rank 165; from n = "
    assert found["budget"].startswith(plan)
