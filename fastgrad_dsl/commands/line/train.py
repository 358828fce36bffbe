"""`fastgrad train`: a language model learns a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Context, Option

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
from fastgrad_dsl.storage.outputs import try_folder
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source


def _seconds(value: float) -> float:
    """A time to wait."""
    if not 1.0 <= value <= MANY / 1000:
        raise BadParameter(f"{value} is not a number of seconds from 1 to {MANY // 1000}")
    return value


def train(
    called: Context,
    file: File,
    text: Annotated[
        Path,
        path_option("The text to learn, any file; its bytes are the tokens unless --tokenizer is given."),
    ],
    tokenizer: Tokenizer = None,
    steps: Annotated[int, Option(min=0, max=LARGEST, help="Number of optimiser steps.")] = 1000,
    seq: Seq = 1024,
    batch: Batch = 1,
    rate: Annotated[float, Option(min=0.0, callback=finite, help="Peak learning rate.")] = 1e-3,
    clip: Clip = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the weights and of the batches.")] = 0,
    out: Annotated[
        Path | None,
        path_option("Folder of the run; runs/NAME by default.", "--out", "-o"),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue from the checkpoint in the run's folder.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace the run that is in the folder.")] = False,
    every: Every = 100,
    exact: Annotated[bool, Option("--exact", help="Train with exact softmax attention instead.")] = False,
    calibrate: Annotated[
        bool, Option("--calibrate", help="Plan from measurements on the text before training.")
    ] = False,
    sample: Annotated[int, Option(min=0, max=LARGEST, help="Tokens of text to generate at the end.")] = 200,
    accumulate: Annotated[
        int, Option(min=1, max=MANY, help="Run a batch in K equal parts, one after another.", metavar="K")
    ] = 1,
    nproc: Annotated[
        int | None,
        Option(
            min=1, max=MANY, help="Train on N processes, with the weights divided among them.", metavar="N"
        ),
    ] = None,
    data: Annotated[
        int | None,
        Option(min=1, max=MANY, help="Divide the sequences of a batch among D processes.", metavar="D"),
    ] = None,
    context: Annotated[
        int | None, Option(min=1, max=MANY, help="Divide every sequence among C processes.", metavar="C")
    ] = None,
    tensor: Annotated[
        int | None,
        Option(min=1, max=MANY, help="Divide heads and hidden widths among T processes.", metavar="T"),
    ] = None,
    restarts: Annotated[
        int, Option(min=0, max=MANY, help="How often to start all processes again after one is lost.")
    ] = 3,
    timeout: Annotated[
        float, Option(callback=_seconds, help="Seconds within which every process must answer the others.")
    ] = 600.0,
    recompute: Annotated[
        bool, Option("--recompute", help="With several processes, run each block again in the backward pass.")
    ] = False,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
) -> int:
    """Train a language model on a text file; loss is printed and logged as JSON lines.

    The run's folder holds the compiled model, the spec, the weights and a checkpoint. Ctrl-C or SIGTERM saves a
    checkpoint and stops; the same command with --resume continues from there, with more --steps if you like, and on
    another number of processes.
    """
    if resume and force:
        raise TfgError.of("FG416", "--resume continues a run and --force replaces it: give one")
    folder = out or Path("runs") / (file.stem + ("-exact" if exact else ""))
    if not resume:  # where a run that is finished changes nothing
        try_folder(folder)

    import fastgrad_dsl as fg
    from fastgrad_compiler.frontend import elaborate
    from fastgrad_dsl.commands.train import TrainRequest, run_train, sizes_of_text
    from fastgrad_dsl.training.loop import Options
    from fastgrad_dsl.training.parallel import Parallel

    params = params_of(set_)
    program = elaborate(read_source(file, include=include or ()), model=model, params=params)
    compiled = fg.compile(
        file,
        params=params,
        model=model,
        target=target,
        include=include or (),
        dims=sizes_of_text(program, batch, seq),
    )
    options = Options(
        steps=steps, tokens=seq, batch=batch, learning_rate=rate, clip=clip, seed=seed, exact=exact,
        validate_every=every, checkpoint_every=every, accumulate=accumulate,
    )  # fmt: skip
    parallel = Parallel(nproc, data, context, tensor, restarts, timeout, recompute)
    request = TrainRequest(text, folder, options, resume, sample, calibrate, force, tokenizer, parallel)
    return run_train(compiled, request, called.obj)
