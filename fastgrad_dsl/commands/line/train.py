"""`fastgrad train`: a language model learns a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import (
    LARGEST,
    MANY,
    File,
    Include,
    Model,
    Set,
    Target,
    Tokenizer,
    finite,
    params_of,
    path_option,
)
from fastgrad_dsl.storage.outputs import try_folder
from fastgrad_grammar.diagnostics import TfgError


def train(
    file: File,
    text: Annotated[Path, path_option("The text to learn, any file; its bytes are the tokens.")],
    tokenizer: Tokenizer = None,
    steps: Annotated[int, Option(min=0, max=LARGEST, help="Number of optimiser steps.")] = 1000,
    seq: Annotated[int, Option(min=1, max=MANY, help="Tokens per sequence.")] = 1024,
    batch: Annotated[int, Option(min=1, max=MANY, help="Sequences per step.")] = 1,
    rate: Annotated[float, Option(min=0.0, callback=finite, help="Peak learning rate.")] = 1e-3,
    clip: Annotated[float, Option(min=0.0, callback=finite, help="Largest norm of the gradient.")] = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the weights and of the batches.")] = 0,
    out: Annotated[
        Path | None,
        path_option("Folder of the run; runs/NAME by default.", "--out", "-o"),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue from the checkpoint in the run's folder.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace the run that is in the folder.")] = False,
    every: Annotated[int, Option(min=1, max=MANY, help="Steps between validations and checkpoints.")] = 100,
    exact: Annotated[bool, Option("--exact", help="Train with exact softmax attention instead.")] = False,
    calibrate: Annotated[
        bool, Option("--calibrate", help="Plan from measurements on the text before training.")
    ] = False,
    sample: Annotated[int, Option(min=0, max=LARGEST, help="Tokens of text to generate at the end.")] = 200,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
) -> None:
    """Train a language model on a text file; loss is printed and logged as JSON lines.

    The run's folder holds the compiled model, the spec, the weights and a checkpoint. Ctrl-C or SIGTERM saves a
    checkpoint and stops; the same command with --resume continues from there, with more --steps if you like.
    """
    if resume and force:
        raise TfgError.of("FG416", "--resume continues a run and --force replaces it: give one")
    folder = out or Path("runs") / (file.stem + ("-exact" if exact else ""))
    if not resume:  # where a run that is finished changes nothing
        try_folder(folder)

    import fastgrad_dsl as fg
    from fastgrad_dsl.commands.train import TrainRequest, train_language_model
    from fastgrad_dsl.training.loop import Options

    compiled = fg.compile(file, params=params_of(set_), model=model, target=target, include=include or ())
    options = Options(
        steps=steps, tokens=seq, batch=batch, learning_rate=rate, clip=clip, seed=seed, exact=exact,
        validate_every=every, checkpoint_every=every,
    )  # fmt: skip
    train_language_model(
        compiled, TrainRequest(text, folder, options, resume, sample, calibrate, force, tokenizer)
    )
