"""Mutated files of a build and of a run, through what reads them: documents, weights, checkpoints, batches."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import fastgrad_dsl as fg
from attack.checkpoints import SHARD, TENSORS, write_shards
from attack.fuzz import Fuzz
from attack.mutations import mutated_bytes
from fastgrad_compiler.runtime import triton_tuned
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.report import ReportRequest, make_report
from fastgrad_dsl.calibration.data import named_batches
from fastgrad_dsl.checkpoints.exporting import export_checkpoint
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_dsl.commands.failures import diagnostics
from fastgrad_dsl.commands.terminal import print_report
from fastgrad_dsl.commands.train import TrainRequest, train_language_model
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.generation.reading import load_reading, save_reading
from fastgrad_dsl.generation.step_form import step_form
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.storage.weights import load_weights
from fastgrad_dsl.training.loop import Options
from fastgrad_grammar.render import render

SPEC = """use std
dim b
dim n <= 64
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 4] = normal(std = 0.02)
    x = embedding(table, tokens)
    x = x + std.attention(x; heads = 1, qk_dim = 2, causal = true, gain = 1.0)
    return x @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.1
    gradient <= 0.1
}
"""
STRANGE: tuple[object, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, 1e-308, 2**31, 2**63, 10**30, float("nan"),
    float("inf"), "", "x", "nan", "../x", "/etc/passwd", "\x00", "\ud800", "<script>", "n", "b * n", "9" * 5000, [], {},
    [[]], [None], {"": None}, [0] * 1000,
)  # fmt: skip
"""What stands in the place of a value of a document."""


@dataclass(frozen=True)
class Reader:
    """A kind of file: where it lies, its sound content, how it is mutated, and what reads it."""

    name: str
    path: Path
    content: bytes
    mutate: Callable[[random.Random, bytes], bytes]
    read: Callable[[], object]


def fuzz_files(fuzz: Fuzz, first: int, count: int, kinds: Sequence[Reader]) -> None:
    """Mutated files, a kind after another."""
    for index in range(first, first + count):
        reader = kinds[index % len(kinds)]
        chance = random.Random(fuzz.seed * 7919 + index)
        data = reader.mutate(chance, reader.content)
        reader.path.write_bytes(data)
        fuzz.case(f"{reader.name} {index}", lambda read=reader.read: outcome(read), lambda data=data: data)  # type: ignore[misc]
        reader.path.write_bytes(reader.content)


def outcome(read: Callable[[], object]) -> str:
    """Read; a refusal is rendered as the command line does."""
    try:
        read()
    except Exception as error:
        found = diagnostics(error)
        if not found:
            raise
        render(found, colour=True).encode()
        return f"refused, {found[0].code}"
    return "taken"


def readers(folder: Path) -> tuple[Reader, ...]:
    """Every kind, made from one tiny model that is compiled, calibrated and trained for a step."""
    spec, text = folder / "tiny.tfg", folder / "text"
    spec.write_text(SPEC, encoding="utf-8")
    text.write_bytes(bytes(range(256)) * 4)
    compiled = fg.compile(spec, target="torch").calibrate(dims={"n": 16}, measured_pace=False)
    build, run = folder / "build", folder / "run"
    compiled.write(build)
    model = compiled.module()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    weights, batches, tuned = (folder / name for name in ("w.safetensors", "b.safetensors", "tuned.json"))
    tuned.write_text(json.dumps({"a kernel": [64, 64, 16, 4, 2]}))
    weights.write_bytes(save(model.state_dict()))
    names = [f"{name}.{i}" for name in ("tokens", "targets") for i in (0, 1)]
    batches.write_bytes(save({name: tokens.clone() for name in names}))
    _train(compiled, text, run, resume=False)
    imported = write_shards(folder / "imported")
    import_checkpoint(imported, folder / "o.tfg")
    saved, state = run / "checkpoint.safetensors", folder / "state"
    save_reading(fg.read_prompt(model, "abc"), step_form(model), state)
    made = [
        ("plan", build / "plan.json", mutated_json, lambda: _report(build)),
        ("calibration", build / "calibration.json", mutated_json, lambda: _report(build)),
        ("weights", weights, mutated_safetensors, lambda: load_weights(compiled.module(), weights)),
        ("batches", batches, mutated_safetensors, lambda: _calibrate(compiled, batches)),
        ("checkpoint", saved, mutated_safetensors, lambda: _resume(compiled, text, run)),
        ("checkpoint-weights", saved, mutated_safetensors, lambda: load_weights(compiled.module(), saved)),
        ("manifest", build / "files.json", mutated_json, lambda: compiled.write(build)),
        ("tuned", tuned, mutated_json, lambda: triton_tuned.read(tuned)),
        ("config", imported / "config.json", mutated_json, lambda: _import(imported, folder / "a.tfg")),
        ("index", imported / f"{TENSORS}.index.json", mutated_json, lambda: _import(imported, folder / "a.tfg")),
        ("tensors", imported / SHARD, mutated_safetensors, lambda: _import(imported, folder / "a.tfg")),
        ("origin", folder / "o.origin.json", mutated_json, lambda: _export(folder / "o.tfg", folder / "back")),
        ("state", state, mutated_safetensors, lambda: _go_on(model, state)),
    ]  # fmt: skip
    return tuple(Reader(name, path, path.read_bytes(), mutate, read) for name, path, mutate, read in made)


def _import(folder: Path, spec: Path) -> None:
    import_checkpoint(folder, spec, force=True)
    fg.compile(spec)


def _export(spec: Path, folder: Path) -> None:
    export_checkpoint(spec, spec.with_suffix(".safetensors"), folder, force=True)


def _report(build: Path) -> None:
    report = make_report(ReportRequest(build, {}, None, None, None, {}, 0, measure=False), lambda what: None)
    to_json(report).encode()
    render_html(report).encode()
    with redirect_stdout(io.StringIO()):
        print_report(report)


def _calibrate(compiled: Compiled, batches: Path) -> None:
    """A batch that is taken is one that the model and its objective run on."""
    found, _ = named_batches(compiled, str(batches), {}, 0)
    assert compiled.loss is not None
    for inputs, targets in found or ():
        compiled.loss(compiled.module()(inputs), targets)


def _train(compiled: Compiled, text: Path, run: Path, *, resume: bool) -> None:
    options = Options(steps=1, tokens=8, validation_batches=1, warmup=1)
    with redirect_stdout(io.StringIO()):
        train_language_model(compiled, TrainRequest(text, run, options, resume=resume, sample=0))


def _go_on(model: nn.Module, state: Path) -> None:
    """A state that is taken is one from which the model goes on, unless it says that it has more tokens than that."""
    reading = load_reading(step_form(model), state)
    if int(reading.state.position) <= 62:
        list(fg.generate(model, "", tokens=2, after=reading))


def _resume(compiled: Compiled, text: Path, run: Path) -> None:
    again = run.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(run, again)
    _train(compiled, text, again, resume=True)


# ---------------------------------------------------------------- mutations


def mutated_json(chance: random.Random, data: bytes) -> bytes:
    """A document with values replaced, dropped, doubled or moved; one of four is damaged as bytes."""
    if chance.random() < 0.25:
        return mutated_bytes(chance, data)
    document = json.loads(data)
    for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
        document = _changed(chance, document)
    if chance.random() < 0.01:
        return b"[" * 100_000
    return json.dumps(document).encode()


def _changed(chance: random.Random, document: Any) -> Any:
    """The document with one change at a random place; places near the top are as likely as those below."""
    if not isinstance(document, dict | list) or not document or chance.random() < 0.1:
        return deepcopy(chance.choice(STRANGE))
    keys: list[Any] = list(document) if isinstance(document, dict) else list(range(len(document)))
    key: Any = chance.choice(keys)
    match chance.randrange(8):
        case 0:
            del document[key]
        case 1 if isinstance(document, list):
            document.append(deepcopy(document[key]))
        case 1:
            renamed: Any = f"{key}_"
            document[renamed] = document.pop(key)
        case 2:
            document[key] = deepcopy(document[chance.choice(keys)])
        case _:
            document[key] = _changed(chance, document[key])
    return document


def mutated_safetensors(chance: random.Random, data: bytes) -> bytes:
    """A file with its header changed as a document, its numbers as bytes, or both."""
    length = struct.unpack("<Q", data[:8])[0]
    header, numbers = data[8 : 8 + length], data[8 + length :]
    kind = chance.randrange(4)
    if kind == 0:
        return mutated_bytes(chance, data)
    if kind == 1:
        numbers = _strange_numbers(chance, numbers)
    else:
        header = _mutated_header(chance, header)
    size = len(header) if chance.random() < 0.95 else chance.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + header + numbers


def _strange_numbers(chance: random.Random, numbers: bytes) -> bytes:
    found = bytearray(numbers)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(max(1, len(found) - 3)) & ~3
        number = chance.choice((float("nan"), float("inf"), -1.0, 3e38, 1e-40))
        found[place : place + 4] = struct.pack("<f", number)
    return bytes(found)


def _mutated_header(chance: random.Random, header: bytes) -> bytes:
    """The JSON in front; the metadata, whose values must be texts, are changed as texts."""
    document = json.loads(header)
    metadata = document.get("__metadata__")
    if metadata and chance.random() < 0.5:
        key = chance.choice(list(metadata))
        if chance.random() < 0.3:
            del metadata[key]
        elif metadata[key].startswith("{") and chance.random() < 0.7:
            metadata[key] = json.dumps(_changed(chance, json.loads(metadata[key])))
        else:
            metadata[key] = str(chance.choice(STRANGE))
        return json.dumps(document).encode()
    return json.dumps(_changed(chance, document)).encode()
