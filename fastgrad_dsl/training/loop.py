"""Language modelling on a text: the loop behind `fastgrad train` and the demonstration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgrad_dsl.api.loader import WEIGHTS
from fastgrad_dsl.distributed.objective import Objective
from fastgrad_dsl.models.text_data import TextData
from fastgrad_dsl.storage.files import write_atomically, writing
from fastgrad_dsl.training.budget_watch import BudgetWatch
from fastgrad_dsl.training.checkpoint import (
    Checkpoint,
    Progress,
    RunPlan,
    States,
    described,
    idle_weights,
    is_finite,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from fastgrad_dsl.training.folder import CHECKPOINT, LOG, claimed
from fastgrad_dsl.training.log import Event, kept_lines
from fastgrad_dsl.training.stopping import Stop, StopAsked, Stopped
from fastgrad_grammar.diagnostics import TfgError

Loss = Callable[[Tensor, Tensor], Tensor]
MAY_CHANGE = {"steps", "seconds", "validate_every", "validation_batches", "checkpoint_every"}  # on resuming
LEAST_RATE = 0.1  # the cosine ends at this share of the peak learning rate


@dataclass(frozen=True)
class Options:
    """How to train. `seconds` (None: no limit) replaces `steps` as what the schedule runs over.

    steps, tokens (sequence length), batch (sequences per step), warmup, validate_every, validation_batches and
    checkpoint_every are counts; learning_rate is the peak of AdamW's; clip bounds the gradient's norm; `exact`: the
    softmax model is trained.
    """

    steps: int = 1000
    tokens: int = 1024
    batch: int = 1
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    exact: bool = False
    validate_every: int = 100
    validation_batches: int = 4
    checkpoint_every: int = 100
    seconds: float | None = None

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        """What a resumed run must share: all but how long it trains, and how often it is looked at and saved."""
        return {key: value for key, value in asdict(self).items() if key not in MAY_CHANGE}


def learning_rate(options: Options, step: int, done: float) -> float:
    """A linear warm-up over the first steps, times a cosine down to a tenth over `done` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    cosine = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return options.learning_rate * warm * cosine


def validation_loss(
    model: nn.Module, loss: Loss, data: TextData, options: Options, check: Callable[[], None] = lambda: None
) -> float:
    """Mean loss over the held-out batches, in nats per token; `check` is called before each of them, and may raise."""
    training = model.training
    model.eval()
    losses = []
    try:
        with torch.no_grad():
            sizes = options.tokens, options.batch, options.validation_batches
            for inputs, targets in data.validation_batches(*sizes):
                check()
                losses.append(_value(model, loss, inputs, targets).item())
    finally:
        model.train(training)
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class Context:
    """What a run depends on, and what is kept beside its weights.

    Args:
        identity: what a resumed run must share, under the names that users know.
        generators: random generators besides those of batches and dropout, by name.
        plan: what the plan rests on, for the checkpoint.
        publish: writes the model of the present plan into the run's folder.
        stop: says when to stop.
    """

    identity: dict[str, str] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    plan: Callable[[], RunPlan | None] = lambda: None
    publish: Callable[[], None] = lambda: None
    stop: Stop = field(default_factory=Stop)


def train(
    model: nn.Module,
    loss: Loss,
    data: TextData,
    options: Options,
    folder: Path,
    *,
    resume: bool = False,
    force: bool = False,
    watch: BudgetWatch | None = None,
    context: Context | None = None,
) -> Generator[Event, None, None]:
    """Train in place, yielding an Event for each step and validation; `folder` gets the log, checkpoints and weights.

    `watch` looks at the budget at every validation and may return another module with the same weights to
    continue with. `force`: a run that is already in the folder is replaced. On the CPU, a resumed run continues bit for
    bit with the same number of threads; a run that has done its steps changes nothing. With `context` the folder is
    `claimed` already.

    Raises TfgError: FG413 or FG414 if `resume` finds no checkpoint, or that of another run; FG421 if the folder cannot
    be written; FG431 and FG432 if it is occupied; FG433 if a loss or gradient is not finite. Raises Stopped if
    `context.stop` asks for it.
    """
    whole = context is None
    context = context or Context()
    if whole and resume and is_finished(read_checkpoint(folder / CHECKPOINT), options, context):
        return
    with claimed(folder, resume=resume, force=force) if whole else nullcontext():
        run = _Run(model, loss, data, options, folder, context, watch)
        if resume:
            run.resume()
        else:
            run.begin()
        yield from run.events()


def is_finished(checkpoint: Checkpoint, options: Options, context: Context) -> bool:
    """Whether a run has done the steps that it was asked for. Raises TfgError FG414 if it is another run's."""
    checkpoint.belongs_to(options.settings, context.identity)
    progress = checkpoint.progress
    if options.seconds is not None:
        return progress.seconds >= options.seconds
    if progress.step > options.steps:
        message = f"the run of {checkpoint.path} has done {progress.step} steps, more than {options.steps}"
        raise TfgError.of("FG414", message, "give as many steps or more")
    return progress.step == options.steps and progress.validated == progress.step


class _Run:
    """One run from here to its end.

    A checkpoint holds the state after some step, and is written when the gradient of the next step is known to be
    finite: no state from which training cannot go on replaces one from which it can.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: TextData,
        options: Options,
        folder: Path,
        context: Context,
        watch: BudgetWatch | None,
    ) -> None:
        self.model, self.loss, self.data, self.options = model, loss, data, options
        self.folder, self.context, self.watch = folder, context, watch
        self.optimiser = make_optimiser(model, options)
        self.places = torch.Generator()
        own = {"places": self.places, "dropout": torch.default_generator}
        self.generators = {**own, **context.generators}
        self.step, self.validated = 0, -1
        self.saved = (-1, -1)  # step and validation of the last checkpoint
        self.before = 0.0  # seconds trained by earlier processes
        self.started = time.monotonic()

    def begin(self) -> None:
        """A new run from the model's weights."""
        self.places.manual_seed(self.options.seed)
        torch.manual_seed(self.options.seed)
        self._write_log("")
        self.context.publish()

    def resume(self) -> None:
        """Continue from the folder's checkpoint."""
        checkpoint = read_checkpoint(self.folder / CHECKPOINT)
        is_finished(checkpoint, self.options, self.context)

        def run_once() -> None:
            validation_loss(self.model, self.loss, self.data, replace(self.options, validation_batches=1))

        checkpoint.restore(self.model, self.optimiser, self.generators, run_once)
        progress = checkpoint.progress
        self.step, self.validated, self.before = progress.step, progress.validated, progress.seconds
        self.saved = (self.step, self.validated)
        with writing(self.folder / LOG, kept=self._kept):
            lines = kept_lines(self.folder / LOG, self.step, self.validated)
        self._write_log(lines)
        self.context.publish()

    @property
    def seconds(self) -> float:
        """Trained so far, by all processes of the run."""
        return self.before + time.monotonic() - self.started

    def events(self) -> Iterator[Event]:
        """Train to the end."""
        self.model.train()
        while True:
            total = self.options.seconds
            done = self.step / max(1, self.options.steps) if total is None else self.seconds / total
            states = self._states()
            try:
                yield from self._validate(last=done >= 1.0)
            except StopAsked:
                states.restore(self.model, self.generators)
            else:
                states = self._states()
                if done >= 1.0:
                    self._save(states)
                    return
            yield self._next_step(done, states)

    def _next_step(self, done: float, states: States) -> Event:
        options = self.options
        rate = learning_rate(options, self.step, done)
        batch = self.data.batch(options.tokens, options.batch, self.places)
        value, norm = gradients(self.model, self.loss, self.optimiser, batch, options)
        for what, number in (("loss", value), ("norm of the gradient", norm)):
            if not math.isfinite(number):
                raise self._not_finite(f"the {what} of step {self.step + 1} is {number}")
        if self.context.stop.signal is not None:
            self._save(states)
            raise Stopped(self.step)
        if self.step % options.checkpoint_every == 0:
            self._save(states)
        update(self.optimiser, rate)
        self.step += 1
        return self._record(Event(self.step, self.seconds, value, None, rate, norm))

    def _validate(self, *, last: bool) -> Iterator[Event]:
        """Where it is due, or the run is done; the budget is looked at only where it is due."""
        due = self.step > 0 and self.step % self.options.validate_every == 0
        if self.validated == self.step or not (due or last):
            return
        before = self._states()
        state = None
        with torch.random.fork_rng(devices=[]):
            check = self.context.stop.check
            held_out = validation_loss(self.model, self.loss, self.data, self.options, check)
            if not math.isfinite(held_out):
                raise self._not_finite(f"the validation loss after step {self.step} is {held_out}")
            if due and self.watch is not None:
                state, self.model = self.watch.look(self.model)
        if not due:  # as if it had not been, should the run go on to more steps
            before.restore(self.model, self.generators)
        self.validated = self.step
        yield self._record(Event(self.step, self.seconds, validation_loss=held_out, budget=state))

    def _states(self) -> States:
        return States.of(self.model, self.generators)

    def _save(self, states: States) -> None:
        if self.saved == (self.step, self.validated):
            return
        if not is_finite(self.model, self.optimiser):
            raise self._not_finite(f"a weight or moment after step {self.step} is not finite")
        progress = Progress(
            self.step,
            self.validated,
            self.seconds,
            self.options.settings,
            self.context.identity,
            described(self.optimiser),
            tuple(idle_weights(self.model, self.optimiser)),
            self.context.plan(),
        )
        with writing(self.folder / WEIGHTS, kept=self._kept):
            save_weights(self.folder / WEIGHTS, self.model)
        self.context.publish()
        with writing(self.folder / CHECKPOINT, kept=self._kept):  # the last: with it a step counts as done
            save_checkpoint(self.folder / CHECKPOINT, self.model, self.optimiser, states, progress)
        self.saved = (self.step, self.validated)

    def _record(self, event: Event) -> Event:
        path = self.folder / LOG
        with writing(path, kept=self._kept), path.open("a", encoding="utf-8") as log:
            log.write(event.line())
        return event

    def _write_log(self, text: str) -> None:
        with writing(self.folder / LOG, kept=self._kept):
            write_atomically(self.folder / LOG, text)

    @property
    def _kept(self) -> str:
        step, _ = self.saved
        if step < 0:
            return "no checkpoint is written yet"
        return f"the checkpoint of step {step} is whole: --resume goes on from there"

    def _not_finite(self, what: str) -> TfgError:
        step, _ = self.saved
        kept = "no checkpoint is written yet" if step < 0 else f"the checkpoint of step {step} is kept"
        anew = f"train anew with a --rate below {self.options.learning_rate:g}, or with a smaller --clip"
        return TfgError.of("FG433", f"{what}: the run is stopped", kept, anew)


def training_step(
    model: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    rate: float,
    options: Options,
) -> tuple[float, float]:
    """One forward and backward pass and one step of the optimiser; loss, and gradient norm before clipping."""
    found = gradients(model, loss, optimiser, batch, options)
    update(optimiser, rate)
    return found


def gradients(
    model: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    options: Options,
) -> tuple[float, float]:
    """One forward and backward pass; loss, and norm of the gradient before it is clipped."""
    inputs, targets = batch
    optimiser.zero_grad(set_to_none=True)
    value = _value(model, loss, inputs, targets)
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    return value.item(), norm.item()


def _value(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of a batch; that of a file need not make the logits."""
    if isinstance(loss, Objective):
        return loss.of(model, (inputs,), (targets,))
    return loss(model(inputs), targets)


def update(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """One step of the optimiser by the gradients that are there."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()


def make_optimiser(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW; gains and biases (fewer than two dimensions) are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
