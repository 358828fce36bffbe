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
from benchmarks.quality.run import SETTINGS, assess, train
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import WEIGHTS
from fastgrad_dsl.bench.memory import peak_of
from fastgrad_dsl.commands.tables import Column, print_table
from fastgrad_dsl.commands.terminal import print_plan
from fastgrad_dsl.commands.train import TrainRequest, print_sample, run
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
RECALLED = {
    "depth": RECALL.layers, "d_model": RECALL.width, "heads": RECALL.heads, "near": RECALL.near,
    "vocab": RECALL.task.vocabulary,
}  # fmt: skip
RATE = 5e-3  # of learning to recall


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
    build = Path(options.out)
    console.rule("1. the compiled model")
    compiled = {name: fg.compile(SPEC, params=params) for name, params in MODELS.items()}
    compiled["gpt"].write(build)
    print_plan(compiled["gpt"].program, str(SPEC))
    data = load_text(TEXT, options.tokens)
    trained = {}
    for number, name in enumerate(MODELS, 2):
        console.rule(f"{number}. {name}: {options.minutes:g} minutes at {options.tokens} tokens")
        trained[name] = _trained(console, compiled[name], data, options, Path(f"runs/demo-{name}"))
    console.rule("4. side by side")
    rows = _side_by_side(trained, data, options.tokens)
    _print_rows(console, rows)
    console.rule("5. what a model of two layers learns to recall")
    recalled = {} if options.no_recall else _recalled(console)
    console.rule("6. what gpt writes")
    one = trained["gpt"]
    print_sample(console, one.model, one.compiled.program, data, options.tokens, 200)
    console.rule("files")
    for what, path in (
        ("generated code", build / "model.py"), ("report", build / "report.html"),
        ("weights", one.folder / WEIGHTS), ("losses", one.folder / LOG),
    ):  # fmt: skip
        console.print(f"{what:16s} {path}", highlight=False)
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


def _trained(
    console: Console, compiled: Compiled, data: TextData, options: argparse.Namespace, folder: Path
) -> Trained:
    training = Options(
        tokens=options.tokens, seconds=60 * options.minutes, validate_every=25, validation_batches=2, warmup=10,
        checkpoint_every=50, learning_rate=2e-3,
    )  # fmt: skip
    loss, model = language_model_loss(compiled, training.tokens), compiled.module(seed=0)
    first = next(data.validation_batches(options.tokens, 1, 1))
    _timed_step(model, loss, *first)  # builds kernels, not on the clock
    run(console, model, loss, data, TrainRequest(TEXT, folder, training, force=True))
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
    """Multi-query associative recall: 32 pairs, each asked for once, up to 250 tokens later."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # such small models gain nothing from more
    for name, params in MODELS.items():
        model = fg.compile(SPEC, params={**RECALLED, **params}).module(seed=0)
        *_, (_, seconds, _) = train(model, RECALL, RATE, seed=0)
        accuracy = assess(model, RECALL, RECALL.task.n)["accuracy"]
        console.print(
            f"{name} recalls {accuracy:.0%} of {RECALL.task.size} pairs after {RECALL.steps} steps,"
            f" {seconds:.0f} s of one thread (measured)",
            highlight=False,
        )
        found[name] = {"accuracy": accuracy, "seconds": seconds}
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
