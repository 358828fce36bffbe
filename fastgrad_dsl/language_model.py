"""`fastgrad train`: a compiled spec, a text, a run folder, progress on the terminal and a sample at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastgrad_compiler.graph import Program, TensorType
from fastgrad_dsl.budget_watch import BudgetWatch
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.compiled import Compiled
from fastgrad_dsl.terminal import console as console_of_lines
from fastgrad_dsl.terminal import print_calibration, print_plan, progress
from fastgrad_dsl.text_data import TextData, load_text
from fastgrad_dsl.training import CHECKPOINT, LOG, Event, Loss, Options, generate, train
from fastgrad_dsl.weights import load_weights
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

BYTES = 256
CALIBRATION_BATCHES = 2
PROMPT_BYTES = 64


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for; `sample` is how many bytes to generate at the end.

    `calibrate`: the plan is made from the text, at the weights that training starts from.
    """

    text: Path
    folder: Path
    options: Options
    resume: bool = False
    sample: int = 200
    calibrate: bool = False


def train_language_model(compiled: Compiled, request: TrainRequest) -> nn.Module:
    """Train, showing losses as they come, and return the trained module.

    Raises TfgError: FG411 to FG414 for the text and the checkpoint, FG415 where the spec is no byte-level language
    model.
    """
    loss = language_model_loss(compiled, request.options.tokens)
    data = load_text(request.text, request.options.tokens)
    model = compiled.module(seed=request.options.seed)
    console = console_of_lines()
    if request.options.exact:
        model = compiled.reference(model)
        run(console, model, loss, data, request)
    else:
        watch = _watch(console, compiled, data, request.options)
        if request.calibrate:
            if request.resume:
                load_weights(model, request.folder / CHECKPOINT)
            watch.compiled = watch.again(compiled, model)
            print_plan(watch.compiled.program, str(compiled.source.path))
            print_calibration(watch.compiled.calibration or {})
            model = watch.compiled.adopt(model)
        run(console, model, loss, data, request, watch)
    console.print(f"log: {request.folder / LOG}\ncheckpoint: {request.folder / CHECKPOINT}", highlight=False)
    if request.sample:
        print_sample(console, model, compiled.program, data, request.options.tokens, request.sample)
    return model


def _watch(console: Console, compiled: Compiled, data: TextData, options: Options) -> BudgetWatch:
    """Looks at the budget on the first held-out batch, and calibrates on the text."""
    places = torch.Generator().manual_seed(options.seed)

    def again(compiled: Compiled, model: nn.Module) -> Compiled:
        used = [data.batch(options.tokens, options.batch, places) for _ in range(CALIBRATION_BATCHES)]
        held_out = list(data.validation_batches(options.tokens, options.batch, 1))
        with progress("calibrating:") as tell:
            request = Request(model, [*used, *held_out], "the text", "the present weights")
            return replan(compiled, request, tell)

    held_out = next(data.validation_batches(options.tokens, options.batch, 1))

    def tell(line: str) -> None:
        console.print(f"        {line}", highlight=False, soft_wrap=True)

    return BudgetWatch(compiled, held_out, again, tell)


def run(
    console: Console,
    model: nn.Module,
    loss: Loss,
    data: TextData,
    request: TrainRequest,
    watch: BudgetWatch | None = None,
) -> None:
    """The training loop with a progress bar; losses are printed on lines of their own, the budget below them."""
    options = request.options
    total = options.steps if options.seconds is None else None
    bar = Progress(
        TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("training", total=total, loss="")
        for event in train(model, loss, data, options, request.folder, resume=request.resume, watch=watch):
            bar.update(task, completed=event.step, loss=_loss_text(event))
            if _is_printed(event, options):
                console.print(_line(event), highlight=False)


def print_sample(
    console: Console, model: nn.Module, program: Program, data: TextData, window: int, length: int
) -> None:
    """A continuation of the held-out text's beginning."""
    prompt = bytes(data.validation[:PROMPT_BYTES].tolist())
    dims = program[program.main].inputs[0].tensor.shape[1].names
    multiple = max((program.multiples.get(name, 1) for name in dims), default=1)
    written = generate(model, prompt, length, window=window, multiple=multiple)
    text = (prompt + b" >>> " + written).decode(errors="replace")
    console.print("\nsample (what the model wrote stands behind >>>):")
    console.print(text, markup=False, highlight=False)


def language_model_loss(compiled: Compiled, tokens: int) -> Loss:
    """The objective of a spec that maps int[b, n] to float[b, n, at least 256]; TfgError FG415 for any other."""
    program = compiled.program
    graph = program[program.main]
    problem = _not_a_language_model(program)
    if problem is None and compiled.loss is not None:
        limit = _token_limit(program)
        if limit is None or tokens <= limit:
            return compiled.loss
        problem = f"its sequences have at most {limit} tokens, not {tokens}"
    raise TfgError(
        [
            Diagnostic(
                "FG415",
                f"model {program.name} cannot be trained on text: {problem or 'the file has no objective'}",
                span=graph.span,
                help=(
                    "a byte-level model takes int[b, n], gives float[b, n, 256] and has an objective(logits, targets)",
                ),
            )
        ]
    )


def _not_a_language_model(program: Program) -> str | None:
    inputs, result = program[program.main].inputs, program[program.main].output_type
    if len(inputs) != 1 or inputs[0].tensor.dtype != "int" or len(inputs[0].tensor.shape) != 2:
        return "it does not take one int[b, n] of tokens"
    if (
        not isinstance(result, TensorType)
        or result.shape[:2] != inputs[0].tensor.shape
        or len(result.shape) != 3
    ):
        return "it does not give float[b, n, vocab] for its tokens"
    width = result.shape[2].constant
    if width is None or width < BYTES:
        return f"it has {result.shape[2]} classes, fewer than the {BYTES} values of a byte"
    return None


def _token_limit(program: Program) -> int | None:
    dim = program[program.main].inputs[0].tensor.shape[1]
    limits = [info.at_most for info in program.dims if dim.names == {info.name} and info.at_most is not None]
    return dim.constant if dim.constant is not None else min(limits, default=None)


def _is_printed(event: Event, options: Options) -> bool:
    return (
        event.validation_loss is not None
        or event.step == 1
        or event.step % max(1, options.validate_every // 10) == 0
    )


def _loss_text(event: Event) -> str:
    return f"loss {event.loss:.4f}" if event.loss is not None else "validating"


def _line(event: Event) -> str:
    if event.validation_loss is not None:
        held_out = f"validation loss {event.validation_loss:.4f} nats per byte"
        return f"step {event.step:6d}  {held_out}  {event.seconds:7.1f} s"
    return (
        f"step {event.step:6d}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}"
        f"  gradient norm {event.gradient_norm:.2f}  {event.seconds:7.1f} s"
    )
