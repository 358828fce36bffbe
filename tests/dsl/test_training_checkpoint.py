"""A checkpoint that lies, is cut off or is another run's is a diagnostic, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgrad_dsl.training.folder import CHECKPOINT
from fastgrad_dsl.training.loop import Options, train
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.training_model import Bigram, loss, text_data

OPTIONS = Options(
    steps=2, tokens=8, batch=2, warmup=1, validate_every=2, validation_batches=1, checkpoint_every=2
)
LONGER = replace(OPTIONS, steps=4)
Contents = tuple[dict[str, Tensor], dict[str, str]]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """The tensors and the header of a good checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    list(train(Bigram(), loss, text_data(), OPTIONS, folder))
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def resumed(folder: Path, options: Options = LONGER) -> TfgError | None:
    """What resuming says; None where it trains to the end."""
    try:
        list(train(Bigram(), loss, text_data(), options, folder, resume=True))
    except TfgError as error:
        return error
    return None


def code_of(folder: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> tuple[str, str]:
    save_file(tensors, folder / CHECKPOINT, header)
    error = resumed(folder)
    assert error is not None
    (diagnostic,) = error.diagnostics
    return diagnostic.code, diagnostic.message


def test_the_good_one_goes_on(tmp_path: Path, contents: Contents) -> None:
    save_file(contents[0], tmp_path / CHECKPOINT, contents[1])
    assert resumed(tmp_path) is None


LIES = {
    "step": [
        "abc",
        "-1",
        "1.5",
        "true",
        "null",
        '"2"',
        "1e999",
        "NaN",
        "9" * 5000,
        "",
        "[2]",
        "9007199254740993",
    ],
    "validated": ["3", "-2", "x", "1.0"],
    "seconds": ["-1", "Infinity", "NaN", '"1"', "1e300", "[]"],
    "settings": ["[]", "null", '{"seed": null}', '{"seed": [0]}', "{", "[" * 100_000],
    "identity": ["[]", '{"the text": 1}', "null"],
    "optimiser": ["null", '"AdamW"', "[]"],
    "idle": ["{}", "[1]", "null", '"table"'],
    "plan": ["[]", "1", '"x"'],
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(tmp_path: Path, contents: Contents, name: str) -> None:
    tensors, header = contents
    for value in LIES[name]:
        code, message = code_of(tmp_path, tensors, header | {name: value})
        assert code == "FG413", (value[:20], message)
        assert name in message or "validated" in message
        assert len(message) < 300 + len(str(tmp_path))
    without = {key: text for key, text in header.items() if key != name}
    assert code_of(tmp_path, tensors, without)[0] == "FG413"


def test_headers_of_another_run(tmp_path: Path, contents: Contents) -> None:
    tensors, header = contents
    other = {
        "settings": json.dumps({**json.loads(header["settings"]), "seed": 7}),
        "identity": json.dumps({"the text": "sha256 " + "0" * 64}),
        "optimiser": json.dumps({"name": "SGD"}),
    }
    messages = {name: code_of(tmp_path, tensors, header | {name: text}) for name, text in other.items()}
    assert all(code == "FG414" for code, _ in messages.values())
    assert "seed was 7, is 0" in messages["settings"][1]
    assert "the text was sha256 000000000000, is none" in messages["identity"][1]
    assert "the optimiser was SGD" in messages["optimiser"][1]
    assert (
        "format fastgrad-checkpoint-1"
        in code_of(tmp_path, tensors, header | {"format": "fastgrad-checkpoint-1"})[1]
    )


Change = Callable[[Tensor], Tensor]
CHANGES: dict[str, Change] = {
    "longer": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "another type": lambda t: t.to(torch.float16) if t.is_floating_point() else t.float(),
    "empty": lambda t: t.new_empty(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_missing_or_of_another_kind(tmp_path: Path, contents: Contents, change: str) -> None:
    tensors, header = contents
    for name, tensor in tensors.items():
        wrong = tensors | {name: CHANGES[change](tensor)}
        expected = "FG414" if name.startswith("model.") else "FG413"
        assert code_of(tmp_path, wrong, header)[0] == expected, name
        missing = {key: value for key, value in tensors.items() if key != name}
        assert code_of(tmp_path, missing, header)[0] == expected, name
    assert code_of(tmp_path, tensors | {"optimiser.other.step": torch.ones(())}, header)[0] == "FG413"
    assert code_of(tmp_path, tensors | {"guard.0": torch.zeros(9, dtype=torch.float64)}, header)[0] == "FG413"
    moved = tensors | {"optimiser.gain.step": torch.tensor(torch.nan)}
    assert code_of(tmp_path, moved, header)[0] == "FG413"


def test_files_that_are_no_checkpoint(tmp_path: Path, contents: Contents) -> None:
    path = tmp_path / CHECKPOINT
    save_file(*contents[:1], path, contents[1])
    whole = path.read_bytes()
    for content in (b"", b"not safetensors", whole[:7], whole[:100], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        error = resumed(tmp_path)
        assert error is not None
        assert error.diagnostics[0].code == "FG413"
    path.unlink()
    os.mkfifo(path)
    error = resumed(tmp_path)
    assert error is not None
    assert "not a regular file" in error.diagnostics[0].message


def test_mutated_bytes(tmp_path: Path, contents: Contents) -> None:
    """Headers with a few bytes changed: a diagnostic or a run, nothing else."""
    save_file(*contents[:1], tmp_path / CHECKPOINT, contents[1])
    whole = (tmp_path / CHECKPOINT).read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(size)] = chance.choice([chance.randrange(256), *b'"0{}[],:-e'])
        (tmp_path / CHECKPOINT).write_bytes(content)
        error: Any = resumed(tmp_path)
        refused += error is not None
        assert error is None or {each.code for each in error.diagnostics} <= {"FG413", "FG414"}
    assert refused > 150
