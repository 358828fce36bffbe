"""Synthetic tasks whose answers lie earlier in the same sequence, and two texts. Each gives tokens and targets, int64
[batch, n].

A target of IGNORED is not scored. Everything follows from the generator.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Generator, Tensor

from benchmarks.settings import ROOT
from fastgrad_dsl.models.text_data import TextData, load_text

IGNORED = -100  # of torch's cross_entropy
GAP_POWER = (
    0.01  # how far a query lies from its pair: the share of the paths with gap g falls as g^(power - 1)
)
STATES = 12  # of a Markov chain
NOVEL = ROOT / "examples" / "data" / "emma.txt"
VERSES = ("bible", "-f", "gen1:1-rev22:21")  # the command that prints them, one a line, after its place
HELD_OUT_SEED = 1_000_000

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learned. size: pairs, or tokens to copy; vocabulary: number of tokens."""

    name: str
    n: int
    size: int
    vocabulary: int

    def batch(self, count: int, generator: Generator, n: int | None = None) -> Batch:
        """Tokens and targets of `count` sequences of n tokens, by default the task's own n."""
        return MAKERS[self.name](self, count, n or self.n, generator)

    def held_out(self, batches: int, count: int, n: int) -> Iterator[Batch]:
        """Sequences that no run trains on, always the same: of text, one after another, from its last tenth."""
        if self.name in TEXTS:
            yield from TEXTS[self.name](n).validation_batches(n, 1, batches)
        else:
            generator = torch.Generator().manual_seed(HELD_OUT_SEED)
            for _ in range(batches):
                yield self.batch(count, generator, n)


def recall(task: Task, count: int, n: int, generator: Generator) -> Batch:
    """Multi-query associative recall (arXiv 2312.04927, appendix E): pairs of a key and a value, then every key once
    again, at which its value is asked for.

    Keys are of the first half of the vocabulary, values of the second; token 0 fills the places between.
    """
    pairs, half = task.size, task.vocabulary // 2
    if 4 * pairs > n:
        raise ValueError(f"{pairs} pairs and as many queries need {4 * pairs} tokens, not {n}")
    keys = 1 + torch.rand(count, half - 1, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(half, task.vocabulary, (count, pairs), generator=generator)
    tokens = torch.zeros(count, n, dtype=torch.int64)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), -1).flatten(1)
    targets = torch.full_like(tokens, IGNORED)
    slots = (n - 2 * pairs) // 2
    share = GAP_POWER * torch.arange(1, slots + 1, dtype=torch.float64) ** (GAP_POWER - 1)
    places = torch.multinomial(share.expand(count, -1), pairs, generator=generator)
    places = 2 * pairs + 2 * places  # one query for each pair, two tokens apart at least
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets


def markov(task: Task, count: int, n: int, generator: Generator) -> Batch:
    """A random chain of STATES states for each sequence: the next token is to be foretold. See `oracle_loss`."""
    rows = chains(count, generator)
    tokens = torch.empty(count, n + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(STATES, (count,), generator=generator)
    for t in range(n):
        tokens[:, t + 1] = torch.multinomial(
            rows[torch.arange(count), tokens[:, t]], 1, generator=generator
        ).squeeze(1)
    return tokens[:, :-1], tokens[:, 1:]


def chains(count: int, generator: Generator) -> Tensor:
    """Transition probabilities [count, STATES, STATES]: rows of a flat Dirichlet distribution."""
    draws = (
        -torch.rand(count, STATES, STATES, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    )
    return draws / draws.sum(-1, keepdim=True)


def oracle_loss(tokens: Tensor, targets: Tensor) -> float:
    """Cross entropy, in nats, of the Bayes prediction: (transitions seen + 1) / (visits + STATES)."""
    count, n = tokens.shape
    seen = torch.ones(count, STATES, STATES, dtype=torch.float64)
    row, total = torch.arange(count), 0.0
    for t in range(n):
        now, following = tokens[:, t], targets[:, t]
        total -= float((seen[row, now, following] / seen[row, now].sum(-1)).log().sum())
        seen[row, now, following] += 1
    return total / (count * n)


def copying(task: Task, count: int, n: int, generator: Generator) -> Batch:
    """`size` random tokens, filler, and at the end a sign after which they are to be written again."""
    size = task.size
    if 2 * size + 1 > n:
        raise ValueError(f"{size} tokens twice and a sign need {2 * size + 1} tokens, not {n}")
    text = torch.randint(2, task.vocabulary, (count, size), generator=generator)
    tokens = torch.zeros(count, n + 1, dtype=torch.int64)
    tokens[:, :size] = text
    tokens[:, n - size] = 1
    tokens[:, n - size + 1 :] = text
    targets = tokens[:, 1:].clone()
    targets[:, : n - size] = IGNORED
    return tokens[:, :-1], targets


def needle(task: Task, count: int, n: int, generator: Generator) -> Batch:
    """A sign and a token somewhere in random text; at the end the sign again, and the token is asked for."""
    tokens = torch.randint(2, task.vocabulary, (count, n), generator=generator)
    place = torch.randint(0, n - 3, (count, 1), generator=generator)
    found = tokens.gather(1, place + 1)
    tokens.scatter_(1, place, 1)
    tokens[:, -1] = 1
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = found
    return tokens, targets


def language(task: Task, count: int, n: int, generator: Generator) -> Batch:
    """Bytes from anywhere in the first nine tenths of a text: the next one is to be foretold."""
    return TEXTS[task.name](n).batch(n, count, generator)


@cache
def novel(n: int) -> TextData:
    """The novel that the examples train on, of 0.9 MB."""
    return load_text(NOVEL, n)


@cache
def scripture(n: int) -> TextData:
    """The King James Version, of 4 MB, as Debian's package `bible-kjv` prints it, without the places of verses."""
    if shutil.which(VERSES[0]) is None:
        raise SystemExit("scripture needs the command `bible` of Debian's package bible-kjv")
    printed = subprocess.run(VERSES, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
    with NamedTemporaryFile() as file:
        file.write(b"\n".join(verse.partition(b" ")[2] for verse in printed.splitlines()))
        file.flush()
        return load_text(Path(file.name), n)


TEXTS: dict[str, Callable[[int], TextData]] = {"language": novel, "scripture": scripture}
MAKERS: dict[str, Callable[[Task, int, int, Generator], Batch]] = {
    "recall": recall,
    "markov": markov,
    "copying": copying,
    "needle": needle,
    **dict.fromkeys(TEXTS, language),
}
