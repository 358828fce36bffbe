"""Documents of a build folder: what we write is of its form, and what is not is a diagnostic with its place."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from attack.quoting import PARTS, is_shown
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.commands.terminal import print_report
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.files import Files
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.documents.plan import Approximated, Plan
from fastgrad_dsl.documents.read import parse_document, read_document
from fastgrad_dsl.documents.report import Report
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.report.document import build_report
from fastgrad_dsl.report.page import render_html
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.render import render
from tests.conftest import Golden
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import NAMES, small
from tests.dsl.schemas import KINDS, SCHEMAS, schema_text, validator

VALUES: tuple[object, ...] = (
    None, True, 0, -1, 1, 1.5, 1e99, 1e-199, 2**62, 10**30, "", "x", "1", "n*n*n", "n/7", [], [0], {}, {"a": 1}, [[[]]],
    *PARTS[:20],
)  # fmt: skip
LAST = "layers.1.attention.attend"
ODD = ("NaN", "Infinity", "1e999", "1" * 5000, "[" * 3000, '{"a": 1, "a": 2}', '"\\ud800"', "01", "'x'", "")


def refusal(content: bytes, kind: str = "plan.json") -> str:
    with pytest.raises(TfgError) as found:
        parse_document(content, KINDS[kind], kind)
    (diagnostic,) = found.value.diagnostics
    assert diagnostic.code == "FG430"
    assert is_shown(render([diagnostic]), "\n")
    assert len(diagnostic.message) < 400
    return diagnostic.message


@cache
def plan() -> str:
    return small("bounded").files["plan.json"]


@cache
def calibration() -> str:
    return to_json(calibration_of(json.loads(plan())))


# ---------------------------------------------------------------- what we write


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_is_of_its_form(name: str) -> None:
    files = small(name).files
    for kind in ("plan.json", "report.json"):
        assert to_json(parse_document(files[kind].encode(), KINDS[kind], kind)) == files[kind]
        validator(kind).validate(json.loads(files[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_published_schemas_are_those_of_the_types(kind: str, golden: Golden) -> None:
    golden(SCHEMAS / kind, schema_text(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_schemas_and_closed(kind: str) -> None:
    """A key that a schema does not know is refused, so that none can be added without a new version."""
    schema = json.loads((SCHEMAS / kind).read_text(encoding="utf-8"))
    validator(kind).check_schema(schema)
    objects = [each for each in (schema, *schema["$defs"].values()) if "properties" in each]
    assert all(each["additionalProperties"] is False for each in objects)
    assert all(each["required"] for each in objects)
    assert format_of(KINDS[kind]).startswith(f"fastgrad-{kind.removesuffix('.json')}-")


def test_a_document_is_read_by_key_as_its_json() -> None:
    found, expected = parse_document(plan().encode(), Plan, "plan.json"), json.loads(plan())
    assert (
        found["attentions"][0]["flops"]["exact"]["forward"]
        == expected["attentions"][0]["flops"]["exact"]["forward"]
    )
    assert json.loads(to_json(found)) == expected
    with pytest.raises(KeyError):
        found["more"]
    with pytest.raises(AttributeError):
        found.model = "another"  # type: ignore[misc]
    assert [type(entry) for entry in found.attentions] == [Approximated] * 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("attentions/0/degree", "x", 'plan.json: /attentions/0/degree: expected of type integer, null, found "x"'),
        ("attentions/0/degree", 2.0, "plan.json: /attentions/0/degree: expected of type integer, null, found 2.0"),
        ("attentions/0/degree", None, "plan.json: /attentions/0/degree: expected of type integer, found null"),
        ("attentions/1/bound", -1, "plan.json: /attentions/1/bound: expected at least 0, found -1"),
        ("attentions/0/kernel", "../x", 'plan.json: /attentions/0/kernel: expected a name, found "../x"'),
        ("attentions/0/queries", "n +", 'plan.json: /attentions/0/queries: expected a dim, found "n +"'),
        ("attentions/0/queries", "q", 'plan.json: /attentions/0/queries: no dim "q" is declared'),
        ("attentions/0/keys", "n*n*n*n*n", f"plan.json: /attentions/0: sequences of more than {2**63} tokens"),
        ("attentions/0/more", 1, 'plan.json: /attentions/0: the key "more" is unknown'),
        ("attentions/0/coefficients", [1.0], "plan.json: /attentions/0/coefficients: expected 3 for this degree"),
        ("attentions/0/path", LAST, f'plan.json: /attentions/1/path: "{LAST}" comes twice'),
        ("target", "cuda", 'plan.json: /target: expected one of torch, cpp, triton, auto, found "cuda"'),
        ("params/a~1b", 1, "plan.json: /params/a~1b: expected of type string, found 1"),
        ("format", "fastgrad-plan-2", 'plan.json: /format: expected "fastgrad-plan-5", found "fastgrad-plan-2"'),
        ("inputs", 10**4, "plan.json: /inputs: expected of type array, found 10000"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_with_its_place(place: str, value: object, said: str) -> None:
    document = json.loads(plan())
    *way, last = place.split("/")
    at = document
    for step in way:
        at = at[int(step) if isinstance(at, list) else step]
    at[last.replace("~1", "/")] = value
    assert refusal(json.dumps(document).encode()) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "plan.json: not JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1,\n}', "plan.json: not JSON: Expecting property name enclosed in double quotes at line 2, column 1"),
        (b'{"a": "\xff"}', "plan.json: not UTF-8 text: byte 0xff at 7"),
        (b'{"a": [0, NaN]}', "plan.json: /a/1: found NaN"),
        (b'{"a": -Infinity}', "plan.json: /a: found -Infinity"),
        (b'{"a": 1e999}', "plan.json: /a: found a number that is not between 1e-200 and 1e+100"),
        (b'{"a": 99999999999999999999999}', "plan.json: /a: found an integer of more than 64 bits"),
        (b'{"a": {"b": 1, "b": 2}}', 'plan.json: /a: found the key "b" twice'),
        (b'{"a":' * 100 + b"1" + b"}" * 100, f"plan.json: /{'/'.join('a' * 8)}: nested more than 64 deep"),
        (b"[" * 100_000, "plan.json: nested more than 64 deep"),
        (b"[]", 'plan.json: /format: expected "fastgrad-plan-5"'),
        (b"{}", 'plan.json: /format: expected "fastgrad-plan-5"'),
        (b'{"format": "fastgrad-plan-5"}', 'plan.json: the key "model" is missing'),
        (b'{"format": [1]}', 'plan.json: /format: expected "fastgrad-plan-5", found [1]'),
    ],
)  # fmt: skip
def test_a_text_that_is_no_document_is_named_with_its_place(content: bytes, said: str) -> None:
    assert refusal(content) == said


def test_names_of_files_stay_inside() -> None:
    good = {"format": format_of(Files), "files": {"stages/01-a.txt": "0" * 64}}
    assert parse_document(json.dumps(good).encode(), Files, "files.json").files == good["files"]
    for name in ("../a", "/etc/passwd", "a/../../b", "", ".", "./a", "a//b", "a/", "a\0b"):
        refusal(json.dumps({**good, "files": {name: "0" * 64}}).encode(), "files.json")
    refusal(json.dumps({**good, "files": {"a": "0" * 63}}).encode(), "files.json")


def test_only_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(TfgError, match="FG001"):
            read_document(path, Plan)


@pytest.mark.parametrize("name", ["plan.json", "calibration.json", "spec.tfg"])
def test_a_damaged_folder_is_a_diagnostic(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small("bounded").write(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[" * 5000):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["fastgrad", "report", str(tmp_path), "--no-measure"])
        if name == "spec.tfg" and content != b"\xff\xfe":
            continue  # any text is shown as it is
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert name in capsys.readouterr().err


# ---------------------------------------------------------------- fuzz


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


def other(source: random.Random, value: Any) -> Any:
    """Another value of the same type; a list or an object as it is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return source.choice((0, 1, 2, 3, 7, 64, 1000, 2**40, 2**62))
    if isinstance(value, float):
        return value * source.choice((0.0, 1e-190, 1e-30, 0.5, 2.0, 1e3, 1e30, 1e90))
    return (
        source.choice((*PARTS, "exact", "auto", "own", "taylor", "n", "data"))
        if isinstance(value, str)
        else value
    )


def mutated(source: random.Random, document: str) -> bytes:
    """A document with one to three values, keys or bytes that are others."""
    changed = json.loads(document)
    gentle = source.random() < 0.6  # values are others of their type
    for _ in range(source.randint(1, 3)):
        container, key = source.choice(list(places(changed)))
        if gentle:
            container[key] = other(source, container[key])
            continue
        kind = source.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[source.choice(PARTS)] = container[key]
        elif kind == 2 and isinstance(container, list):
            container.append(container[key])
        elif kind == 3 and isinstance(container[key], int | float):
            container[key] *= source.choice((-1, 0, 2, 1000, 1e-9, 1e60))
        else:
            container[key] = source.choice(VALUES)
    content = bytearray(json.dumps(changed).encode())
    if gentle:
        return bytes(content)
    if source.random() < 0.1:
        content[source.randrange(len(content))] = source.randrange(256)
    if source.random() < 0.1:
        found = json.dumps(source.choice(("gpt", "n", "layers.0.attention.attend"))).encode()
        content = bytearray(bytes(content).replace(found, source.choice(ODD).encode(), 1))
    return bytes(content)


def agrees_with_the_schemas(files: dict[str, bytes], *, refused: bool) -> None:
    """What a schema refuses is refused; and what is read, the schemas take."""
    try:
        trees = {kind: json.loads(content) for kind, content in files.items()}
    except (ValueError, RecursionError):
        trees = {}
    assert refused or all(validator(kind).is_valid(tree) for kind, tree in trees.items())


def reads_or_refuses(source: random.Random) -> bool:
    """Whether two mutated documents were read, and their report written in all its forms; TfgError is an answer too."""
    files = {"plan.json": plan().encode(), "calibration.json": calibration().encode()}
    name = source.choice(list(files))
    files[name] = mutated(source, files[name].decode())
    try:
        read = parse_document(files["plan.json"], Plan, "plan.json")
        shown = parse_document(files["calibration.json"], Calibration, "calibration.json")
    except TfgError as error:
        found = error.diagnostics
    else:
        found = ()
    assert {each.code for each in found} <= {"FG430"}
    agrees_with_the_schemas(files, refused=bool(found))
    assert is_shown(render(found), "\n")
    if found:
        return False
    report = build_report(read, calibration=shown, spec="model\n")
    parse_document(to_json(report).encode(), Report, "report.json")
    render_html(report).encode()
    print_report(report)
    return True


@pytest.mark.medium
def test_mutated_documents_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    accepted = sum(reads_or_refuses(random.Random(seed)) for seed in range(60))
    assert is_shown(capsys.readouterr().out, "\n")
    assert 4 < accepted < 56


@pytest.mark.slow
def test_many_mutated_documents_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(4_000):
        reads_or_refuses(random.Random(seed))
        capsys.readouterr()
