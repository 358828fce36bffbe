"""Generation by a model without a step form: the whole text is run again for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastgrad_dsl.generation.sampling import Sampler, Sampling


def rerun(
    model: nn.Module,
    prompt: Sequence[int],
    length: int,
    sampling: Sampling,
    *,
    window: int,
    size: int,
    multiple: int = 1,
) -> list[int]:
    """`length` ids below `size` that the model writes after `prompt`, each drawn given at most `window` before it.

    The input is padded on the right to a multiple of `multiple`, which a causal model does not see. Raises TfgError
    FG427 if logits are not finite.
    """
    sampler = Sampler(sampling, 1)
    text, training = list(prompt), model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(length):
                context = text[-window:]
                padded = context + [0] * (-len(context) % multiple)
                logits = model(torch.tensor([padded]))[:, len(context) - 1, :size]
                seen = torch.isin(torch.arange(logits.shape[1]), torch.tensor(text))[None]
                text.append(int(sampler.draw(logits, seen)))
    finally:
        model.train(training)
    return text[len(prompt) :]
