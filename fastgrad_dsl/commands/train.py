"""`fastgrad train`: a compiled spec, a text, a run folder, progress on the terminal and a sample at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastgrad_compiler.ir.graph import Program, TensorType
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands.terminal import console as console_of_lines
from fastgrad_dsl.commands.terminal import print_calibration, print_plan, progress
from fastgrad_dsl.generation.generate import generate
from fastgrad_dsl.generation.rerun import rerun
from fastgrad_dsl.generation.sampling import Sampling
from fastgrad_dsl.generation.step_form import has_steps
from fastgrad_dsl.models.batches import model_inputs
from fastgrad_dsl.models.text_data import BYTES, TextData, load_text
from fastgrad_dsl.models.tokenizer import Tokenizer, check_size, load_tokenizer
from fastgrad_dsl.storage.weights import load_weights
from fastgrad_dsl.training.budget_watch import BudgetWatch
from fastgrad_dsl.training.checkpoint import read_checkpoint
from fastgrad_dsl.training.folder import CHECKPOINT, LOG, claimed, identity, publish, spec_files
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Context, Loss, Options, is_finished, train
from fastgrad_dsl.training.plan import TextPlanner, plan_of, resumed_plan, without_polynomials
from fastgrad_dsl.training.stopping import Stop, StopAsked, Stopped, stop_on_signals
from fastgrad_grammar.diagnostics import TfgError

PROMPT_TOKENS = 64
SAMPLING = Sampling(temperature=0.8)


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for; `sample` is how many tokens to generate at the end.

    `tokenizer`: the file of one, None for bytes. `calibrate`: the plan is made from the text, at the weights that
    training starts from. `resume`: the run of the folder goes on; `force`: it is replaced.
    """

    text: Path
    folder: Path
    options: Options
    resume: bool = False
    sample: int = 200
    calibrate: bool = False
    force: bool = False
    tokenizer: Path | None = None


def train_language_model(compiled: Compiled, request: TrainRequest) -> nn.Module:
    """Train, showing losses as they come, and return the trained module.

    Raises TfgError: FG411 to FG414 for the text and the checkpoint, FG415 if the spec is not a language model, FG436
    for the tokenizer, FG416 for options that no run can have, and as `train`. Raises SystemExit with 128 and the
    signal's number where a signal stopped the run, after its checkpoint is saved.
    """
    options = request.options
    for name, value in (("--rate", options.learning_rate), ("--clip", options.clip)):
        if not math.isfinite(value):
            raise TfgError.of("FG416", f"{name} {value}: expected a finite number")
    tokenizer = BYTES if request.tokenizer is None else load_tokenizer(request.tokenizer)
    loss = language_model_loss(compiled, options.tokens, tokenizer)
    data = load_text(request.text, options.tokens, tokenizer=tokenizer)
    console = console_of_lines()
    exact, calibrate = options.exact, request.calibrate
    texts = spec_files(compiled.source)  # now, for the files may change while the run goes on
    named = identity(compiled, texts, data, exact=exact, calibrate=calibrate)
    compiled = without_polynomials(compiled) if exact else compiled
    model = None
    if request.resume:
        model = _finished(console, compiled, request, Context(named))
    if model is None:
        with claimed(request.folder, resume=request.resume, force=request.force), stop_on_signals() as stop:
            try:
                model = _train(console, compiled, loss, data, request, texts, named, stop)
            except (Stopped, StopAsked) as stopped:
                said = "stopped before the first step"
                if isinstance(stopped, Stopped):
                    place = f"{request.folder / CHECKPOINT} holds step {stopped.step}"
                    said = f"stopped: {place}; the same command with --resume goes on"
                console_of_lines(error=True).print(said, soft_wrap=True)
                raise SystemExit(128 + (stop.signal or 0)) from None
    console.print(f"log: {request.folder / LOG}\ncheckpoint: {request.folder / CHECKPOINT}", highlight=False)
    if request.sample:
        print_sample(console, model, compiled.program, data, options.tokens, request.sample)
    return model


def _finished(
    console: Console, compiled: Compiled, request: TrainRequest, context: Context
) -> nn.Module | None:
    """The model of a run that has done its steps, None where there are some to do; writes nothing."""
    checkpoint = read_checkpoint(request.folder / CHECKPOINT)
    if not is_finished(checkpoint, request.options, context):
        return None
    model = resumed_plan(compiled, checkpoint).module(seed=request.options.seed)
    load_weights(model, checkpoint.path)
    steps = checkpoint.progress.step
    said = f"the run has done its {steps} steps; more --steps go on with it"
    console.print(f"{request.folder}: {said}", highlight=False)
    return model


def _train(
    console: Console,
    compiled: Compiled,
    loss: Loss,
    data: TextData,
    request: TrainRequest,
    texts: Mapping[str, str],
    named: dict[str, str],
    stop: Stop,
) -> nn.Module:
    """One run, or the rest of one, in a folder that is claimed."""
    planner = TextPlanner(data, request.options, stop, progress)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    watch = BudgetWatch(compiled, planner.held_out, planner, lambda line: tell(f"        {line}"))
    model = compiled.module(seed=request.options.seed)
    if request.resume:
        checkpoint = read_checkpoint(request.folder / CHECKPOINT)
        checkpoint.belongs_to(request.options.settings, named)
        watch.compiled = resumed_plan(compiled, checkpoint)
        planner.pace = checkpoint.progress.plan.pace if checkpoint.progress.plan else None
        model = watch.compiled.module(seed=request.options.seed)
    elif request.calibrate and not request.options.exact:
        watch.compiled = planner(compiled, model)
        print_plan(watch.compiled.program, str(compiled.source.path))
        if watch.compiled.calibration is not None:
            print_calibration(watch.compiled.calibration)
        model = watch.compiled.adopt(model)
    context = Context(
        named,
        {"calibration": planner.places},
        lambda: plan_of(watch.compiled, planner.pace),
        lambda: publish(
            watch.compiled, texts, request.folder, tokenizer=data.tokenizer.source, force=request.force
        ),
        stop,
    )
    watched = None if request.options.exact else watch
    run(console, model, loss, data, request, watched, context)
    return watch.compiled.adopt(model)


def run(
    console: Console,
    model: nn.Module,
    loss: Loss,
    data: TextData,
    request: TrainRequest,
    watch: BudgetWatch | None = None,
    context: Context | None = None,
) -> None:
    """The training loop with a progress bar; losses are printed on lines of their own, the budget below them.

    With `context` the folder is claimed already; without, it is for as long as the run takes.
    """
    options, folder, resume = request.options, request.folder, request.resume
    how = {"resume": resume, "force": request.force}
    events = train(model, loss, data, options, folder, **how, watch=watch, context=context)
    total = options.steps if options.seconds is None else None
    bar = Progress(
        TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar, closing(events):
        task = bar.add_task("training", total=total, loss="")
        for event in events:
            bar.update(task, completed=event.step, loss=_loss_text(event))
            if _is_printed(event, options):
                console.print(_line(event, data.tokenizer.unit), highlight=False)


def print_sample(
    console: Console, model: nn.Module, program: Program, data: TextData, window: int, length: int
) -> None:
    """A continuation of the held-out text's beginning, by the step form where the model has one for as many tokens."""
    prompt, limit = data.validation[:PROMPT_TOKENS].tolist(), _token_limit(program)
    if has_steps(model) and (limit is None or len(prompt) + length <= limit):
        drawn = generate(model, prompt, tokens=length, sampling=SAMPLING, tokenizer=data.tokenizer)
        written = [int(token) for token in drawn]
    else:
        dims = program[program.main].inputs[0].tensor.shape[1].names
        multiple = max((program.multiples.get(name, 1) for name in dims), default=1)
        size = data.tokenizer.size
        written = rerun(model, prompt, length, SAMPLING, window=window, multiple=multiple, size=size)
    stream = data.tokenizer.stream()
    begun, rest = ("".join(map(stream.push, tokens)) for tokens in (prompt, written))
    console.print("\nsample (the model's own text follows >>>):")
    console.print(f"{begun} >>> {rest}{stream.finish()}", markup=False, highlight=False)


def language_model_loss(compiled: Compiled, tokens: int, tokenizer: Tokenizer = BYTES) -> Loss:
    """The objective of a spec that maps int[b, n] to float[b, n, vocab], with a class for each of the tokenizer's ids.

    TfgError FG415 for any other spec, FG436 where a tokenizer has more ids.
    """
    program = compiled.program
    graph = program[program.main]
    problem = _not_a_language_model(program, tokenizer)
    if problem is None and compiled.loss is not None:
        limit = _token_limit(program)
        if limit is None or tokens <= limit:
            return compiled.loss
        problem = f"its sequences have at most {limit} tokens, not {tokens}"
    raise TfgError.of(
        "FG415",
        f"model {program.name} cannot be trained on text: {problem or 'the file has no objective'}",
        "a language model takes int[b, n], gives float[b, n, vocab] and has an objective(logits, targets)",
        span=graph.span,
    )


def _not_a_language_model(program: Program, tokenizer: Tokenizer) -> str | None:
    inputs, result = program[program.main].inputs, program[program.main].output_type
    if len(inputs) != 1 or inputs[0].tensor.dtype != "int" or len(inputs[0].tensor.shape) != 2:
        return "it does not take one int[b, n] of tokens"
    given = inputs[0].tensor.shape
    if not isinstance(result, TensorType) or result.shape[:2] != given or len(result.shape) != 3:
        return "it does not give float[b, n, vocab] for its tokens"
    (tokens,), known = model_inputs(program), result.shape[2].constant
    if known is None:
        return f"it has {result.shape[2]} classes, which is not one number"
    known = min(known, tokens.below) if tokens.ids else known
    if tokenizer.source is None and known < tokenizer.size:
        return f"it has {known} classes, fewer than the {tokenizer.size} values of a byte"
    check_size(tokenizer, known, program.name)
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


def _line(event: Event, unit: str) -> str:
    if event.validation_loss is not None:
        held_out = f"validation loss {event.validation_loss:.4f} nats per {unit}"
        return f"step {event.step:6d}  {held_out}  {event.seconds:7.1f} s"
    return (
        f"step {event.step:6d}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}"
        f"  gradient norm {event.gradient_norm:.2f}  {event.seconds:7.1f} s"
    )
