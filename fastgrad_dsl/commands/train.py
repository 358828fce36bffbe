"""`fastgrad train`: a compiled spec, a text, a run folder, progress on the terminal and a sample at the end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import WEIGHTS
from fastgrad_dsl.commands.failures import WRONG_INPUT
from fastgrad_dsl.commands.terminal import console as console_of_lines
from fastgrad_dsl.commands.terminal import print_calibration, print_plan, progress
from fastgrad_dsl.generation.generate import generate
from fastgrad_dsl.generation.rerun import rerun
from fastgrad_dsl.generation.sampling import Sampling
from fastgrad_dsl.generation.step_form import has_steps
from fastgrad_dsl.models.text_data import BYTES, TextData, load_text
from fastgrad_dsl.models.tokenizer import load_tokenizer
from fastgrad_dsl.storage.weights import load_weights
from fastgrad_dsl.training.budget_watch import BudgetWatch
from fastgrad_dsl.training.checkpoint import RunPlan
from fastgrad_dsl.training.folder import (
    CHECKPOINT,
    LOG,
    SHARDED,
    claimed,
    identity,
    publish,
    sharded_steps,
    spec_files,
)
from fastgrad_dsl.training.language import language_model_loss, token_limit
from fastgrad_dsl.training.launch import launch
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Context, Loss, Options, is_finished, train
from fastgrad_dsl.training.parallel import Parallel, check_batch, check_machine, check_model
from fastgrad_dsl.training.plan import TextPlanner, plan_of, planned_as, resumed_plan, without_polynomials
from fastgrad_dsl.training.ranks import Ranks, is_rank, join, leave, mark_claimed
from fastgrad_dsl.training.sharded import has_checkpoint, latest
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
    parallel: Parallel = field(default_factory=Parallel)


def run_train(compiled: Compiled, request: TrainRequest, work: Callable[[list[str]], int]) -> int:
    """Train in this process, or start the processes of a mesh, each of which does work(arguments); the exit status.

    Raises TfgError as `train_language_model`, and FG503 for a mesh that does not fit, FG504 where its processes fail
    time and again.
    """
    mesh = request.parallel.mesh()
    if mesh.count == 1 or is_rank():
        train_language_model(compiled, request)
        return 0
    _begun(compiled, request)
    check_machine(compiled.program, mesh)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // mesh.count)))
    return launch(mesh.count, request.parallel.restarts, work)


def _begun(compiled: Compiled, request: TrainRequest) -> tuple[Loss, TextData]:
    """The objective and the text, after all checks that need no other process."""
    options, mesh = request.options, request.parallel.mesh()
    for name, value in (("--rate", options.learning_rate), ("--clip", options.clip)):
        if not math.isfinite(value):
            raise TfgError.of("FG416", f"{name} {value}: expected a finite number")
    check_batch(options, mesh)
    tokenizer = BYTES if request.tokenizer is None else load_tokenizer(request.tokenizer)
    loss = language_model_loss(compiled, options.tokens, tokenizer)
    check_model(compiled, options, mesh)
    return loss, load_text(request.text, options.tokens, tokenizer=tokenizer)


def sizes_of_text(program: Program, batch: int, tokens: int) -> dict[str, int]:
    """The sizes of the run-time dims of a language model's input, for which its memory is planned."""
    named = {dim.name for dim in program.dims}
    shapes = [node.tensor.shape for node in program[program.main].inputs if node.type is not None]
    pairs = zip(shapes[0], (batch, tokens), strict=False) if len(shapes) == 1 else ()
    return {str(dim): size for dim, size in pairs if str(dim) in named}


def train_language_model(compiled: Compiled, request: TrainRequest) -> nn.Module | None:
    """Train, showing losses as they come, and return the trained module; None where another process leads.

    Raises TfgError: FG411 to FG414 for the text and the checkpoint, FG415 if the spec is not a language model, FG436
    for the tokenizer, FG416 and FG503 for options that no run can have, and as `train`. Raises SystemExit with 128 and
    the signal's number where a signal stopped the run, after its checkpoint is saved.
    """
    mesh, several = request.parallel.mesh(), is_rank()
    with stop_on_signals(among_others=True) if several else nullcontext(Stop()) as signals:
        ranks = join(mesh, request.parallel.timeout, signals) if several else Ranks()
        try:
            with ranks.watched():
                return _train_here(compiled, request, ranks)
        except TfgError:
            if ranks.leads:
                raise
            raise SystemExit(WRONG_INPUT) from None  # it is told by the process that leads
        finally:
            if several:
                leave()


def _train_here(compiled: Compiled, request: TrainRequest, ranks: Ranks) -> nn.Module | None:
    """The part of one process."""
    options, console = request.options, console_of_lines()
    console.quiet = not ranks.leads
    loss, data = ranks.each(lambda: _begun(compiled, request))
    exact, calibrate = options.exact, request.calibrate
    texts = spec_files(compiled.source)  # now, for the files may change while the run goes on
    named = identity(compiled, texts, data, exact=exact, calibrate=calibrate)
    compiled = without_polynomials(compiled) if exact else compiled
    request = _after_restart(request, ranks)
    model = None
    if request.resume:
        context = Context(named)
        model = ranks.each(lambda: _finished(console, compiled, request, context))
    if model is None:
        claim = partial(claimed, request.folder, resume=request.resume, force=request.force)
        stopping = nullcontext(ranks.signals) if ranks.count > 1 else stop_on_signals()
        with ExitStack() as held, stopping as stop:
            ranks.first(lambda: held.enter_context(claim()))
            mark_claimed(ranks)
            try:
                model = _train(console, compiled, loss, data, request, texts, named, stop, ranks)
            except (Stopped, StopAsked) as stopped:
                said = "stopped before the first step"
                if isinstance(stopped, Stopped):
                    place = f"{_saved(request.folder)} holds step {stopped.step}"
                    said = f"stopped: {place}; the same command with --resume goes on"
                if ranks.leads:
                    console_of_lines(error=True).print(said, soft_wrap=True)
                raise SystemExit(128 + (stop.signal or 0)) from None
    console.print(f"log: {request.folder / LOG}\ncheckpoint: {_saved(request.folder)}", highlight=False)
    if request.sample and ranks.leads and model is not None:
        print_sample(console, model, compiled.program, data, options.tokens, request.sample)
    return model


def _saved(folder: Path) -> Path:
    """Where the checkpoint is."""
    return folder / SHARDED if sharded_steps(folder) else folder / CHECKPOINT


def _after_restart(request: TrainRequest, ranks: Ranks) -> TrainRequest:
    """What is asked for where all processes were started again: to go on with what they had begun themselves."""
    if not ranks.claimed_before:
        return request
    (resume, *_) = ranks.objects(has_checkpoint(request.folder))
    if ranks.leads:
        whence = f"from {_saved(request.folder)}" if resume else "from the beginning"
        said = f"a process was lost: all {ranks.count} are started again, {whence}"
        console_of_lines(error=True).print(said, soft_wrap=True)
    return replace(request, resume=resume, force=request.force or not resume)


def _finished(
    console: Console, compiled: Compiled, request: TrainRequest, context: Context
) -> nn.Module | None:
    """The model of a run that has done its steps, None where there are some to do; writes nothing."""
    checkpoint = latest(request.folder)
    if not is_finished(checkpoint, request.options, context):
        return None
    model = resumed_plan(compiled, checkpoint).module(seed=request.options.seed)
    load_weights(model, checkpoint.path if checkpoint.path.is_file() else request.folder / WEIGHTS)
    steps = checkpoint.progress.step
    said = f"the run has done its {steps} steps; give more --steps to continue it"
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
    ranks: Ranks,
) -> nn.Module | None:
    """One run, or the rest of one, in a folder that is claimed."""
    planner = TextPlanner(data, request.options, stop, progress)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    watch = BudgetWatch(compiled, planner.held_out, planner, lambda line: tell(f"        {line}"), ranks)
    seed = request.options.seed
    if request.resume:
        checkpoint = latest(request.folder)
        checkpoint.belongs_to(request.options.settings, named)
        watch.compiled = resumed_plan(compiled, checkpoint)
        planner.pace = checkpoint.progress.plan.pace if checkpoint.progress.plan else None
    elif request.calibrate and not request.options.exact:
        watch.compiled = _planned(compiled, planner, seed, ranks)
        if ranks.leads:
            print_plan(watch.compiled.program, str(compiled.source.path))
            if watch.compiled.calibration is not None:
                print_calibration(watch.compiled.calibration)
    model = _module(watch.compiled, seed, ranks, recompute=request.parallel.recompute)
    context = Context(
        named,
        {"calibration": planner.places},
        lambda: plan_of(watch.compiled, planner.pace),
        lambda: publish(
            watch.compiled, texts, request.folder, tokenizer=data.tokenizer.source, force=request.force
        ),
        stop,
        ranks,
    )
    watched = None if request.options.exact else watch
    run(console, model, loss, data, request, watched, context)
    if ranks.count == 1:
        return watch.compiled.adopt(model)
    if not ranks.leads:
        return None
    alone = watch.compiled.module(seed=seed)
    load_weights(alone, request.folder / WEIGHTS)
    return alone


def _planned(compiled: Compiled, planner: TextPlanner, seed: int, ranks: Ranks) -> Compiled:
    """Planned on the text by the process that leads; the others take its plan, and the state of its generator."""
    kept: list[tuple[RunPlan, Tensor]] = []

    def plan() -> None:
        planned = planner(compiled, compiled.module(seed=seed))
        kept.append((plan_of(planned, planner.pace), planner.places.get_state()))

    ranks.first(plan)
    (found, state), *_ = ranks.objects(kept)[0]
    planner.pace = found.pace
    planner.places.set_state(state)
    return planned_as(compiled, found)


def _module(compiled: Compiled, seed: int, ranks: Ranks, *, recompute: bool) -> nn.Module:
    """With its initial weights; on several processes each draws them one by one and keeps its part."""
    if ranks.count == 1:
        return compiled.module(seed=seed)
    with torch.device("meta"):
        model = compiled.module(seed=seed)
    ranks.sharded(model, compiled.tensor_parallel_plan(), recompute=recompute)
    model.reset_parameters(seed)  # type: ignore[operator]
    return model


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
    show(console, events, options, lambda event: _line(event, data.tokenizer.unit))


def show(
    console: Console, events: Generator[Event, None, None], options: Options, line: Callable[[Event], str]
) -> None:
    """Run to the end with a progress bar; some of the events are printed on lines of their own."""
    timed = options.seconds is not None
    total, steps = (options.seconds, "") if timed else (options.steps, f"/{options.steps}")
    bar = Progress(
        TextColumn("step {task.fields[step]}" + steps), BarColumn(), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    waiting: list[float] = []
    with bar, closing(events):
        task = bar.add_task("training", total=total, step=0, loss="")
        for event in events:
            waiting += [] if event.waiting is None else [event.waiting]
            done = event.seconds if timed else event.step
            bar.update(task, completed=done, step=event.step, loss=_loss_text(event))
            if _is_printed(event, options):
                console.print(line(event), highlight=False)
    if waiting:
        share = f"{sum(waiting) / len(waiting):.0%}"
        console.print(
            f"in communication: {share} of the time of steps, the mean of all processes", highlight=False
        )


def print_sample(
    console: Console, model: nn.Module, program: Program, data: TextData, window: int, length: int
) -> None:
    """A continuation of the held-out text's beginning, by the step form where the model has one for as many tokens."""
    prompt, limit = data.validation[:PROMPT_TOKENS].tolist(), token_limit(program)
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
    shared = "" if event.waiting is None else f"  in communication {event.waiting:.0%}"
    return (
        f"step {event.step:6d}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}"
        f"  gradient norm {event.gradient_norm:.2f}  {event.seconds:7.1f} s{shared}"
    )
