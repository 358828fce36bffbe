"""The demonstration of `make demo`: train gpt.tfg, and the same with softmax, for as long, and see what each recalls.

Everything printed is measured in this run. Step times are medians of interleaved steps; peak memory is that of a
process of its own that takes one training step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fastgrad_dsl as fg
from benchmarks.quality.run import SETTINGS, assess, model_of, train
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.bench.memory import peak_of
from fastgrad_dsl.commands.tables import Column, print_table
from fastgrad_dsl.commands.terminal import print_plan
from fastgrad_dsl.commands.train import TrainRequest, train_language_model
from fastgrad_dsl.models.text_data import TextData, load_text
from fastgrad_dsl.training.folder import LOG
from fastgrad_dsl.training.language import language_model_loss
from fastgrad_dsl.training.loop import Loss, Options, batch_loss

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative: generated files name the spec as it was given
SPEC = HERE / "gpt.tfg"
MODELS: dict[str, dict[str, object]] = {"gpt": {}, "softmax": {"softmax": True}}
TEXT = HERE / "data" / "emma.txt"
MEBIBYTE = 2**20
TIMED_STEPS = 3
RECALL = SETTINGS["recall of 32 pairs"]
FORMS = {"gpt": "mixer", "softmax": "softmax, short convolution"}  # of attention, as docs/quality.md has them
RATE = 5e-3  # of learning to recall
SAMPLE = 200  # bytes
BEGINNING = """\
Six phases, each with the time it takes on two cores with nothing else to do; the first text of a trained model comes
after about two minutes. Ctrl-C ends the demonstration at any phase."""


@dataclass(frozen=True)
class Trained:
    """A model after its minutes on the text."""

    compiled: Compiled
    model: nn.Module
    loss: Loss
    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """A line for each step and validation."""
        return [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]


def main() -> None:
    """Run the whole demonstration, or (as its own subprocess) one measured step."""
    options = _arguments()
    if options.step:
        print(json.dumps(_one_step(options.step, options.tokens)))
        return
    console = Console()
    console.print(BEGINNING, highlight=False, soft_wrap=True)
    build, limit = Path(options.out), f"{60 * options.minutes:g} s"
    _phase(console, 1, "compile examples/gpt.tfg to PyTorch", "a few seconds")
    compiled = {name: fg.compile(SPEC, params=params) for name, params in MODELS.items()}
    compiled["gpt"].write(build)
    print_plan(compiled["gpt"].program, str(SPEC))
    data = load_text(TEXT, options.tokens)
    trained = {}
    for number, name in enumerate(MODELS, 2):
        what = f"train {name} on a novel, {options.tokens} bytes at a time"
        _phase(console, number, what, limit if number > 2 else f"{limit}, and 20 seconds for kernels once")
        trained[name] = _trained(compiled[name], data, options, Path(f"runs/demo-{name}"), number == 2)
    _phase(console, 4, "compare a training step of both", "less than a minute")
    rows = _side_by_side(trained, data, options.tokens)
    _print_rows(console, rows)
    recalled = {}
    if not options.no_recall:
        _phase(console, 5, "learn to recall 32 pairs, two layers each", "one to two minutes for each model")
        recalled = _recalled(console)
    _phase(console, 6, "what to do next", "")
    _print_next(console, build, trained["gpt"].folder)
    if options.json:
        found = {"minutes": options.minutes, "tokens": options.tokens, "models": rows, "recall": recalled}
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=1.5, help="training time of each model")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence")
    parser.add_argument("--no-recall", action="store_true", help="leave out the recall of pairs")
    parser.add_argument("--out", default="build/gpt", help="folder of the compiled model")
    parser.add_argument("--json", help="also write the measured numbers to this file")
    parser.add_argument("--step", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _phase(console: Console, number: int, what: str, takes: str) -> None:
    console.rule(f"{number}. {what}")
    if takes:
        console.print(f"takes {takes}", highlight=False, style="dim")


def _print_next(console: Console, build: Path, run: Path) -> None:
    """Commands that go on from here, and files to look at."""
    fastgrad = os.path.relpath(Path(sys.executable).with_name("fastgrad"))
    for what, command in (
        ("let it write", f'{fastgrad} generate {run} --prompt "She had always"'),
        ("train on a text of yours", f"{fastgrad} train {SPEC} --text FILE"),
        ("see how an attention will run", f"{fastgrad} check {HERE / 'bounded.tfg'}"),
        ("open the report in a browser", str(build / "report.html")),
        ("read the generated code", str(build / "model.py")),
        ("write a model yourself", str(HERE.parent / "docs" / "tutorial.md")),
    ):
        console.print(f"{what:30s} {command}", highlight=False, soft_wrap=True)


def _trained(
    compiled: Compiled, data: TextData, options: argparse.Namespace, folder: Path, writes: bool
) -> Trained:
    """Trained for the minutes of the options; one that `writes` prints a sample then."""
    training = Options(
        tokens=options.tokens, seconds=60 * options.minutes, validate_every=25, validation_batches=2, warmup=10,
        checkpoint_every=50, learning_rate=2e-3,
    )  # fmt: skip
    loss, first = (
        language_model_loss(compiled, training.tokens),
        data.validation_batches(options.tokens, 1, 1),
    )
    _timed_step(compiled.module(seed=0), loss, *next(first))  # builds kernels, not on the clock
    request = TrainRequest(TEXT, folder, training, sample=SAMPLE if writes else 0, force=True)
    model = train_language_model(compiled, request)
    assert model is not None  # this is the only process
    return Trained(compiled, model, loss, folder)


# ---------------------------------------------------------------- side by side


def _side_by_side(trained: dict[str, Trained], data: TextData, tokens: int) -> dict[str, dict[str, Any]]:
    """Steps and losses of the runs, interleaved step times, and peak memory in a process for each."""
    batch = next(data.validation_batches(tokens, 1, 1))
    times: dict[str, list[float]] = {name: [] for name in trained}
    for _ in range(TIMED_STEPS):
        for name, each in trained.items():
            times[name].append(_timed_step(each.model, each.loss, *batch))
    rows = {}
    for name, each in trained.items():
        command = [sys.executable, __file__, "--step", name, "--tokens", str(tokens)]
        step = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        last = each.log[-1]
        rows[name] = {
            "steps": last["step"],
            "validation_loss": last["validation_loss"],
            "seconds": statistics.median(times[name]),
            "peak_bytes": step["peak"],
        }
    return rows


def _print_rows(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    headings = ("steps", "nats per byte,\nheld out", "seconds\nper step", "peak\nMiB")
    cells = []
    for name, row in rows.items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MEBIBYTE:,.0f}"
        cells.append(
            (name, str(row["steps"]), f"{row['validation_loss']:.3f}", f"{row['seconds']:.2f}", peak)
        )
    print_table(console, [Column("model", is_number=False), *map(Column, headings)], cells)
    ratio = rows["softmax"]["seconds"] / rows["gpt"]["seconds"]
    console.print(f"a step of gpt is {ratio:.1f} times as fast (all measured)", highlight=False)


def _timed_step(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    batch_loss(model, loss, inputs, targets).backward()
    return time.perf_counter() - started


def _one_step(which: str, tokens: int) -> dict[str, int | None]:
    """Peak resident memory that one step of one model adds, bytes; None where it is not known."""
    compiled = fg.compile(SPEC, params=MODELS[which])
    model, loss = compiled.module(seed=0), language_model_loss(compiled, tokens)
    inputs, targets = next(load_text(TEXT, tokens).validation_batches(tokens, 1, 1))
    _timed_step(model, loss, inputs[:, :64], targets[:, :64])  # one-time costs of the libraries
    return {"peak": peak_of(lambda: _timed_step(model, loss, inputs, targets))}


# ---------------------------------------------------------------- recall


def _recalled(console: Console) -> dict[str, dict[str, float]]:
    """Multi-query associative recall: 32 pairs, each asked for once, at most 250 tokens later, by small models."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # such small models gain nothing from more
    for name, form in FORMS.items():
        model = model_of(RECALL, form, seed=0)
        *_, (_, seconds, _) = train(model, RECALL, RATE, seed=0)
        accuracy = assess(model, RECALL, RECALL.task.n)["accuracy"]
        console.print(
            f"the attention of {name} recalls {accuracy:.0%} of {RECALL.task.size} pairs after {RECALL.steps} steps,"
            f" {seconds:.0f} s of one thread (measured)",
            highlight=False,
        )
        found[name] = {"accuracy": accuracy, "seconds": seconds}
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
