"""`fastgrad convert`: a model with softmax attention becomes one in linear time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import (
    LARGEST,
    MANY,
    Batch,
    Clip,
    Every,
    File,
    Include,
    Model,
    Seq,
    Set,
    Target,
    Tokenizer,
    finite,
    params_of,
    path_option,
)
from fastgrad_dsl.storage.outputs import try_file, try_folder
from fastgrad_grammar.diagnostics import TfgError


def convert(
    file: File,
    weights: Annotated[Path, path_option("A .safetensors file with the model's weights.")],
    data: Annotated[Path, path_option("A text; for an encoder, a file with a text in each line.")],
    out: Annotated[Path, path_option("Folder of the converted model.", "--out", "-o")],
    at: Annotated[
        list[str] | None,
        Option(metavar="PATH", help="Convert the attentions that this pattern matches; can be repeated."),
    ] = None,
    near: Annotated[int, Option(min=1, max=MANY, help="Tokens in a block of the near field.")] = 64,
    far_dim: Annotated[
        int, Option(min=1, max=1024, help="Width of the learned maps of q and k beyond the near field.")
    ] = 16,
    tokenizer: Tokenizer = None,
    seq: Seq = 1024,
    batch: Batch = 1,
    transfer_steps: Annotated[
        int, Option(min=0, max=LARGEST, help="Steps in which the attentions learn the results of softmax.")
    ] = 200,
    transfer_rate: Annotated[
        float, Option(min=0.0, callback=finite, help="Peak learning rate of the transfer.")
    ] = 3e-2,
    steps: Annotated[int, Option(min=0, max=LARGEST, help="Steps in which the whole model is tuned.")] = 200,
    rate: Annotated[float, Option(min=0.0, callback=finite, help="Peak learning rate of the tuning.")] = 3e-4,
    tuning_seq: Annotated[
        int | None,
        Option(
            min=1,
            max=MANY,
            help="Tokens per sequence of the tuning, if not --seq; a step has as many tokens.",
            metavar="TOKENS",
        ),
    ] = None,
    adapters: Annotated[
        int | None,
        Option(
            min=1,
            max=MANY,
            help="Tune low-rank changes of the matrices instead of all weights.",
            metavar="RANK",
        ),
    ] = None,
    clip: Clip = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the new weights and of the batches.")] = 0,
    every: Every = 100,
    resume: Annotated[bool, Option("--resume", help="Continue from the checkpoints in the folder.")] = False,
    force: Annotated[bool, Option("--force", help="Replace the conversion that is in the folder.")] = False,
    json_: Annotated[Path | None, path_option("Also write the report as JSON.", "--json")] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
) -> None:
    """Make the attention of a model linear in the length: change the spec, transfer attention, then tune.

    Each attention becomes exact among neighbours and a polynomial of learned maps beyond, and learns what softmax gave;
    then the model is tuned, an encoder on its own earlier results. Ctrl-C or SIGTERM saves a checkpoint and stops; the
    same command with --resume continues.
    """
    if resume and force:
        raise TfgError.of("FG416", "--resume continues a conversion and --force replaces it: give one")
    try_folder(out)
    try_file(json_)

    import fastgrad_dsl as fg
    from fastgrad_dsl.commands.convert import run_convert
    from fastgrad_dsl.conversion.run import Request
    from fastgrad_dsl.conversion.spec import Form
    from fastgrad_dsl.training.loop import Options

    compiled = fg.compile(file, params=params_of(set_), model=model, target=target, include=include or ())
    transfer = Options(
        steps=transfer_steps, tokens=seq, batch=batch, learning_rate=transfer_rate, weight_decay=0.0, clip=clip,
        seed=seed, validate_every=every, checkpoint_every=every,
    )  # fmt: skip
    length = tuning_seq or seq
    tuning = replace(
        transfer, steps=steps, learning_rate=rate, tokens=length, batch=max(1, batch * seq // length)
    )
    request = Request(
        compiled, weights, data, out, transfer, tuning, Form(near, far_dim), tuple(at or ()), adapters, tokenizer,
        resume, force,
    )  # fmt: skip
    run_convert(request, json_)
