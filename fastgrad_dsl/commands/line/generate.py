"""`fastgrad generate`: a trained model continues a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastgrad_dsl.commands.failures import INTERRUPTED
from fastgrad_dsl.commands.line.options import (
    LARGEST,
    MANY,
    Include,
    Model,
    Set,
    Target,
    Tokenizer,
    Weights,
    check_spec_options,
    finite,
    params_of,
    path_option,
    positive,
)
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import try_files


def generate(
    where: Annotated[
        Path,
        Argument(
            metavar="DIR_OR_FILE",
            help="A folder that `compile` or `train` wrote, or a .tfg file.",
            readable=False,
        ),
    ],
    prompt: Annotated[
        str, Option(metavar="TEXT", help="The text to continue; @FILE reads a file, - the standard input.")
    ] = "",
    tokens: Annotated[int, Option(min=0, max=MANY, help="Largest number of tokens to write.")] = 200,
    weights: Weights = None,
    tokenizer: Tokenizer = None,
    temperature: Annotated[
        float,
        Option(min=0.0, callback=finite, help="Divides the logits; 0 always takes the most likely token."),
    ] = 1.0,
    top_k: Annotated[int | None, Option(min=1, max=MANY, help="Draw from the K most likely tokens.")] = None,
    top_p: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Draw from the fewest most likely tokens with this total probability.",
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Draw only tokens at least this many times as likely as the most likely one.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, Option(callback=positive, help="Above 1, tokens that the text already has are less likely.")
    ] = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the first sample.")] = 0,
    stop: Annotated[
        list[str] | None, Option(metavar="STRING", help="End the text before this string; can be repeated.")
    ] = None,
    samples: Annotated[
        int, Option(min=1, max=1024, help="Number of continuations, generated as one batch.")
    ] = 1,
    save_state: Annotated[Path | None, path_option("Save the state after the prompt to this file.")] = None,
    load_state: Annotated[
        Path | None, path_option("Continue from the state in this file; a prompt comes after it.")
    ] = None,
    json_: Annotated[
        Path | None, path_option("Also write texts, counts and settings as JSON.", "--json")
    ] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
) -> int:
    """Continue a prompt with a trained model, token by token from its state; the text is printed as it is generated.

    Ctrl-C ends the text where it is.
    """
    check_spec_options(where, set_, model, include, target)
    try_files(**{"save-state": save_state, "json": json_})

    from fastgrad_dsl.commands.generate import GenerateRequest, generate_text
    from fastgrad_dsl.documents.write import to_json
    from fastgrad_dsl.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = GenerateRequest(
        where, prompt, tokens, sampling, weights, tokenizer, stop or (), samples, save_state, load_state,
        params_of(set_), model, include or (), target,
    )  # fmt: skip
    result, interrupted = generate_text(request)
    if json_ is not None:
        write_atomically(json_, to_json(result))
    return INTERRUPTED if interrupted else 0
