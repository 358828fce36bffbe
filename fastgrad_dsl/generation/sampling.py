"""The next token from its logits: settings, what each of them means, and the draw.

They apply in this order, which is that of Hugging Face's transformers: the repetition penalty, the temperature,
top-k, top-p, min-p. All arithmetic is in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_grammar.diagnostics import TfgError

SEEDS = 1 << 63
LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults draw from the model's own distribution.

    Args:
        temperature: logits are divided by it. 0: the most likely token, of equal ones that with the smallest id.
        top_k: only tokens whose logit is at least the k-th largest are drawn, which are more than k where some are
            equal (Fan et al., arXiv 1805.04833). None, or a k beyond the vocabulary: all.
        top_p: only the most likely tokens are drawn, the fewest whose probabilities after top-k sum to at least
            `top_p`, of equal ones those with the smaller ids; one at least (Holtzman et al., arXiv 1904.09751).
            1: all.
        min_p: only tokens are drawn that are at least `min_p` times as likely as the most likely one
            (Nguyen et al., arXiv 2407.01082). 0: all.
        repetition_penalty: logits of tokens that the text has already, prompt or not, are divided by it where they are
            positive and multiplied by it where they are negative (Keskar et al., arXiv 1909.05858). 1: none.
        seed: row i of a batch draws as a single sequence of the seed `seed + i` does, whatever the batch.

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, is_right, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number, 0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf,
             "a finite number above 0"),
            ("seed", self.seed, 0 <= self.seed < SEEDS, "from 0 to 2^63 - 1"),
        ):  # fmt: skip
            if not is_right:
                raise ValueError(f"{name} {value}: expected {expected}")


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from, float64 [b, vocab], of logits [b, vocab].

    `seen`, bool [b, vocab], says which tokens the text has. A logit of -infinity is a token that is never drawn.
    Raises TfgError FG427 if a logit is NaN or +infinity, or all of a row are -infinity.
    """
    logits = _penalised(_checked(logits), seen, sampling.repetition_penalty)
    logits = logits - logits.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits / sampling.temperature
    if sampling.top_k is not None:
        scaled = _top_k(scaled, sampling.top_k)
    weights = scaled.softmax(-1)
    if sampling.top_p < 1:
        weights = _top_p(weights, sampling.top_p)
    if sampling.min_p > 0:
        least = sampling.min_p * weights.amax(-1, keepdim=True)
        weights = weights.masked_fill(weights < least, 0)
    return weights / weights.sum(-1, keepdim=True)


class Sampler:
    """Draws tokens for the rows of a batch, each by a generator of its own."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        seeds = ((sampling.seed + row) % SEEDS for row in range(rows))
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, logits: Tensor, seen: Tensor) -> Tensor:
        """One token of each row, int64 [b], by inversion of the distribution function; as `probabilities`."""
        sums = probabilities(logits, seen, self.sampling).cumsum(-1)
        places = sums[:, -1] * _uniform(self._generators)
        return torch.searchsorted(sums, places[:, None], right=True)[:, 0]


def _uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """A number from [0, 1) of each generator, float64."""
    return torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in generators])


def _checked(logits: Tensor) -> Tensor:
    logits = logits.detach().to("cpu", torch.float64)
    if bool((logits.isnan() | logits.isposinf()).any()) or not bool(logits.isfinite().any(-1).all()):
        help_ = "its weights hold such numbers, or are too large for the type in which it runs"
        raise TfgError.of("FG427", "the model gives logits of the next token that are not finite", help_)
    return logits


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    if penalty == 1:
        return logits
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-LARGEST, LARGEST)
    return torch.where(seen & logits.isfinite(), changed, logits)


def _top_k(logits: Tensor, k: int) -> Tensor:
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, -1).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def _top_p(weights: Tensor, top_p: float) -> Tensor:
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.cumsum(-1).roll(1, -1) >= top_p  # the sum of those before, of the first that of all
    dropped[:, 0] = False
    return weights.masked_fill(torch.zeros_like(dropped).scatter(-1, ids, dropped), 0)
