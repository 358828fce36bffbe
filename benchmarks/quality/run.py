"""Train every form on every task, and write docs/quality.json; docs/quality.md and its plots are made from it.

    python -m benchmarks.quality.run [--task NAME ...] [--form TEXT ...] [--rate R ...] [--seeds N] [--minutes M]

One thread computes, and seconds are of the processor: other work on the machine hardly changes them. A run that is in
the file is not repeated, and each is written as soon as it has ended: what was cut off goes on with the same command.
`--minutes` ends after the run in which they are over; `--quick` tries tiny sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad_dsl as fg
from benchmarks.quality import page
from benchmarks.quality.forms import NAMES, layers, text
from benchmarks.quality.tasks import IGNORED, TEXTS, Task, oracle_loss
from benchmarks.settings import ROOT, say
from benchmarks.tables import processor
from fastgrad_dsl.bench.machine import describe_machine
from fastgrad_dsl.storage.files import write_atomically

RATES = (2e-3, 5e-3, 1e-2)
WARM_UP = 0.1  # share of the steps in which the rate rises
DECAY = 0.1  # of weights
POINTS = 10  # of a curve
HELD_OUT = 16  # sequences in a batch of the test, of which there are TEST_BATCHES
TEST_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """A task, the model's size, and for how long it is trained.

    stages: equal parts of the training, each of twice the tokens and twice the pairs of the one before, the last of
    the task's own; lengths: of the tests.
    """

    task: Task
    layers: int = 2
    width: int = 64
    heads: int = 2
    near: int = 16
    batch: int = 16
    steps: int = 600
    stages: int = 1
    lengths: tuple[int, ...] = ()


SETTINGS: dict[str, Setting] = {
    **{f"recall of {p} pairs": Setting(Task("recall", 8 * p, p, 128)) for p in (16, 32)},
    # from the beginning, neither softmax nor the mixer learns so many pairs in 600 steps
    "recall of 64 pairs": Setting(Task("recall", 512, 64, 256), steps=900, stages=3),
    "recall of 128 pairs": Setting(Task("recall", 1024, 128, 512), width=128, heads=4, steps=900, stages=4),
    "chains": Setting(Task("markov", 512, 0, 12)),
    "copying": Setting(Task("copying", 128, 32, 64), lengths=(128, 256, 512)),
    "needle": Setting(Task("needle", 256, 0, 64), batch=64, lengths=(256, 1024, 2048)),
    **{
        f"{name} of {n:,} bytes": Setting(Task(name, n, 0, 256), 4, 128, 4, 64, batch=1, steps=steps)
        for name in TEXTS
        for n, steps in ((2048, 300), (4096, 200), (8192, 100))
    },
}
QUICK = {
    name: Setting(
        Task(s.task.name, 32, 4, s.task.vocabulary),
        width=16,
        heads=1,
        batch=2,
        steps=2,
        lengths=s.lengths[:1],
    )
    for name, s in SETTINGS.items()
}


def model_of(setting: Setting, form: str, seed: int) -> nn.Module:
    """The module of a form, with initial weights of a seed."""
    longest = max(65_536, setting.task.n)
    spec = text(
        layers(form, setting.layers),
        vocabulary=setting.task.vocabulary,
        width=setting.width,
        heads=setting.heads,
        near=setting.near,
        longest=longest,
    )
    return fg.compile(spec).module(seed=seed)


def rate_at(step: int, steps: int, rate: float) -> float:
    """A rise, then the first quarter of a cosine's period."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return rate * (step + 1) / rising
    return rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def task_at(step: int, setting: Setting) -> Task:
    """What is trained on at a step."""
    smaller = 2 ** (setting.stages - 1 - step * setting.stages // setting.steps)
    return replace(setting.task, n=setting.task.n // smaller, size=setting.task.size // smaller)


def loss_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the scored targets, and the share of them that is foretold."""
    scored = targets != IGNORED
    right = (logits.argmax(-1) == targets)[scored].float().mean()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED), right


def measured(setting: Setting, form: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: losses and accuracies on held-out sequences, the curve of training, seconds, bytes of state."""
    model = model_of(setting, form, seed)
    curve = list(train(model, setting, rate, seed))
    tests = [assess(model, setting, n) for n in setting.lengths or (setting.task.n,)]
    of_layers = [
        each.state_bytes(setting.task.n, setting.heads, setting.width, setting.near)
        for each in layers(form, setting.layers)
    ]
    state = sum(of_layers) // setting.layers
    return {"seconds": curve[-1][1], "state_bytes": state, "tests": tests, "curve": curve}


def train(model: nn.Module, setting: Setting, rate: float, seed: int) -> Iterator[tuple[int, float, float]]:
    """Train on fresh sequences at every step; POINTS times the steps and seconds so far, and the loss on held-out ones.

    The first step, in which kernels are built, and the tests are not on the clock.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY, betas=(0.9, 0.95))
    points = {round(setting.steps * (i + 1) / POINTS) for i in range(POINTS)}
    seconds = 0.0
    for step in range(setting.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, setting.steps, rate)
        tokens, targets = task_at(step, setting).batch(setting.batch, generator)
        started = time.process_time()
        loss, _ = loss_of(model(tokens), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seconds += time.process_time() - started if step else 0.0
        if step + 1 in points:
            yield step + 1, round(seconds, 2), assess(model, setting, setting.task.n, 2)["loss"]


@torch.no_grad()
def assess(model: nn.Module, setting: Setting, n: int, batches: int = TEST_BATCHES) -> dict[str, Any]:
    """Loss and accuracy at a length, on sequences that no run has trained on; of text by quarters of the length too."""
    found, quarters = [], torch.zeros(4, dtype=torch.float64)
    oracle = 0.0
    for tokens, targets in setting.task.held_out(batches, HELD_OUT, n):
        logits = model(tokens)
        found.append(torch.stack(loss_of(logits, targets)))
        if setting.task.name == "markov":
            oracle += oracle_loss(tokens, targets) / batches
        if setting.task.name in TEXTS:
            quarters += by_quarters(logits, targets) / batches
    loss, accuracy = torch.stack(found).mean(0).tolist()
    return (
        {"n": n, "loss": round(loss, 5), "accuracy": round(accuracy, 5)}
        | ({"oracle": round(oracle, 5)} if oracle else {})
        | ({"quarters": [round(x, 5) for x in quarters.tolist()]} if quarters.any() else {})
    )


def by_quarters(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 [4]: the loss of each quarter of the sequence."""
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return torch.stack([part.mean() for part in losses.view(targets.shape).chunk(4, -1)]).double()


def runs(
    tasks: list[str], forms: list[str], seeds: int, rates: Sequence[float] = RATES
) -> Iterator[tuple[str, str, float, int]]:
    """(task, form, rate, seed), the first seed of everything first."""
    for seed, task, form, rate in itertools.product(range(seeds), tasks, forms, rates):
        yield task, form, rate, seed


def measure(
    path: Path, settings: Mapping[str, Setting], wanted: Iterator[tuple[str, str, float, int]], ends: float
) -> dict[str, Any]:
    """Do what the file lacks until the clock, `time.monotonic`, says `ends`."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    done = {(each["task"], each["form"], each["rate"], each["seed"]) for each in document["runs"]}
    for key in wanted:
        if key in done:
            continue
        if time.monotonic() >= ends:
            break
        task, form, rate, seed = key
        found = measured(settings[task], form, rate, seed)
        say(f"{task}, {form}, rate {rate:g}, seed {seed}: {found['seconds']:.0f} s, {found['tests'][-1]}")
        machine = describe_machine(torch.get_num_threads())
        known = {"task": task, "form": form, "rate": rate, "seed": seed, "processor": processor(machine)}
        document["runs"].append(known | found)
        document["settings"] = {name: asdict(setting) for name, setting in settings.items()}
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    return document


def main() -> None:
    """Measure what is asked for, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=SETTINGS, help="all by default")
    parser.add_argument("--form", action="append", choices=NAMES, help="all by default")
    parser.add_argument("--rate", action="append", type=float, help="three by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--json", type=Path, default=ROOT / page.JSON)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it works")
    options = parser.parse_args()
    settings = QUICK if options.quick else SETTINGS
    wanted = runs(options.task or [*SETTINGS], options.form or [*NAMES], options.seeds, options.rate or RATES)
    torch.set_num_threads(1)
    document = measure(options.json, settings, wanted, time.monotonic() + 60 * options.minutes)
    if options.json == ROOT / page.JSON:
        for name, content in page.render(document).items():
            write_atomically(ROOT / name, content)


if __name__ == "__main__":
    main()
