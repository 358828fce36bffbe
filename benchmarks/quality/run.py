"""Train every form on every task, and write docs/quality.json; docs/quality.md and its plots are made from it.

    python -m benchmarks.quality.run [--task NAME ...] [--form TEXT ...] [--seeds N] [--minutes M] [--quick]

A run that is in the file is not repeated, and each is written as soon as it has ended: what was cut off goes on with
the same command. `--minutes` ends after the run in which they are over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad_dsl as fg
from benchmarks.quality import page
from benchmarks.quality.forms import FORMS, text
from benchmarks.quality.tasks import IGNORED, Task, oracle_loss
from benchmarks.settings import ROOT, say
from fastgrad_dsl.bench.machine import describe_machine
from fastgrad_dsl.storage.files import write_atomically

RATES = (2e-3, 5e-3, 1e-2)
WARM_UP = 0.1  # share of the steps in which the rate rises
DECAY = 0.1  # of weights
HELD_OUT = 16  # sequences in a batch of the test, of which there are TEST_BATCHES
TEST_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """A task, the model's size, and for how long it is trained; lengths: of the tests."""

    task: Task
    layers: int = 2
    width: int = 64
    heads: int = 2
    batch: int = 16
    steps: int = 400
    lengths: tuple[int, ...] = ()


SETTINGS: dict[str, Setting] = {
    **{f"recall of {p} pairs": Setting(Task("recall", 8 * p, p, max(128, 4 * p))) for p in (16, 32, 64, 128)},
    "chains": Setting(Task("markov", 512, 0, 12)),
    "copying": Setting(Task("copying", 128, 32, 64), lengths=(128, 256, 512)),
    "needle": Setting(Task("needle", 256, 0, 64), batch=64, lengths=(256, 1024, 2048)),
}
QUICK = {
    name: Setting(Task(s.task.name, 32, 4, 32), width=16, heads=1, batch=2, steps=2, lengths=s.lengths[:1])
    for name, s in SETTINGS.items()
}


def model_of(setting: Setting, form: str, seed: int) -> nn.Module:
    """The module of a form, with initial weights of a seed."""
    longest = max(65_536, setting.task.n)
    spec = text(
        (FORMS[form],) * setting.layers,
        vocabulary=setting.task.vocabulary,
        width=setting.width,
        heads=setting.heads,
        longest=longest,
    )
    return fg.compile(spec).module(seed=seed)


def rate_at(step: int, steps: int, rate: float) -> float:
    """A rise, then the first quarter of a cosine's period."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return rate * (step + 1) / rising
    return rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the scored targets, and the share of them that is foretold."""
    logits = model(tokens)
    scored = targets != IGNORED
    right = (logits.argmax(-1) == targets)[scored].float().mean()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED), right


def measured(setting: Setting, form: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: losses and accuracies on held-out sequences, seconds of training, bytes of state."""
    model = model_of(setting, form, seed)
    seconds = train(model, setting, rate, seed)
    tests = [test(model, setting, n) for n in setting.lengths or (setting.task.n,)]
    state = FORMS[form].state_bytes(setting.task.n, setting.heads, setting.width)
    return {"seconds": round(seconds, 1), "state_bytes": state, "tests": tests}


def train(model: nn.Module, setting: Setting, rate: float, seed: int) -> float:
    """Train on fresh sequences at every step; the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY, betas=(0.9, 0.95))
    started = time.perf_counter()
    for step in range(setting.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, setting.steps, rate)
        loss, _ = loss_of(model, *setting.task.batch(setting.batch, generator))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return time.perf_counter() - started


@torch.no_grad()
def test(model: nn.Module, setting: Setting, n: int) -> dict[str, Any]:
    """Loss and accuracy at a length, on sequences that no run has trained on."""
    generator, found = torch.Generator().manual_seed(1_000_000), []
    oracle = 0.0
    for _ in range(TEST_BATCHES):
        tokens, targets = setting.task.batch(HELD_OUT, generator, n)
        found.append(torch.stack(loss_of(model, tokens, targets)))
        if setting.task.name == "markov":
            oracle += oracle_loss(tokens, targets) / TEST_BATCHES
    loss, accuracy = torch.stack(found).mean(0).tolist()
    return {"n": n, "loss": round(loss, 5), "accuracy": round(accuracy, 5)} | (
        {"oracle": round(oracle, 5)} if oracle else {}
    )


def runs(tasks: list[str], forms: list[str], seeds: int) -> Iterator[tuple[str, str, float, int]]:
    """(task, form, rate, seed), the first seed of everything first."""
    for seed, task, form, rate in itertools.product(range(seeds), tasks, forms, RATES):
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
        document["runs"].append({"task": task, "form": form, "rate": rate, "seed": seed, **found})
        document["machine"] = describe_machine(torch.get_num_threads())
        document["settings"] = {name: asdict(setting) for name, setting in settings.items()}
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    return document


def main() -> None:
    """Measure what is asked for, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=SETTINGS, help="all by default")
    parser.add_argument("--form", action="append", choices=FORMS, help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--json", type=Path, default=ROOT / page.JSON)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it works")
    options = parser.parse_args()
    settings = QUICK if options.quick else SETTINGS
    wanted = runs(options.task or [*SETTINGS], options.form or [*FORMS], options.seeds)
    document = measure(options.json, settings, wanted, time.monotonic() + 60 * options.minutes)
    if options.json == ROOT / page.JSON:
        for name, content in page.render(document).items():
            write_atomically(ROOT / name, content)


if __name__ == "__main__":
    main()
