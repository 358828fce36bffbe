"""Training on the tokens of a tokenizer: the run's folder, going on, what is refused, and the sample at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrad_dsl.commands import train as command
from fastgrad_dsl.commands.cli import main
from tests.dsl.tokenizers_of_tests import write_tokenizer

SPEC = """dim b
dim n <= 64
model words(tokens: int[b, n]) -> float[b, n, {classes}] {{
    weight table: float[{ids}, 4] = normal(std = 0.02)
    weight out: float[4, {classes}] = normal(std = 0.02)
    return embedding(table, tokens) @ out
}}
objective loss(logits: float[b, n, {classes}], targets: int[b, n]) = cross_entropy(logits, targets)
"""
Run = Callable[..., tuple[int, str, str]]
FOLDER = Path("run")
COPY = FOLDER / "tokenizer.json"


@pytest.fixture
def fastgrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `fastgrad train` of a model with a class for each of the 261 tokens; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    size = write_tokenizer(Path("words.json"))
    Path("words.tfg").write_text(SPEC.format(classes=size, ids=size))
    Path("text.txt").write_text("the caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} " * 200)

    def run(*arguments: str) -> tuple[int, str, str]:
        usual = ("--text", "text.txt", "--seq", "8", "--sample", "0", "-o", "run")
        monkeypatch.setattr(sys, "argv", ["fastgrad", "train", "words.tfg", *usual, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


WITH = ("--tokenizer", "words.json")


def test_the_folder_of_a_run_keeps_the_tokenizer(fastgrad: Run) -> None:
    status, out, err = fastgrad(*WITH, "--steps", "1")
    assert status == 0, err
    assert "nats per token" in out
    assert COPY.read_bytes() == Path("words.json").read_bytes()
    COPY.unlink()
    assert fastgrad(*WITH, "--steps", "2", "--resume")[0] == 0
    assert COPY.exists()


def test_going_on_needs_the_same_tokenizer(fastgrad: Run) -> None:
    fastgrad(*WITH, "--steps", "1")
    status, _, err = fastgrad("--steps", "2", "--resume")
    assert status == 2
    assert "[FG414]" in err
    assert "--tokenizer was sha256 " in err


def test_a_run_in_its_place_takes_the_tokenizer_away(fastgrad: Run) -> None:
    fastgrad(*WITH, "--steps", "1")
    assert fastgrad("--steps", "1", "--force")[0] == 0
    assert not COPY.exists()


def test_a_tokenizer_of_the_users_is_not_taken_for_that_of_a_run(fastgrad: Run) -> None:
    FOLDER.mkdir()
    COPY.write_text("mine")
    status, _, err = fastgrad("--steps", "1")
    assert status == 2
    assert "[FG431]" in err
    assert "tokenizer.json" in err
    assert COPY.read_text() == "mine"


@pytest.mark.parametrize(("classes", "ids", "known"), [(260, 261, 260), (261, 257, 257)])
def test_a_tokenizer_with_more_tokens_than_the_model(
    fastgrad: Run, classes: int, ids: int, known: int
) -> None:
    Path("words.tfg").write_text(SPEC.format(classes=classes, ids=ids))
    status, _, err = fastgrad(*WITH)
    assert status == 2
    assert err.startswith(f"error[FG436]: the tokenizer has 261 tokens, and model words {known}")
    assert not FOLDER.exists()


@pytest.mark.parametrize(("classes", "ids", "known"), [(255, 256, 255), (256, 200, 200)])
def test_a_model_with_fewer_classes_or_ids_than_bytes(
    fastgrad: Run, classes: int, ids: int, known: int
) -> None:
    Path("words.tfg").write_text(SPEC.format(classes=classes, ids=ids))
    status, _, err = fastgrad()
    assert status == 2
    assert err.startswith("error[FG415]")
    assert f"it has {known} classes, fewer than the 256 values of a byte" in err


def test_a_text_that_is_not_utf8(fastgrad: Run) -> None:
    Path("text.txt").write_bytes(b"\xff" * 1000)
    status, _, err = fastgrad(*WITH)
    assert status == 2
    assert err.startswith("error[FG411]: text.txt is not UTF-8 text")


@pytest.mark.parametrize(("longest", "by_steps"), [(84, True), (83, False)])
def test_the_sample_is_the_same_however_it_is_made(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, longest: int, by_steps: bool
) -> None:
    """64 and 20 tokens: by the step form if there is one for as many, else by running the text again."""
    Path("words.tfg").write_text(Path("words.tfg").read_text().replace("n <= 64", f"n <= {longest}"))
    options = (*WITH, "--steps", "1", "--sample", "20", "--force")
    monkeypatch.setattr(command, "has_steps", lambda model: False)
    expected = fastgrad(*options)[1].split("follows >>>):\n")[1]
    begun, _, written = expected.partition(" >>> ")
    assert begun in Path("text.txt").read_text()
    assert written
    monkeypatch.setattr(command, "has_steps", lambda model: True)
    monkeypatch.setattr(command, "rerun" if by_steps else "generate", None)
    _, out, err = fastgrad(*options)
    assert out.split("follows >>>):\n")[1] == expected, err
