"""Language modelling on a text: the loop behind `fastgrad train` and the demonstration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastgrad_dsl.api.loader import WEIGHTS
from fastgrad_dsl.distributed.sharding import gathered, whole
from fastgrad_dsl.distributed.traffic import Traffic, counted
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
    save_checkpoint,
    save_weights,
    write_weights,
)
from fastgrad_dsl.training.folder import CHECKPOINT, LOG, claimed, remove_sharded
from fastgrad_dsl.training.log import Event, kept_lines
from fastgrad_dsl.training.ranks import Ranks
from fastgrad_dsl.training.sharded import ShardedCheckpoint, ShardedWriter, latest
from fastgrad_dsl.training.stopping import Stop, StopAsked, Stopped
from fastgrad_grammar.diagnostics import TfgError


@runtime_checkable
class BatchLoss(Protocol):
    """A loss that runs the model itself, as an `Objective` does."""

    def of(self, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss of a batch, a scalar."""
        ...


class Data(Protocol):
    """What is learned: batches of inputs and targets."""

    def places(self, tokens: int, batch: int, generator: torch.Generator) -> list[int]:
        """Where the sequences of a random batch are."""
        ...

    def windows(self, places: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """The sequences at these places."""
        ...

    def validation_batches(self, tokens: int, batch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `limit` batches of what is held out, always the same ones, in order."""
        ...


Loss = Callable[[Tensor, Tensor], Tensor] | BatchLoss
MAY_CHANGE = {"steps", "seconds", "validate_every", "validation_batches", "checkpoint_every", "accumulate"}
"""On resuming."""
LEAST_RATE = 0.1  # the cosine ends at this share of the peak learning rate


@dataclass(frozen=True)
class Options:
    """How to train. `seconds` (None: no limit) replaces `steps` as what the schedule runs over.

    steps, tokens (sequence length), batch (sequences per step), accumulate (equal parts of a batch that are run one
    after another), warmup, validate_every, validation_batches and checkpoint_every are counts; learning_rate is the
    peak of AdamW's; clip bounds the gradient's norm; `exact`: the softmax model is trained.
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
    accumulate: int = 1
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
    model: nn.Module,
    loss: Loss,
    data: Data,
    options: Options,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> float:
    """Mean loss over the held-out batches, in nats per token; `check` is called before each of them, and may raise."""
    training, ranks = model.training, ranks or Ranks()
    model.eval()
    losses = []
    try:
        with torch.no_grad():
            sizes = options.tokens, options.batch, options.validation_batches
            for batch in data.validation_batches(*sizes):
                check()
                rows, weight = ranks.own_rows(len(batch[0]))
                inputs, targets = ranks.pieces([each[rows] for each in batch])
                with ranks.context():
                    losses.append(batch_loss(model, loss, inputs, targets).item() * weight * ranks.mesh.data)
    finally:
        model.train(training)
    (mean,) = ranks.mean(sum(losses) / len(losses))
    return mean


@dataclass(frozen=True)
class Context:
    """What a run depends on, and what is kept beside its weights.

    Args:
        identity: what a resumed run must share, under the names that users know.
        generators: random generators besides those of batches and dropout, by name.
        plan: what the plan rests on, for the checkpoint.
        publish: writes the model of the present plan into the run's folder.
        stop: says when to stop.
        ranks: the processes of the run, which all call `train` alike.
    """

    identity: dict[str, str] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    plan: Callable[[], RunPlan | None] = lambda: None
    publish: Callable[[], None] = lambda: None
    stop: Stop = field(default_factory=Stop)
    ranks: Ranks = field(default_factory=Ranks)


def train(
    model: nn.Module,
    loss: Loss,
    data: Data,
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
    if whole and resume and is_finished(latest(folder), options, context):
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
        data: Data,
        options: Options,
        folder: Path,
        context: Context,
        watch: BudgetWatch | None,
    ) -> None:
        self.loss, self.data, self.options = loss, data, options
        self.folder, self.context, self.watch = folder, context, watch
        self.ranks = context.ranks
        self.model = model
        self.writer = ShardedWriter(folder, self.ranks) if self.ranks.count > 1 else None
        self.optimiser = make_optimiser(self.model, options)
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
        # of dropout: each part of a batch has its own
        torch.manual_seed(self.options.seed + self.ranks.of_batch)
        self._first(lambda: self._write_log(""))
        self._first(self.context.publish)

    def resume(self) -> None:
        """Continue from the folder's checkpoint."""
        checkpoint = latest(self.folder)
        is_finished(checkpoint, self.options, self.context)

        def run_once() -> None:
            options = replace(self.options, validation_batches=1)
            validation_loss(self.model, self.loss, self.data, options, ranks=self.ranks)

        if isinstance(checkpoint, ShardedCheckpoint):
            loaded = partial(checkpoint.loaded, self.model, self.ranks)
            checkpoint = self.ranks.each(loaded)
        checkpoint.restore(self.model, self.optimiser, self.generators, run_once)
        progress = checkpoint.progress
        self.step, self.validated, self.before = progress.step, progress.validated, progress.seconds
        self.saved = (self.step, self.validated)
        self._first(self._cut_log)
        self._first(self.context.publish)

    def _cut_log(self) -> None:
        with writing(self.folder / LOG, kept=self._kept):
            lines = kept_lines(self.folder / LOG, self.step, self.validated)
        self._write_log(lines)

    def _first(self, work: Callable[[], object]) -> None:
        self.ranks.first(work)

    @property
    def seconds(self) -> float:
        """Trained so far, by all processes of the run."""
        return self.before + time.monotonic() - self.started

    def events(self) -> Iterator[Event]:
        """Train to the end."""
        self.model.train()
        while True:
            total, steps = self.options.seconds, self.options.steps
            done = (self.step / steps if steps else 1.0) if total is None else self.seconds / total
            states = self._states()
            try:
                yield from self._validate(last=done >= 1.0)
            except StopAsked:
                states.restore(self.model, self.generators)
            else:
                states = self._states()
                if done >= 1.0:
                    self._save(states)
                    self._finish_writing()
                    return
            yield self._next_step(done, states)

    def _next_step(self, done: float, states: States) -> Event:
        options = self.options
        rate = learning_rate(options, self.step, done)
        self.ranks.begins(self.step + 1)
        places = self.data.places(options.tokens, options.batch, self.places)
        started = time.monotonic()
        with counted() if self.ranks.count > 1 else nullcontext(Traffic()) as traffic:
            value, norm = accumulated_gradients(
                self.model, self.loss, self.optimiser, self._parts(places), options, self.ranks
            )
        own = traffic.seconds / max(time.monotonic() - started, 1e-9)
        of_all = self.ranks.gathered(value, self.context.stop.signal or 0, own)
        value, _, waiting = (sum(each) / len(of_all) for each in zip(*of_all, strict=True))
        for what, number in (("loss", value), ("norm of the gradient", norm)):
            if not math.isfinite(number):
                raise self._not_finite(f"the {what} of step {self.step + 1} is {number}")
        if signal := max(int(signal) for _, signal, _ in of_all):
            self.context.stop.signal = signal
            self._save(states)
            self._finish_writing()
            raise Stopped(self.step)
        if self.step % options.checkpoint_every == 0:
            self._save(states)
        update(self.optimiser, rate)
        self.step += 1
        shared = waiting if self.ranks.count > 1 else None
        return self._record(Event(self.step, self.seconds, value, None, rate, norm, shared))

    def _parts(self, places: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """What this process runs of a batch that begins at these places, one part after another."""
        size = len(places) // self.options.accumulate
        for part in range(self.options.accumulate):
            own = self.ranks.own(places[part * size : (part + 1) * size])
            inputs, targets = self.ranks.pieces(self.data.windows(own, self.options.tokens))
            yield inputs, targets

    def _validate(self, *, last: bool) -> Iterator[Event]:
        """Where it is due, or the run is done; the budget is looked at only where it is due."""
        due = self.step > 0 and self.step % self.options.validate_every == 0
        if self.validated == self.step or not (due or last):
            return
        before = self._states()
        state = None
        with torch.random.fork_rng(devices=[]):
            held_out = validation_loss(
                self.model,
                self.loss,
                self.data,
                self.options,
                lambda: self.ranks.check(self.context.stop),
                self.ranks,
            )
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
        if self.ranks.mean(is_finite(self.model, self.optimiser)) != [1.0]:
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
        if self.writer is not None:
            self._save_sharded(self.writer, states, progress)
            return
        with writing(self.folder / WEIGHTS, kept=self._kept):
            save_weights(self.folder / WEIGHTS, self.model)
        self.context.publish()
        with writing(self.folder / CHECKPOINT, kept=self._kept):  # the last: with it a step counts as done
            save_checkpoint(self.folder / CHECKPOINT, self.model, self.optimiser, states, progress)
            remove_sharded(self.folder)
        self.saved = (self.step, self.validated)

    def _save_sharded(self, writer: ShardedWriter, states: States, progress: Progress) -> None:
        """Parts of the checkpoint by each process; the weights are whole in one file, too."""
        weights = {
            name: gathered(weight, keep=self.ranks.leads) for name, weight in self.model.state_dict().items()
        }

        def write() -> None:
            with writing(self.folder / WEIGHTS, kept=self._kept):
                write_weights(self.folder / WEIGHTS, weights)
            self.context.publish()

        self._first(write)
        writer.save(self.model, self.optimiser, states, progress)
        self.saved = (self.step, self.validated)

    def _finish_writing(self) -> None:
        if self.writer is not None:
            self.writer.finish()

    def _record(self, event: Event) -> Event:
        path = self.folder / LOG
        if not self.ranks.leads:
            return event
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
    return accumulated_gradients(model, loss, optimiser, [batch], replace(options, accumulate=1), Ranks())


def accumulated_gradients(
    model: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    parts: Iterable[tuple[Tensor, Tensor]],
    options: Options,
    ranks: Ranks,
) -> tuple[float, float]:
    """Forward and backward passes of all parts of a batch; the mean of this process's losses, and the norm of all.

    The gradient is that of the mean over all processes: `fully_shard` takes that mean, and a loss of sequences in
    pieces has on each process the gradient of its own share.
    """
    optimiser.zero_grad(set_to_none=True)
    total = 0.0
    for inputs, targets in parts:
        with ranks.context():
            value = batch_loss(model, loss, inputs, targets)
            scaled = value if options.accumulate == 1 else value / options.accumulate
            (scaled if ranks.mesh.context == 1 else scaled * ranks.mesh.context).backward()
        total += value.item()
    return total / options.accumulate, clip_gradients(model, options.clip)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """The norm of all gradients together, which are scaled down in place where that is beyond the limit.

    PyTorch's functions take weights that are in parts alike.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for weight in model.parameters():
        parts = (weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else None
        groups.setdefault(parts, []).append(weight)
    gradients = [[weight.grad for weight in group if weight.grad is not None] for group in groups.values()]
    norm = get_total_norm([whole(get_total_norm(each)) for each in gradients])
    for group in groups.values():
        clip_grads_with_norm_(group, limit, norm)
    return norm.item()


def batch_loss(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of a batch; that of a file need not make the logits."""
    if isinstance(loss, BatchLoss):
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
