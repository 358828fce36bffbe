"""Tokens after a prompt, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import index

import torch
from torch import Tensor, nn

from fastgrad_dsl.generation.reading import Reading, read
from fastgrad_dsl.generation.sampling import Sampler, Sampling
from fastgrad_dsl.generation.step_form import StepModel, step_form
from fastgrad_dsl.models.tokenizer import ByteTokenizer, Tokenizer, check_size
from fastgrad_grammar.diagnostics import TfgError

Prompt = str | bytes | Sequence[int] | Tensor
PLAIN = Sampling()
LEAST, MOST = -(1 << 63), (1 << 63) - 1  # of int64


def generate(
    model: nn.Module,
    prompt: Prompt,
    *,
    tokens: int,
    sampling: Sampling = PLAIN,
    samples: int = 1,
    tokenizer: Tokenizer | None = None,
    after: Reading | None = None,
) -> Iterator[Tensor]:
    """Yield `tokens` times the next token of each sequence, int64 [b * samples] on the CPU.

    Args:
        model: a generated module, or any with its step form (docs/generation.md).
        prompt: a text (b = 1) that `tokenizer` splits, by default into bytes; ids (b = 1); or an int tensor [b, c] of
            ids, c at least 1. It may be empty after a reading.
        samples: how many continuations of each sequence, those of the whole batch after each other. The prompt is read
            once, and its state repeated.
        tokenizer: also for ids, it limits what is drawn to the tokens that it has.
        after: what `read_prompt` read before, which is left as it is.

    The prompt is read before the first token is asked for. Raises TfgError: FG434 if the model has no step form, FG437
    for an empty prompt or an id that the model does not have, FG436 for a tokenizer with more tokens than the model,
    FG427 if logits are not finite, FG426 if the samples do not fit into memory, FG411 for a text that is not the
    tokenizer's; ValueError for a count below 0, a batch of another size than that of `after`, and, when it comes to
    that, for more tokens than the model is declared for.
    """
    if tokens < 0 or samples < 1:
        raise ValueError(f"tokens {tokens}, samples {samples}: expected at least 0 and 1")
    if tokenizer is None and isinstance(prompt, str | bytes):
        tokenizer = ByteTokenizer()
    reading = read_prompt(model, prompt, tokenizer=tokenizer, after=after)
    if tokenizer is not None:
        check_size(tokenizer, reading.logits.shape[1], type(model).__name__)
    size = None if tokenizer is None else tokenizer.size
    return go_on(step_form(model), reading.repeat(samples), tokens, sampling, size)


def read_prompt(
    model: nn.Module,
    prompt: Prompt,
    *,
    tokenizer: Tokenizer | None = None,
    after: Reading | None = None,
) -> Reading:
    """Read a prompt once, to `generate` after it many times; the arguments and errors are those of `generate`."""
    steps = step_form(model)
    return read_ids(steps, as_ids(prompt, tokenizer or ByteTokenizer()), after)


def read_ids(model: StepModel, ids: Tensor, after: Reading | None) -> Reading:
    """Read int64 [b, c] after what was read before, which is left as it is.

    Raises TfgError FG437 if there is nothing to go on from, or an id that the model does not have.
    """
    if ids.shape[1]:
        return read(model, ids, None if after is None else after.clone())
    if after is None:
        raise TfgError.of("FG437", "the prompt has no tokens", "give at least one")
    return after.clone()


def as_ids(prompt: Prompt, tokenizer: Tokenizer) -> Tensor:
    """A prompt as int64 [b, c].

    Raises TfgError FG411 for a text that is not the tokenizer's, FG437 for an id that no model has, ValueError for what
    is no prompt.
    """
    if isinstance(prompt, str):
        prompt = prompt.encode(errors="surrogateescape")
    if isinstance(prompt, bytes):
        return tokenizer.encode(prompt, "the prompt").long()[None]
    if not isinstance(prompt, Tensor):
        return _of_sequence(prompt)
    if prompt.ndim != 2 or not prompt.shape[0] or not _is_whole(prompt):
        raise _no_prompt(f"a tensor {list(prompt.shape)} of {str(prompt.dtype).removeprefix('torch.')}")
    return prompt.long()


def _of_sequence(prompt: object) -> Tensor:
    """Ids as int64 [1, c]: int, or whatever stands for one, such as those of numpy; truth values stand for none."""
    if not isinstance(prompt, Iterable):
        raise _no_prompt(type(prompt).__name__)
    ids = []
    for each in prompt:
        try:
            if isinstance(each, bool) or (isinstance(each, Tensor) and (each.ndim or not _is_whole(each))):
                raise TypeError
            ids.append(index(each))
        except TypeError:
            raise _no_prompt(f"a sequence with {type(each).__name__} {each}") from None
    beyond = next((each for each in ids if not LEAST <= each <= MOST), None)
    if beyond is not None:
        raise TfgError.of("FG437", f"the prompt has the id {beyond}, which the model does not have")
    return torch.tensor(ids, dtype=torch.int64)[None]


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _no_prompt(given: str) -> ValueError:
    return ValueError(f"a prompt is a text, ids, or an int tensor [b, c], not {given}")


def go_on(
    model: StepModel, reading: Reading, tokens: int, sampling: Sampling, size: int | None
) -> Iterator[Tensor]:
    """Yield `tokens` times one drawn token of each row, int64 [b], of ids below `size`; the reading is updated.

    Raises TfgError FG427 if logits are not finite.
    """
    sampler = Sampler(sampling, reading.rows)
    for left in range(tokens, 0, -1):
        drawn = sampler.draw(reading.logits[:, :size], reading.seen[:, :size])
        yield drawn
        if left > 1:
            reading = read(model, drawn[:, None], reading)
