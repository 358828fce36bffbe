"""Byte-level language modelling on a text: the loop behind `fastgrad train` and the demonstration."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgrad_dsl.budget_watch import BudgetState, BudgetWatch
from fastgrad_dsl.checkpoint import Progress, load_checkpoint, save_checkpoint
from fastgrad_dsl.files import write_atomically
from fastgrad_dsl.text_data import TextData

Loss = Callable[[Tensor, Tensor], Tensor]
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
LEAST_RATE = 0.1  # the cosine ends at this share of the peak learning rate


@dataclass(frozen=True)
class Options:
    """How to train. `seconds` (None: no limit) replaces `steps` as what the schedule runs over.

    steps, tokens (sequence length), batch (sequences a step), warmup, validate_every, validation_batches and
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
        """What a resumed run must share for the same result: all but how often things are written."""
        reported = {"checkpoint_every"}
        return {
            key: value for key, value in asdict(self).items() if key not in reported and value is not None
        }


@dataclass(frozen=True)
class Event:
    """One line of the log: a step's loss and rate, or a validation loss; losses in nats per byte."""

    step: int
    seconds: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    budget: BudgetState | None = None

    def line(self) -> str:
        """The event as one line of JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}) + "\n"


def learning_rate(options: Options, step: int, done: float) -> float:
    """A linear warm-up over the first steps, times a cosine down to a tenth over `done` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    cosine = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return options.learning_rate * warm * cosine


def validation_loss(model: nn.Module, loss: Loss, data: TextData, options: Options) -> float:
    """Mean loss over the held-out batches, nats per byte."""
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [
            loss(model(inputs), targets).item()
            for inputs, targets in data.validation_batches(
                options.tokens, options.batch, options.validation_batches
            )
        ]
    model.train(training)
    return sum(losses) / len(losses)


def train(
    model: nn.Module,
    loss: Loss,
    data: TextData,
    options: Options,
    folder: Path,
    *,
    resume: bool = False,
    watch: BudgetWatch | None = None,
) -> Iterator[Event]:
    """Train in place, yielding an Event a step and a validation; `folder` gets the log and the checkpoint.

    `watch` looks at the budget at every validation and may give another module with the same weights to go on with.

    On the CPU, a resumed run continues bit for bit for the same number of threads. Raises TfgError FG413 or
    FG414 where `resume` finds no checkpoint, or that of another run.
    """
    optimiser = make_optimiser(model, options)
    places = torch.Generator().manual_seed(options.seed)
    generators = {"places": places, "dropout": torch.default_generator}
    settings = options.settings
    first = 0
    log = folder / LOG
    if resume:
        first = load_checkpoint(folder / CHECKPOINT, model, optimiser, generators, settings).step
    else:
        torch.manual_seed(options.seed)
    write_atomically(log, _kept_lines(log, first) if resume else "")
    started = time.monotonic()

    def record(event: Event) -> Event:
        with log.open("a") as stream:
            stream.write(event.line())
        return event

    def save(step: int) -> None:
        save_checkpoint(folder / CHECKPOINT, model, optimiser, generators, Progress(step, settings))

    step = first
    model.train()
    while True:
        elapsed = time.monotonic() - started
        done = step / options.steps if options.seconds is None else elapsed / options.seconds
        if done >= 1.0:
            break
        rate = learning_rate(options, step, done)
        value, norm = training_step(
            model, loss, optimiser, data.batch(options.tokens, options.batch, places), rate, options
        )
        step += 1
        yield record(Event(step, time.monotonic() - started, value, None, rate, norm))
        if step % options.validate_every == 0:
            held_out = validation_loss(model, loss, data, options)
            state = None
            if watch is not None:
                state, model = watch.look(model)
            yield record(Event(step, time.monotonic() - started, validation_loss=held_out, budget=state))
        if step % options.checkpoint_every == 0:
            save(step)
    save(step)
    if step % options.validate_every != 0 or step == first:
        held_out = validation_loss(model, loss, data, options)
        yield record(Event(step, time.monotonic() - started, validation_loss=held_out))


def training_step(
    model: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    rate: float,
    options: Options,
) -> tuple[float, float]:
    """One forward and backward pass and one step of the optimiser; loss, and gradient norm before clipping."""
    inputs, targets = batch
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    value = loss(model(inputs), targets)
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimiser.step()
    return value.item(), norm.item()


def make_optimiser(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW; gains and biases (fewer than two dimensions) are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def _kept_lines(log: Path, step: int) -> str:
    """The lines of an earlier run up to the checkpoint that it is resumed from."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return "".join(line for line in lines if _step_of(line) <= step)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a line cut off by a crash is dropped


def generate(
    model: nn.Module,
    prompt: bytes,
    length: int,
    *,
    window: int,
    multiple: int = 1,
    temperature: float = 0.8,
    seed: int = 0,
) -> bytes:
    """`length` bytes that the model writes after `prompt`, each drawn given at most `window` bytes before it.

    The input is padded on the right to a multiple of `multiple`, which a causal model does not see.
    """
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            context = text[-window:]
            padded = context + [0] * (-len(context) % multiple)
            logits = model(torch.tensor([padded]))[0, len(context) - 1, :256]
            weights = torch.softmax(logits.float() / temperature, -1)
            text.append(int(torch.multinomial(weights, 1, generator=generator)))
    model.train(training)
    return bytes(text[len(prompt) :])
