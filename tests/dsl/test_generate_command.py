"""`fastgrad generate`: what it prints and writes, where it finds weights and tokenizer, and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.commands import generate as command
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.commands.failures import INTERRUPTED, NO_READER
from fastgrad_dsl.generation.generate import go_on
from fastgrad_dsl.generation.reading import load_reading
from fastgrad_dsl.generation.step_form import step_form
from tests.dsl.tokenizers_of_tests import write_tokenizer

SPEC = """use std
dim b
dim n <= 64
model tiny(tokens: int[b, n]) -> float[b, n, {vocab}] {{
    weight table: float[{vocab}, 8] = normal(std = 1.0)
    x = embedding(table, tokens)
    x = x + std.attention(x; heads = 1, causal = true)
    return x @ table.T
}}
objective loss(logits: float[b, n, {vocab}], targets: int[b, n]) = cross_entropy(logits, targets)
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.tfg, a build with its weights, the weights of two models, and whole numbers of one."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.tfg").write_text(SPEC.format(vocab=256))
    compiled = fg.compile(folder / "tiny.tfg", target="torch", validate=False, out=folder / "build")
    for seed, path in ((1, "w.safetensors"), (1, "build/weights.safetensors"), (2, "other.safetensors")):
        save_file(compiled.module(seed=seed).state_dict(), folder / path)
    whole = {name: each.to(torch.int32) for name, each in load_file(folder / "w.safetensors").items()}
    save_file(whole, folder / "whole.safetensors")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fastgrad(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `fastgrad generate`; gives status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", "generate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


def written(fastgrad: Run, *arguments: str) -> str:
    """The text that a call writes, without the line's end."""
    status, out, err = fastgrad(*arguments)
    assert status == 0, err
    assert out.endswith("\n")
    return out[:-1]


SHORT = ("--tokens", "12", "--seed", "3")


def expected(prompt: bytes, tokens: int, seed: int) -> str:
    """What the weights write, by the API."""
    drawn = fg.generate(fg.load("build"), prompt, tokens=tokens, sampling=fg.Sampling(seed=seed))
    return bytes(int(token) for token in drawn).decode(errors="replace")


def test_a_spec_a_build_and_the_api_write_the_same(fastgrad: Run) -> None:
    text = written(fastgrad, "build", "--prompt", "abc", *SHORT)
    assert text == expected(b"abc", 12, 3)
    assert text == written(
        fastgrad, "tiny.tfg", "--weights", "w.safetensors", "--target", "torch", "--prompt", "abc", *SHORT
    )
    status, _, err = fastgrad("build", "--prompt", "abc", *SHORT)
    assert status == 0
    first, second = err.splitlines()
    assert first.startswith("read 3 bytes in ")
    assert second.startswith("wrote 12 bytes in ")
    assert second.endswith("; the state of a text takes 4.01 KiB")


def test_prompts_from_files_and_the_standard_input(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytes([0, 255, 10, 64])
    Path("prompt.bin").write_bytes(raw)
    text = written(fastgrad, "build", "--prompt", "@prompt.bin", *SHORT)
    assert text == expected(raw, 12, 3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert written(fastgrad, "build", "--prompt", "-", *SHORT) == text
    assert written(fastgrad, "build", "--prompt", os.fsdecode(raw[1:]), *SHORT) == expected(raw[1:], 12, 3)


def test_other_weights_replace_those_of_a_build(fastgrad: Run) -> None:
    text = written(fastgrad, "build", "--weights", "other.safetensors", "--prompt", "abc", *SHORT)
    assert text != written(fastgrad, "build", "--prompt", "abc", *SHORT)


def test_samples_are_labelled_and_each_is_that_of_its_seed(fastgrad: Run) -> None:
    status, out, _ = fastgrad(
        "build", "--prompt", "abc", "--tokens", "8", "--seed", "5", "--samples", "3", "--json", "found.json"
    )
    assert status == 0
    texts = [expected(b"abc", 8, seed) for seed in (5, 6, 7)]
    assert out == "".join(
        f"sample {number} (seed {number + 4}):\n{text}\n" for number, text in enumerate(texts, 1)
    )
    found = json.loads(Path("found.json").read_text())
    assert found["format"] == "fastgrad-generation-1"
    assert [(each["text"], each["tokens"], each["seed"], each["ended"]) for each in found["samples"]] == [
        (text, 8, seed, "tokens") for text, seed in zip(texts, (5, 6, 7), strict=True)
    ]
    assert (found["prompt"]["tokens"], found["prompt"]["before"]) == (3, 0)
    assert found["settings"] == {
        "tokens": 8, "stop": [], "temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "seed": 5,
    }  # fmt: skip


def test_settings_reach_the_sampler(fastgrad: Run) -> None:
    greedy = written(fastgrad, "build", "--prompt", "abc", "--tokens", "6", "--temperature", "0")
    for one in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1"), ("--temperature", "1e-9")):
        assert written(fastgrad, "build", "--prompt", "abc", "--tokens", "6", *one) == greedy
    penalised = ("--temperature", "0", "--repetition-penalty", "1e9")
    text = written(fastgrad, "build", "--prompt", "abc", "--tokens", "6", *penalised)
    assert text != greedy


def test_a_text_ends_before_a_stop_string(fastgrad: Run) -> None:
    text = written(fastgrad, "build", "--prompt", "abc", *SHORT)
    stops = ("--stop", text[4:6], "--stop", text[9:], "--stop", "never there")
    found = written(fastgrad, "build", "--prompt", "abc", *SHORT, *stops, "--json", "found.json")
    assert found == text[: text.index(text[4:6])]
    (sample,) = json.loads(Path("found.json").read_text())["samples"]
    assert (sample["text"], sample["ended"]) == (found, "stop")


def test_a_state_goes_on_where_the_prompt_ended(fastgrad: Run) -> None:
    text = written(fastgrad, "build", "--prompt", "abcdef", *SHORT)
    assert written(fastgrad, "build", "--prompt", "abcdef", *SHORT, "--save-state", "s") == text
    for _ in range(2):  # the file is left as it is
        assert written(fastgrad, "build", "--load-state", "s", *SHORT) == text
    assert written(fastgrad, "build", "--prompt", "abc", "--tokens", "0", "--save-state", "s") == ""
    status, out, err = fastgrad("build", "--load-state", "s", "--prompt", "def", *SHORT)
    assert (status, out) == (0, text + "\n")
    assert err.startswith("read 3 bytes in ")
    assert "after 3 bytes of the state" in err.splitlines()[0]


def test_the_penalty_knows_the_tokens_of_a_loaded_state(fastgrad: Run) -> None:
    penalised = ("--tokens", "6", "--repetition-penalty", "1e9")
    text = written(fastgrad, "build", "--prompt", "abcdef", *penalised)
    written(fastgrad, "build", "--prompt", "abc", "--tokens", "0", "--save-state", "s")
    assert written(fastgrad, "build", "--load-state", "s", "--prompt", "def", *penalised) == text


# ---------------------------------------------------------------- tokenizers


def test_a_run_folder_has_weights_and_tokenizer(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write_tokenizer(Path("tokenizer.json"))
    Path("words.tfg").write_text(SPEC.format(vocab=size + 3))
    Path("text.txt").write_text("the naïve caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} " * 200)
    options = (
        "--text",
        "text.txt",
        "--seq",
        "8",
        "--steps",
        "2",
        "--sample",
        "5",
        "-o",
        "run",
        "--target",
        "torch",
    )
    train = ["fastgrad", "train", "words.tfg", *options, "--tokenizer", "tokenizer.json"]
    monkeypatch.setattr(sys, "argv", train)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert Path("run/tokenizer.json").read_bytes() == Path("tokenizer.json").read_bytes()
    Path("tokenizer.json").unlink()
    status, _, err = fastgrad("run", "--prompt", "the caf\N{LATIN SMALL LETTER E WITH ACUTE}", *SHORT)
    assert status == 0
    assert "wrote 12 tokens in " in err
    monkeypatch.setattr(sys, "argv", ["fastgrad", "train", "words.tfg", *options, "--resume"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2


def test_tokenizers_that_cannot_be_used(fastgrad: Run) -> None:
    size = write_tokenizer(Path("large.json"))
    Path("garbled.json").write_text("{}")
    Path("folder").mkdir()
    for path, said in (
        ("none.json", "cannot use the tokenizer none.json: No such file or directory"),
        ("folder", "cannot use the tokenizer folder: it is a folder"),
        ("garbled.json", "cannot use the tokenizer garbled.json: "),
        ("large.json", f"the tokenizer has {size} tokens, and model tiny 256"),
    ):
        status, out, err = fastgrad("build", "--prompt", "abc", "--tokenizer", path)
        assert (status, out) == (2, "")
        assert err.startswith(f"error[FG436]: {said}")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("build",), "FG437"),
        (("build", "--prompt", ""), "FG437"),
        (("build", "--prompt", "@none.txt"), "FG411"),
        (("build", "--prompt", "@."), "FG411"),
        (("build", "--prompt", "abc", "--tokens", "62"), "FG437"),
        (("build", "--prompt", "abc", "--stop", ""), "FG416"),
        (("build", "--prompt", "abc", "--set", "vocab=3"), "FG416"),
        (("build", "--prompt", "abc", "--model", "tiny"), "FG416"),
        (("build", "--prompt", "abc", "--include", "."), "FG416"),
        (("build", "--prompt", "abc", "--target", "triton"), "FG416"),
        (("build", "--prompt", "abc", "--save-state", "new", "--json", "new"), "FG416"),
        (("build", "--prompt", "abc", "--save-state", "new", "--json", "build/../new"), "FG416"),
        (("build", "--prompt", "abc", "--weights", "whole.safetensors"), "FG418"),
        (("build", "--prompt", "abc", "--load-state", "none"), "FG435"),
        (("build", "--prompt", "abc", "--load-state", "w.safetensors"), "FG435"),
        (("build", "--prompt", "abc", "--load-state", "tiny.tfg"), "FG435"),
        (("build", "--prompt", "abc", "--save-state", "build"), "FG421"),
        (("build", "--prompt", "abc", "--weights", "tiny.tfg"), "FG418"),
        (("tiny.tfg", "--prompt", "abc"), "FG418"),
        (("none.tfg", "--prompt", "abc"), "FG001"),
        ((".", "--prompt", "abc"), "FG419"),
    ],
)
def test_what_is_refused(fastgrad: Run, arguments: tuple[str, ...], code: str) -> None:
    status, out, err = fastgrad(*arguments)
    assert (status, out) == (2, ""), err
    assert err.startswith(f"error[{code}]: "), err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--tokens", ("-1", "x", "1e3")),
        ("--temperature", ("-0.1", "nan", "inf")),
        ("--top-k", ("0", "-1")),
        ("--top-p", ("-0.1", "1.1", "nan")),
        ("--min-p", ("-0.1", "1.1", "nan")),
        ("--repetition-penalty", ("0", "-1", "nan", "inf")),
        ("--seed", ("-1", str(1 << 63))),
        ("--samples", ("0", "1025")),
    ],
)
def test_numbers_out_of_range(fastgrad: Run, option: str, values: tuple[str, ...]) -> None:
    for value in values:
        status, out, err = fastgrad("build", "--prompt", "abc", option, value)
        assert (status, out) == (2, "")
        assert f"Invalid value for '{option}'" in err


def test_a_model_without_a_step_form(fastgrad: Run) -> None:
    """The place that has none, where the text is there."""
    Path("both.tfg").write_text(SPEC.format(vocab=256).replace("causal = true", "causal = false"))
    fg.compile("both.tfg", target="torch", validate=False, out="both")
    status, out, err = fastgrad("both", "--weights", "w.safetensors", "--prompt", "abc")
    assert (status, out) == (2, "")
    assert err.startswith(
        "error[FG434]: Tiny cannot be run token by token: it was generated without a step form"
    )
    status, out, err = fastgrad("both.tfg", "--weights", "w.safetensors", "--prompt", "abc")
    assert (status, out) == (2, "")
    assert err.startswith("error[FG501]: ")


def test_a_state_of_another_model_or_a_damaged_one(fastgrad: Run) -> None:
    written(fastgrad, "build", "--prompt", "abc", "--tokens", "0", "--save-state", "s")
    status, out, err = fastgrad("build", "--weights", "other.safetensors", "--load-state", "s")
    said = "error[FG435]: s holds the state of another model, or of other weights\n"
    assert (status, out, err) == (2, "", said)
    content, tensors = Path("s").read_bytes(), {name: x.clone() for name, x in load_file("s").items()}
    with safe_open("s", "pt") as stream:
        about = stream.metadata()
    for damaged in (b"", content[:-3], content[: len(content) // 2], b"\xff" * 40):
        Path("s").write_bytes(damaged)
        status, _, err = fastgrad("build", "--load-state", "s")
        assert status == 2
        assert err.startswith("error[FG435]: s is not a state: ")
    model = step_form(fg.load("build"))
    for name, tensor in tensors.items():
        for other in (
            {},
            {name: tensor[..., None]},
            {name: tensor.char()},
            {name: tensor, "x": torch.ones(1)},
        ):
            save_file({**{key: x for key, x in tensors.items() if key != name}, **other}, "s", about)
            with pytest.raises(fg.TfgError, match=r"^\[FG435\] s "):
                load_reading(model, Path("s"))
    for position in (-1, 65, 2**40, 2**63 - 1):  # the caches hold 64 tokens
        save_file({**tensors, "position": torch.tensor(position)}, "s", about)
        with pytest.raises(fg.TfgError, match=r"^\[FG435\] s has tensors that are not those"):
            load_reading(model, Path("s"))


def test_weights_that_are_not_finite_are_a_diagnostic(fastgrad: Run) -> None:
    weights = load_file("w.safetensors")
    save_file({name: torch.full_like(each, torch.nan) for name, each in weights.items()}, "nan.safetensors")
    status, out, err = fastgrad("build", "--weights", "nan.safetensors", "--prompt", "abc", *SHORT)
    assert (status, out) == (2, "")
    assert err.startswith("error[FG427]: the model gives logits of the next token that are not finite")


# ---------------------------------------------------------------- stopping


def test_an_interrupt_keeps_the_text_so_far(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After five tokens."""

    def interrupted(*given: Any) -> Iterator[Tensor]:
        yield from itertools.islice(go_on(*given), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "go_on", interrupted)
    status, out, _ = fastgrad("build", "--prompt", "abc", *SHORT, "--json", "found.json")
    assert (status, out) == (INTERRUPTED, expected(b"abc", 5, 3) + "\n")
    (sample,) = json.loads(Path("found.json").read_text())["samples"]
    assert (sample["tokens"], sample["ended"]) == (5, "interrupt")


def test_a_reader_that_goes_away_is_no_error(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        status, _, err = fastgrad("build", "--prompt", "abc", *SHORT)
    assert (status, err) == (NO_READER, "")


def test_a_text_is_shown_while_it_comes(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(command, "_show", shown.append)
    fastgrad("build", "--prompt", "abc", *SHORT)
    assert len(shown) == 13
    assert "".join(shown) == expected(b"abc", 12, 3) + "\n"


def test_a_terminal_obeys_nothing_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", out)
    command._show("a\x1b[31m\tb\nc")
    assert out.getvalue() == "a\\x1b[31m\tb\nc"
