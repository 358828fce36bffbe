"""The `fastgrad` command. Exit status 0, 2 for an error in the user's input, 1 for a bug.

PyTorch is imported only by the commands that run a model.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Argument, Option

from fastgrad_dsl import __version__
from fastgrad_dsl.commands.failures import INTERRUPTED, diagnostics, run_command
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import rewrite, try_file, try_files, try_folder
from fastgrad_grammar.diagnostics import Diagnostic, TfgError, suggestions
from fastgrad_grammar.quote import json_text, terminal
from fastgrad_grammar.read import read_source
from fastgrad_grammar.render import render

if TYPE_CHECKING:
    from fastgrad_compiler.ir.graph import Program
    from fastgrad_compiler.pipeline import Stage

app = typer.Typer(
    name="fastgrad",
    help="Compile .tfg models to PyTorch modules with almost-linear attention, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What a BadParameter is, and what else is wrong with a command line: a class that typer does not export.
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

MANY = 2**31 - 1  # of anything that is made one by one, or is a size
LARGEST_FLOAT = 3.4028234e38
LARGEST = 2**63 - 1  # what PyTorch takes as a seed


def _finite(value: float) -> float:
    """A number of an option that float32 can hold: `min` and `max` let nan pass."""
    if not abs(value) <= LARGEST_FLOAT:
        raise typer.BadParameter(f"{value} is not a finite number of 32 bits")
    return value


def _positive(value: float) -> float:
    """A number of an option that divides."""
    if not _finite(value) > 0:
        raise typer.BadParameter(f"{value} is not above 0")
    return value


def _version(asked: bool) -> None:
    if asked:
        print(f"fastgrad {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def _path(help_: str, *names: str, metavar: str | None = None) -> Any:
    """An option for a path: one that cannot be read is told by what reads it, as all errors are, not by typer."""
    return Option(*names, help=help_, metavar=metavar, readable=False)


File = Annotated[Path, Argument(help="A .tfg file.", show_default=False, readable=False)]
Model = Annotated[str | None, Option("--model", "-m", help="The model to use, if the file has several.")]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="NAME=VALUE", help="Override a param; can be repeated."),
]
Include = Annotated[
    list[Path] | None,
    _path("A folder that `use` may read from; can be repeated.", "--include", "-I", metavar="DIR"),
]
Dim = Annotated[
    list[str] | None,
    Option("--dim", metavar="NAME=SIZE", help="Size of a run-time dim of the batches; can be repeated."),
]
Weights = Annotated[Path | None, _path("A .safetensors file with the model's weights.")]
Seed = Annotated[int, Option(min=0, max=LARGEST, help="Seed of initial weights and random batches.")]
Wide = Annotated[bool, Option("--wide", help="Show every column of the tables.")]
Tokenizer = Annotated[
    Path | None, _path("A tokenizer.json, whose tokens take the place of bytes.", metavar="FILE")
]
Target = Annotated[
    str, Option(help="torch, cpp (C++ on a CPU), triton (on a GPU) or auto (chooses by device).")
]


@app.command()
def check(file: File, model: Model = None, set_: Set = None, include: Include = None) -> None:
    """Check a file: report every error, or show how each attention will be computed."""
    from fastgrad_dsl.commands.terminal import print_plan

    stages = _stages(file, model, set_, include, until="plan")
    print_plan(stages[-1].program, str(file))


@app.command(name="compile")
def compile_(
    file: File,
    out: Annotated[Path, _path("The folder to write.", "--out", "-o")],
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
    calibrate: Annotated[
        str | None,
        Option(
            metavar="DATA",
            help="Plan from measurements on DATA: a text, a .safetensors file of batches, or the word random.",
        ),
    ] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    validate: Annotated[
        bool,
        Option(
            "--validate/--no-validate", help="Compare the program before and after each pass on small inputs."
        ),
    ] = True,
    force: Annotated[
        bool,
        Option("--force", help="Write even to a folder that holds something else or was changed by hand."),
    ] = False,
) -> None:
    """Compile a file to a folder with a readable model.py that needs only PyTorch.

    With --target cpp the C++ kernels are built now; with auto, when the model first runs on a CPU. Triton kernels are
    compiled when it first runs on a GPU. A budget with `trust = calibrated` is calibrated on random inputs unless
    --calibrate names other data.
    """
    try_folder(out)

    import fastgrad_dsl as fg
    from fastgrad_dsl.api.native_build import build_kernels
    from fastgrad_dsl.calibration.data import RANDOM, calibrated
    from fastgrad_dsl.commands.terminal import print_calibration, print_plan, progress
    from fastgrad_dsl.storage.build_manifest import check_folder

    check_folder(out, force=force)  # before anything that takes time
    compiled = fg.compile(
        file, params=_params(set_), model=model, target=target, validate=validate, include=include or ()
    )
    budget = compiled.program.budget
    if calibrate is None and budget is not None and budget.trust == "calibrated":
        calibrate = RANDOM
    if calibrate is not None:
        with progress("calibrating:") as tell:
            compiled = calibrated(compiled, calibrate, tell, dims=_sizes(dim), weights=weights, seed=seed)
    compiled.write(out, force=force)
    print_plan(compiled.program, str(file))
    if compiled.calibration is not None:
        print_calibration(compiled.calibration)
    print(f"written to {terminal(str(out))}/ (model.py, plan.json, report.html, report.json, stages/)")
    if target == "cpp":
        with progress("building") as tell:
            warning = build_kernels(compiled.modules, tell)
        if warning is not None:
            sys.stderr.write(render([warning], colour=sys.stderr.isatty()))


@app.command()
def advise(
    file: File,
    calibrate: Annotated[
        str | None,
        Option(metavar="DATA", help="Also measure candidates on DATA, as `compile --calibrate` does."),
    ] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    json_: Annotated[Path | None, _path("Also write the advice as JSON.", "--json")] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
    wide: Wide = False,
) -> None:
    """Show what would make the budget feasible or cheaper for each attention, and its price in time and error."""
    try_file(json_)

    from fastgrad_dsl.commands.advise import AdviceRequest, make_advice, print_advice
    from fastgrad_dsl.commands.terminal import progress
    from fastgrad_dsl.documents.write import to_json

    request = AdviceRequest(
        file, _params(set_), model, target, calibrate, weights, _sizes(dim), seed, include or ()
    )
    with progress("measuring") as tell:
        advice = make_advice(request, tell)
    print_advice(advice, wide=wide)
    if json_ is not None:
        write_atomically(json_, to_json(advice))


@app.command()
def stages(
    file: File,
    after: Annotated[str | None, Option(help="Show only the program after this pass.")] = None,
    along: Annotated[
        str | None, Option(metavar="DIM", help="The dim of the step form; an error says why there is none.")
    ] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Print the program as each pass leaves it."""
    from fastgrad_compiler.ir.text import print_program
    from fastgrad_compiler.passes.step import with_step
    from fastgrad_compiler.pipeline import PASSES

    names = ["elaborate", *(p.name for p in PASSES)]
    if after is not None and after not in names:
        raise TfgError.of("FG417", f"unknown pass {after}", *suggestions(after, names))
    found = _stages(file, model, set_, include, until=after)
    if along is not None and after in (None, "step"):
        found = (*found[:-1], replace(found[-1], program=with_step(found[-2].program, along)))
    for stage in found:
        if after in (None, stage.name):
            print(f"# after {stage.name} ({1000 * stage.seconds:.1f} ms)\n\n{print_program(stage.program)}")


@app.command()
def report(
    where: Annotated[
        Path,
        Argument(
            metavar="DIR_OR_FILE", help="A folder that `compile` wrote, or a .tfg file.", readable=False
        ),
    ],
    json_: Annotated[Path | None, _path("Also write the report as JSON.", "--json")] = None,
    html: Annotated[
        Path | None,
        _path("Also write the report as one HTML page that opens offline.", "--html"),
    ] = None,
    text: Annotated[Path | None, _path("Measure on this text instead of random inputs.")] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    measure: Annotated[bool, Option(help="Run the model, or show only what is known without data.")] = True,
    wide: Wide = False,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Show the error of each attention and of the whole model: bounds, estimates and measurements."""
    try_files(json=json_, html=html)

    from fastgrad_dsl.api.report import ReportRequest, make_report
    from fastgrad_dsl.commands.terminal import print_report, progress
    from fastgrad_dsl.documents.write import to_json
    from fastgrad_dsl.report.page import render_html

    request = ReportRequest(
        where, _params(set_), model, text, weights, _sizes(dim), seed, measure, include=include or ()
    )
    with progress("measuring") as tell:
        result = make_report(request, tell)
    print_report(result, wide=wide)
    if json_ is not None:
        write_atomically(json_, to_json(result))
    if html is not None:
        write_atomically(html, render_html(result))


@app.command()
def heads(
    file: File,
    data: Annotated[
        str,
        Option(
            metavar="DATA", help="A text, a .safetensors file of batches, or `random`, as of `--calibrate`."
        ),
    ],
    weights: Weights = None,
    limit: Annotated[
        float, Option(callback=_positive, help="Largest relative error of a head's output.")
    ] = 0.05,
    picture: Annotated[Path | None, _path("Also draw the heads, layers by heads, as SVG.")] = None,
    dim: Dim = None,
    seed: Seed = 0,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Show what each head of a model with these weights could be: a window, a polynomial, or exact attention."""
    try_file(picture)

    from fastgrad_dsl.calibration.head_picture import head_picture
    from fastgrad_dsl.commands.heads import HeadsRequest, make_heads, print_heads
    from fastgrad_dsl.commands.terminal import progress

    request = HeadsRequest(file, _params(set_), model, data, weights, _sizes(dim), seed, limit, include or ())
    with progress("measuring") as tell:
        found = make_heads(request, tell)
    print_heads(found)
    if picture is not None:
        write_atomically(picture, head_picture(found))


@app.command()
def train(
    file: File,
    text: Annotated[Path, _path("The text to learn, any file; its bytes are the tokens.")],
    tokenizer: Tokenizer = None,
    steps: Annotated[int, Option(min=0, max=LARGEST, help="Number of optimiser steps.")] = 1000,
    seq: Annotated[int, Option(min=1, max=MANY, help="Tokens per sequence.")] = 1024,
    batch: Annotated[int, Option(min=1, max=MANY, help="Sequences per step.")] = 1,
    rate: Annotated[float, Option(min=0.0, callback=_finite, help="Peak learning rate.")] = 1e-3,
    clip: Annotated[float, Option(min=0.0, callback=_finite, help="Largest norm of the gradient.")] = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the weights and of the batches.")] = 0,
    out: Annotated[
        Path | None,
        _path("Folder of the run; runs/NAME by default.", "--out", "-o"),
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

    compiled = fg.compile(file, params=_params(set_), model=model, target=target, include=include or ())
    options = Options(
        steps=steps, tokens=seq, batch=batch, learning_rate=rate, clip=clip, seed=seed, exact=exact,
        validate_every=every, checkpoint_every=every,
    )  # fmt: skip
    train_language_model(
        compiled, TrainRequest(text, folder, options, resume, sample, calibrate, force, tokenizer)
    )


@app.command()
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
        str, Option(metavar="TEXT", help="What to go on with; @FILE reads a file, - the standard input.")
    ] = "",
    tokens: Annotated[int, Option(min=0, max=MANY, help="Most tokens to write.")] = 200,
    weights: Weights = None,
    tokenizer: Tokenizer = None,
    temperature: Annotated[
        float, Option(min=0.0, callback=_finite, help="Divides the logits; 0 takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[int | None, Option(min=1, max=MANY, help="Draw from the K most likely tokens.")] = None,
    top_p: Annotated[
        float,
        Option(min=0.0, max=1.0, callback=_finite, help="Draw from the most likely tokens of this share."),
    ] = 1.0,
    min_p: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            callback=_finite,
            help="Draw only tokens that have this share of the most likely one's probability.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, Option(callback=_positive, help="Above 1, tokens that the text has already are less likely.")
    ] = 1.0,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the first sample.")] = 0,
    stop: Annotated[
        list[str] | None, Option(metavar="STRING", help="End the text before this; can be repeated.")
    ] = None,
    samples: Annotated[int, Option(min=1, max=1024, help="Continuations, written together.")] = 1,
    save_state: Annotated[Path | None, _path("Save the state after the prompt to this file.")] = None,
    load_state: Annotated[
        Path | None, _path("Go on after the state of this file, then the prompt if there is one.")
    ] = None,
    json_: Annotated[Path | None, _path("Also write texts, counts and settings as JSON.", "--json")] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
) -> int:
    """Go on with a prompt by a trained model, token by token from its state; the text is printed while it comes.

    Ctrl-C ends the text where it is.
    """
    try_files(**{"save-state": save_state, "json": json_})

    from fastgrad_dsl.commands.generate import GenerateRequest, generate_text
    from fastgrad_dsl.documents.write import to_json
    from fastgrad_dsl.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = GenerateRequest(
        where, prompt, tokens, sampling, weights, tokenizer, stop or (), samples, save_state, load_state,
        _params(set_), model, include or (), target,
    )  # fmt: skip
    result, interrupted = generate_text(request)
    if json_ is not None:
        write_atomically(json_, to_json(result))
    return INTERRUPTED if interrupted else 0


@app.command()
def bench(
    n: Annotated[
        list[int] | None,
        Option("--n", min=1, max=MANY, help="A sequence length in tokens; can be repeated."),
    ] = None,
    d: Annotated[int, Option("--d", min=1, max=MANY, help="Width of queries and keys.")] = 16,
    degree: Annotated[int, Option(min=1, max=1000, help="Degree of the polynomial.")] = 2,
    near: Annotated[
        int | None, Option(min=1, max=MANY, help="Tokens per block of the exact near field.")
    ] = None,
    heads: Annotated[int, Option(min=1, max=MANY, help="Number of heads.")] = 8,
    dv: Annotated[int, Option("--dv", min=1, max=MANY, help="Width of values.")] = 64,
    threads: Annotated[
        int | None,
        Option(min=1, max=os.cpu_count(), help="Threads; by default as many as PyTorch uses."),
    ] = None,
    repeats: Annotated[int, Option(min=1, max=MANY, help="Number of passes; the median is shown.")] = 5,
    json_: Annotated[Path | None, _path("Also write the numbers as JSON.", "--json")] = None,
    svg: Annotated[Path | None, _path("Also write a plot of time against length.")] = None,
    quick: Annotated[
        bool, Option("--quick", help="Short lengths and no memory measurements: takes seconds.")
    ] = False,
    target: Target = "auto",
) -> None:
    """Time polynomial attention against PyTorch's on this machine, forward and backward."""
    try_files(json=json_, svg=svg)

    from fastgrad_dsl.bench.contenders import Contender
    from fastgrad_dsl.commands.bench import BenchRequest, plot, print_bench, run_bench
    from fastgrad_dsl.commands.terminal import progress

    polynomial = Contender(heads, d, dv, degree, near, target)
    request = BenchRequest(polynomial, degree, tuple(n or ()), threads, repeats, quick)
    with progress("measuring") as tell:
        result = run_bench(request, tell)
    print_bench(result)
    if json_ is not None:
        write_atomically(json_, json_text(result, 2) + "\n")
    if svg is not None:
        write_atomically(svg, plot(result))


@app.command()
def tune(
    file: File,
    seq: Annotated[int, Option(min=1, max=MANY, help="Tokens per sequence.")] = 8192,
    batch: Annotated[int, Option(min=1, max=MANY, help="Sequences per batch.")] = 1,
    dtype: Annotated[str, Option(help="Type of the inputs: float32, float16 or bfloat16.")] = "bfloat16",
    dry_run: Annotated[
        bool, Option("--dry-run", help="List the candidates and time nothing; needs no GPU.")
    ] = False,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Find the fastest configurations of a model's Triton kernels on this GPU, and keep them in the user's cache."""
    from fastgrad_dsl.commands.terminal import progress
    from fastgrad_dsl.commands.tune import TuneRequest, print_candidates, print_choices, run_tune

    request = TuneRequest(file, _params(set_), model, batch, seq, dtype, include or ())
    if dry_run:
        print_candidates(request)
        return
    with progress("timing") as tell:
        result = run_tune(request, tell)
    print_choices(result)


@app.command()
def fmt(
    files: Annotated[list[Path], Argument(help=".tfg files.", show_default=False, readable=False)],
    check_: Annotated[
        bool, Option("--check", help="Change nothing; fail if a file is not formatted.")
    ] = False,
) -> None:
    """Format .tfg files in place, keeping comments."""
    from fastgrad_grammar.format import format_source

    errors: list[Diagnostic] = []
    unformatted = []
    for file in files:
        try:
            source = read_source(file)
            formatted = format_source(source)
            if formatted.encode() == file.read_bytes():
                continue
            if not check_:
                rewrite(file, formatted)
            unformatted.append(file)
        except (TfgError, OSError) as error:  # the other files are formatted all the same
            errors.extend(diagnostics(error))
    for file in unformatted:
        print(f"{'would format' if check_ else 'formatted'} {terminal(str(file))}")
    if errors:
        raise TfgError(errors)
    if check_ and unformatted:
        raise typer.Exit(2)


@app.command()
def lsp() -> None:
    """Serve an editor that speaks the Language Server Protocol, on the standard input and output.

    Needs the extra `lsp`: pip install 'fastgrad-dsl[lsp]'.
    """
    try:
        from fastgrad_dsl.lsp.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("pygls", "lsprotocol"):
            raise
        help_ = "pip install 'fastgrad-dsl[lsp]'"
        raise TfgError.of("FG438", f"`fastgrad lsp` needs the library {error.name}", help_) from None
    serve()


@app.command(name="import")
def import_(
    folder: Annotated[
        Path,
        Argument(help="A folder with config.json and model.safetensors.", show_default=False, readable=False),
    ],
    out: Annotated[Path, _path("The spec to write, a .tfg file.", "--out", "-o")],
    force: Annotated[bool, Option("--force", help="Replace files that have other content.")] = False,
) -> None:
    """Read a checkpoint of Hugging Face's Transformers as a spec, and its weights in a .safetensors file beside it.

    Nothing is fetched, no pickle is read and no code of the folder runs.
    """
    from fastgrad_dsl.commands.checkpoint import run_import

    run_import(folder, out, force=force)


@app.command()
def export(
    where: Annotated[
        Path,
        Argument(
            metavar="DIR_OR_FILE", help="An imported .tfg file, or a folder compiled from it.", readable=False
        ),
    ],
    weights: Annotated[Path, _path("A .safetensors file with the model's weights.", "--weights")],
    out: Annotated[Path, _path("The folder to write.", "--out", "-o")],
    force: Annotated[bool, Option("--force", help="Replace files that have other content.")] = False,
) -> None:
    """Write weights back as the checkpoint that the model was imported from, in the same layout."""
    from fastgrad_dsl.commands.checkpoint import run_export

    run_export(where, weights, out, force=force)


def main() -> None:
    """Run the command line (`failures.py` says what its exit status tells)."""
    sys.exit(run_command(_parse_and_run))


def _parse_and_run() -> int | None:
    """Run a command; a wrong command line is told as typer tells it."""
    if len(sys.argv) == 3 and sys.argv[1] == "check" and not sys.argv[2].startswith("-"):
        # typer would first load pydantic, which takes a third of the time of a check
        check(Path(sys.argv[2]))
        return 0
    try:
        status: int | None = app(prog_name="fastgrad", standalone_mode=False)
    except USAGE_ERROR as error:
        error.show()
        return error.exit_code
    return status


def _stages(
    file: Path, model: str | None, set_: list[str] | None, include: list[Path] | None, until: str | None
) -> tuple[Stage, ...]:
    from fastgrad_compiler.frontend import elaborate
    from fastgrad_compiler.pipeline import run

    program: Program = elaborate(read_source(file, include=include or ()), model=model, params=_params(set_))
    return run(program, until=until, validate=False)  # nothing that runs is made of it


def _params(assignments: list[str] | None) -> dict[str, object]:
    return dict(_split("--set", text) for text in assignments or [])


def _sizes(assignments: list[str] | None) -> dict[str, int]:
    sizes = {}
    for name, value in (_split("--dim", text) for text in assignments or []):
        if not value.isdecimal() or len(value) > len(str(MANY)) or not 1 <= int(value) <= MANY:
            raise TfgError.of("FG416", f"--dim {name}={value}: a size is a whole number from 1 to {MANY}")
        sizes[name] = int(value)
    return sizes


def _split(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        help_ = (f"write {option} {name or 'name'}=value",)
        raise TfgError.of("FG416", f"{option} {text}: expected NAME=VALUE", *help_)
    return name.strip(), value.strip()
