"""`fastgrad generate`: a trained model continues a prompt, and its text is shown as it is generated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastgrad_dsl.api.compiled import compile
from fastgrad_dsl.api.loader import WEIGHTS, built, load, load_plan
from fastgrad_dsl.commands.tables import say
from fastgrad_dsl.commands.terminal import console
from fastgrad_dsl.documents.base import Count, Document, Part
from fastgrad_dsl.documents.plan import Plan
from fastgrad_dsl.generation.continuation import Continuation, Ended
from fastgrad_dsl.generation.generate import go_on, read_ids
from fastgrad_dsl.generation.reading import Reading, load_reading, save_reading
from fastgrad_dsl.generation.sampling import SEEDS, Sampling
from fastgrad_dsl.generation.step_form import StepModel, has_steps, step_form
from fastgrad_dsl.models.text_data import BYTES, read_text
from fastgrad_dsl.models.tokenizer import Tokenizer, check_size, load_tokenizer
from fastgrad_dsl.report.words import counted, size
from fastgrad_dsl.storage.weights import load_weights
from fastgrad_dsl.training.folder import TOKENIZER
from fastgrad_grammar import quote
from fastgrad_grammar.diagnostics import TfgError

FORMAT = "fastgrad-generation-1"
STDIN = "-"


@dataclass(frozen=True)
class GenerateRequest:
    """What the command line asks for.

    `where`: a compiled folder, that of a run, or a spec, whose `params`, `model`, `include` and `target` are given;
    `prompt`: a text, `@` and a file, or `-` for the standard input; `stops`: strings that end a text; `samples`: how
    many continuations.
    """

    where: Path
    prompt: str
    tokens: int
    sampling: Sampling
    weights: Path | None = None
    tokenizer: Path | None = None
    stops: Sequence[str] = ()
    samples: int = 1
    save: Path | None = None
    load: Path | None = None
    params: Mapping[str, object] | None = None
    model: str | None = None
    include: Sequence[Path] = ()
    target: str = "auto"


class Settings(Document, frozen=True):
    """What a text was written with: how many tokens at most, where it stops, and the fields of `Sampling`."""

    tokens: Count
    stop: tuple[str, ...]
    temperature: Part
    top_k: int | None
    top_p: Part
    min_p: Part
    repetition_penalty: Part
    seed: Count


class PromptRead(Document, frozen=True):
    """How many tokens the prompt has, how many came before it in a loaded state, and how long it took to read it."""

    tokens: Count
    before: Count
    seconds: Part


class Sample(Document, frozen=True):
    """A text without its prompt, its number of tokens, the seed that writes it alone, and why it ended."""

    text: str
    tokens: Count
    seed: Count
    ended: Ended


class Generation(Document, frozen=True):
    """What was written; `seconds` for all tokens of all samples; `state_bytes` of one of them at the end."""

    format: str
    model: str
    prompt: PromptRead
    samples: tuple[Sample, ...]
    seconds: Part
    state_bytes: Count
    settings: Settings


@dataclass(frozen=True)
class _Opened:
    """A model with its weights, its plan and the tokenizer of its texts."""

    steps: StepModel
    plan: Plan
    tokenizer: Tokenizer


def generate_text(request: GenerateRequest) -> tuple[Generation, bool]:
    """Write on the standard output, and return what was written and whether Ctrl-C ended it.

    Raises TfgError: what compiling or loading finds wrong; FG411 or FG437 for the prompt, FG418 for the weights, FG434,
    FG501 or FG502 for a model without a step form, FG435 for the state, FG436 for the tokenizer, FG427 for logits that
    are not finite, FG416 for an empty stop string.
    """
    if "" in request.stops:
        raise TfgError.of("FG416", "--stop: a string to stop at has at least one character")
    prompt = _prompt(request.prompt)
    if not prompt and request.load is None:
        raise TfgError.of("FG437", "the prompt is empty", "give a --prompt, or a state with --load-state")
    opened = _opened(request)
    after = None if request.load is None else _loaded(request.load, opened)
    ids = opened.tokenizer.encode(prompt, "the prompt")
    before = 0 if after is None else int(after.state.position)
    _check_length(opened.plan, before + ids.numel(), request.tokens)
    started = time.monotonic()
    reading = read_ids(opened.steps, ids.long()[None], after)
    read = PromptRead(tokens=ids.numel(), before=before, seconds=time.monotonic() - started)
    if request.save is not None:
        save_reading(reading, opened.steps, request.save)
    return _written(request, opened, reading.repeat(request.samples), read)


def _written(
    request: GenerateRequest, opened: _Opened, reading: Reading, read: PromptRead
) -> tuple[Generation, bool]:
    one_alone = request.samples == 1
    texts = [Continuation(opened.tokenizer, request.stops) for _ in range(request.samples)]
    started = time.monotonic()
    ended: Ended = "tokens"
    drawn = go_on(opened.steps, reading, request.tokens, request.sampling, opened.tokenizer.size)
    try:
        for tokens in drawn:
            pieces = [text.push(token) for text, token in zip(texts, tokens.tolist(), strict=True)]
            if one_alone:
                _show(pieces[0])
            if all(text.ended for text in texts):
                break
    except KeyboardInterrupt:
        ended = "interrupt"
    except TfgError:
        _show("\n" if one_alone and texts[0].text else "")
        raise
    seconds = time.monotonic() - started
    seeds = [(request.sampling.seed + row) % SEEDS for row in range(request.samples)]
    for number, (text, seed) in enumerate(zip(texts, seeds, strict=True), 1):
        rest = text.finish(ended)
        if not one_alone:
            print(f"sample {number} (seed {seed}):")
        _show((rest if one_alone else text.text) + "\n")
    result = Generation(
        format=FORMAT,
        model=opened.plan.model,
        prompt=read,
        samples=tuple(
            Sample(text=text.text, tokens=text.tokens, seed=seed, ended=text.ended or ended)
            for text, seed in zip(texts, seeds, strict=True)
        ),
        seconds=seconds,
        state_bytes=reading.state.nbytes // request.samples,
        settings=Settings(tokens=request.tokens, stop=tuple(request.stops), **asdict(request.sampling)),
    )
    _tell(result, opened.tokenizer.unit)
    return result, ended == "interrupt"


# ---------------------------------------------------------------- what is read


def _prompt(given: str) -> bytes:
    """The bytes of a prompt; TfgError FG411 where a file cannot be read."""
    if given == STDIN:
        if sys.stdin is None:
            raise TfgError.of("FG411", "cannot read the text of the standard input: it is closed")
        return sys.stdin.buffer.read()
    return read_text(Path(given[1:])) if given.startswith("@") else os.fsencode(given)


def _opened(request: GenerateRequest) -> _Opened:
    where, tokenizer = request.where, request.tokenizer
    if where.is_dir():
        plan = load_plan(where)
        if request.weights is None and not (where / WEIGHTS).exists():
            raise _without_weights(where)
        module = load(where if request.weights is None else built(where))
        if tokenizer is None and (where / TOKENIZER).exists():
            tokenizer = where / TOKENIZER
    else:
        compiled = compile(
            where, params=request.params, model=request.model, target=request.target, include=request.include
        )
        if request.weights is None:
            raise _without_weights(where)
        plan, module = compiled.plan_document, compiled.module()
        if not has_steps(module):
            compiled.stepped()  # says where the text has no step form
    if request.weights is not None:
        load_weights(module, request.weights)
    steps = step_form(module)
    of_text = BYTES if tokenizer is None else load_tokenizer(tokenizer)
    (tokens,) = plan.inputs
    if tokens.ids:
        check_size(of_text, tokens.below, plan.model)
    return _Opened(steps, plan, of_text)


def _without_weights(where: Path) -> TfgError:
    return TfgError.of("FG418", f"{where} has no weights", "give the file of its weights with --weights")


def _loaded(path: Path, opened: _Opened) -> Reading:
    reading = load_reading(opened.steps, path)
    if reading.rows != 1:
        raise TfgError.of("FG435", f"{path} holds the state of {reading.rows} texts, not of one")
    return reading


def _check_length(plan: Plan, read: int, more: int) -> None:
    """TfgError FG437 where the text would be longer than the file declares."""
    (tokens,) = plan.inputs
    limit = next((dim.at_most for dim in plan.dims if dim.name == tokens.shape[1]), None)
    if limit is not None and read + more > limit:
        said = f"the prompt and --tokens are {counted(read + more, 'token')}, and model {plan.model} takes {limit:,}"
        raise TfgError.of("FG437", said, f"the file declares {tokens.shape[1]} <= {limit}")


# ---------------------------------------------------------------- what is shown


def _show(text: str) -> None:
    """A part of a text, at once; a terminal shows it and obeys nothing of it."""
    if text:
        sys.stdout.write(quote.terminal(text, "\n\t") if sys.stdout.isatty() else text)
        sys.stdout.flush()


def _tell(result: Generation, unit: str) -> None:
    out, written = console(error=True), sum(sample.tokens for sample in result.samples)
    after = f" after {counted(result.prompt.before, unit)} of the state" if result.prompt.before else ""
    say(out, f"read {_paced(result.prompt.tokens, unit, result.prompt.seconds)}{after}")
    say(
        out,
        f"wrote {_paced(written, unit, result.seconds)}; the state of a text takes {size(result.state_bytes)}",
    )


def _paced(count: int, unit: str, seconds: float) -> str:
    pace = f" ({count / seconds:,.0f} per second)" if count and seconds > 0 else ""
    return f"{counted(count, unit)} in {seconds:.2f} s{pace}"
