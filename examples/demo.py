"""The demonstration behind `make demo`: plan gpt.tfg on a novel, train it, compare it with exact attention.

Everything printed at the end is measured in this run. Step times are medians of interleaved steps; peak memory is
that of a process of its own that takes one training step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.report import ReportRequest, make_report
from fastgrad_dsl.bench.memory import peak_of
from fastgrad_dsl.calibration.data import calibrated
from fastgrad_dsl.commands.terminal import print_calibration, print_plan, print_report, progress
from fastgrad_dsl.commands.train import TrainRequest, language_model_loss, print_sample, run
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.training.folder import CHECKPOINT, LOG
from fastgrad_dsl.training.loop import Loss, Options

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative: generated files name the spec as it was given
SPEC, TEXT = HERE / "gpt.tfg", HERE / "data" / "emma.txt"
MEBIBYTE = 2**20
TIMED_STEPS = 3
CALIBRATED = 2048  # tokens of a sequence to calibrate on, at most


def main() -> None:
    """Run the whole demonstration, or (as its own subprocess) one measured step."""
    options = _arguments()
    if options.step:
        print(json.dumps(_one_step(options.step, Path(options.weights), options.tokens)))
        return
    console = Console()
    build, folder = Path(options.out), Path("runs/demo")
    console.rule("1. the compiled model, planned on the text")
    with progress("calibrating:") as tell:
        sizes = {"b": 1, "n": min(options.tokens, CALIBRATED)}
        compiled = calibrated(fg.compile(SPEC), str(TEXT), tell, dims=sizes)
    compiled.write(build)
    print_plan(compiled.program, str(SPEC))
    if compiled.calibration is not None:
        print_calibration(compiled.calibration)
    console.rule(f"2. training at {options.tokens} tokens for {options.minutes:g} minutes")
    training = Options(
        tokens=options.tokens, seconds=60 * options.minutes, validate_every=25, validation_batches=2, warmup=10,
        checkpoint_every=50, learning_rate=2e-3,
    )  # fmt: skip
    data = load_text(TEXT, training.tokens)
    loss = language_model_loss(compiled, training.tokens)
    model = compiled.module(seed=0)
    run(console, model, loss, data, TrainRequest(TEXT, folder, training, force=True))
    weights = build / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    console.rule("3. what the approximation costs, on held-out text")
    with progress("measuring") as tell:
        sizes = {"b": 1, "n": training.tokens}
        result = make_report(ReportRequest(build, {}, None, TEXT, weights, sizes, 0, True), tell)
    print_report(result)
    write_atomically(build / "report.json", to_json(result))
    write_atomically(build / "report.html", render_html(result))
    console.rule("4. time and memory of a training step")
    inputs, targets = next(data.validation_batches(training.tokens, 1, 1))
    steps = _print_steps(console, compiled, model, loss, (inputs, targets), weights)
    console.rule("5. what it writes")
    print_sample(console, model, compiled.program, data, training.tokens, 200)
    console.rule("files")
    for what, path in (
        ("generated code", build / "model.py"), ("plan", build / "plan.json"), ("report", build / "report.html"),
        ("trained weights", weights), ("losses", folder / LOG), ("checkpoint", folder / CHECKPOINT),
    ):  # fmt: skip
        console.print(f"{what:16s} {path}", highlight=False)
    if options.json:
        losses = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        training_result = {
            "minutes": options.minutes,
            "tokens": options.tokens,
            "steps": losses[-1]["step"],
            "validation_loss": losses[-1]["validation_loss"],
        }
        errors = {f"{what}_error": result["whole"][what]["measured"] for what in ("output", "gradient")}
        Path(options.json).write_text(
            json.dumps({**training_result, **errors, "models": steps}, indent=2) + "\n"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=3.0, help="training time")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence")
    parser.add_argument("--out", default="build/gpt", help="folder of the compiled model")
    parser.add_argument("--json", help="also write the measured numbers to this file")
    parser.add_argument("--step", choices=["compiled", "exact"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    return parser.parse_args()


def _print_steps(
    console: Console,
    compiled: Compiled,
    model: nn.Module,
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    weights: Path,
) -> dict[str, dict[str, float | None]]:
    """Interleaved step times of both models in this process, peak memory of each in its own."""
    models = {"compiled": model, "exact": compiled.reference(model)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMED_STEPS):
        for name, candidate in models.items():
            times[name].append(_timed_step(candidate, loss, *batch))
    medians: dict[str, float] = {}
    measured: dict[str, dict[str, float | None]] = {}
    for name, seconds in times.items():
        command = [
            sys.executable,
            __file__,
            "--step",
            name,
            "--weights",
            str(weights),
            "--tokens",
            str(batch[0].shape[1]),
        ]
        step = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        medians[name] = statistics.median(seconds)
        measured[name] = {"seconds": medians[name], "peak_bytes": step["peak"]}
        memory = "" if step["peak"] is None else f"   peak memory {step['peak'] / MEBIBYTE:6.0f} MiB"
        console.print(
            f"{name:9s} {medians[name]:7.2f} s forward and backward{memory}   (measured)",
            highlight=False,
        )
    ratio = medians["exact"] / medians["compiled"]
    console.print(
        f"the compiled step is {ratio:.1f} times as fast as the exact one (measured)", highlight=False
    )
    return measured


def _timed_step(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss(model(inputs), targets).backward()
    return time.perf_counter() - started


def _one_step(which: str, weights: Path, tokens: int) -> dict[str, int | None]:
    """Peak resident memory that one step of one model adds, bytes; None where it is not known."""
    compiled = fg.compile(SPEC)
    model = fg.load(weights.parent)
    if which == "exact":
        model = compiled.reference(model)
    loss = language_model_loss(compiled, tokens)
    inputs, targets = next(load_text(TEXT, tokens).validation_batches(tokens, 1, 1))
    _timed_step(model, loss, inputs[:, :64], targets[:, :64])  # one-time costs of the libraries
    return {"peak": peak_of(lambda: _timed_step(model, loss, inputs, targets))}


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
