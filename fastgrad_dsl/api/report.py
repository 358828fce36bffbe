"""A report as it is asked for: of a folder or a spec, measured on a text or on random inputs, or not at all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from fastgrad_compiler.codegen.kernel import ENDINGS
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_dsl.api.compiled import SPEC, compile
from fastgrad_dsl.api.loader import built, load, load_objective, load_plan
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.plan import Plan, TensorEntry
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.documents.report import Batch, Report
from fastgrad_dsl.models.batches import Input, random_batch, tokens_of
from fastgrad_dsl.models.sizes import batch_sizes, text_sizes
from fastgrad_dsl.report.document import build_report
from fastgrad_grammar.read import read_source

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATION = "calibration.json"  # in a build folder
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ReportRequest:
    """What to report on: a build folder or a spec, its params and model, a text, trained weights, sizes of dims."""

    where: Path
    params: Mapping[str, object]
    model: str | None
    text: Path | None
    weights: Path | None
    dims: Mapping[str, int]
    seed: int
    measure: bool
    include: Sequence[Path] = ()


@dataclass(frozen=True)
class Subject:
    """A plan with its spec and generated files and, where it is to be run, its module and objective."""

    plan: Plan
    spec: str | None
    files: Mapping[str, str]
    calibration: Calibration | None
    module: Callable[[int], nn.Module]
    objective: Callable[[], Callable[..., Tensor] | None]


def make_report(request: ReportRequest, tell: Tell) -> Report:
    """The report of a folder or a spec.

    Raises TfgError: what compiling or loading finds wrong; FG416 for an unknown dim, FG411 or FG412 for the text,
    FG418 for weights that are not this model's.
    """
    subject = _subject(request)
    shown = partial(
        build_report, subject.plan, spec=subject.spec, files=subject.files, calibration=subject.calibration
    )
    if not request.measure:
        return shown()
    from fastgrad_dsl.models.measure_plan import measure_plan  # loads PyTorch

    sizes = batch_sizes(subject.plan, request.dims)
    kind, inputs, targets = _batch(subject.plan, request, sizes)
    model, weights = subject.module(request.seed), f"initial weights, seed {request.seed}"
    if request.weights is not None:
        from fastgrad_dsl.storage.weights import load_weights

        load_weights(model, request.weights)
        weights = f"weights of {request.weights}"
    batch = Batch(
        batches=1,
        tokens=tokens_of(subject.plan, inputs),
        kind=kind,
        dims=sizes,
        seed=request.seed,
        weights=weights,
    )
    errors = measure_plan(subject.plan, model, inputs, targets, subject.objective(), tell)
    return shown(errors, batch, options=_options(request, sizes))


def _options(request: ReportRequest, sizes: Mapping[str, int]) -> list[str]:
    """The options of the command line that measure on this batch again."""
    options = [f"--dim {shlex.quote(f'{name}={size}')}" for name, size in sizes.items()]
    for name, path in (("text", request.text), ("weights", request.weights)):
        options += [f"--{name} {shlex.quote(str(path))}"] if path else []
    return [*options, f"--seed {request.seed}"]


def _subject(request: ReportRequest) -> Subject:
    if request.where.is_dir():
        folder = built(request.where)
        plan = load_plan(folder)
        kernels = {f"{e.kernel}{ending}" for e in plan.attentions for ending in ENDINGS}
        files = {name: text for name in sorted(kernels) if (text := _code(folder / name)) is not None}
        return Subject(
            plan,
            read_source(folder / SPEC).text if (folder / SPEC).is_file() else None,
            files,
            _calibration(folder),
            lambda seed: load(folder, seed=seed),
            lambda: load_objective(folder),
        )
    compiled = compile(request.where, params=request.params, model=request.model, include=request.include)
    return Subject(
        compiled.plan_document,
        compiled.source.text,
        compiled.modules,
        None,
        lambda seed: compiled.module(seed=seed),
        lambda: compiled.loss,
    )


def _calibration(folder: Path) -> Calibration | None:
    path = folder / CALIBRATION
    return read_document(path, Calibration) if os.path.lexists(path) else None


def _code(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _batch(
    plan: Plan, request: ReportRequest, sizes: Mapping[str, int]
) -> tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs, targets = (list(map(input_of, tensors)) for tensors in (plan.inputs, plan.targets))
    if request.text is None:
        batch = random_batch([*inputs, *targets], sizes, request.seed)
        return "random inputs", batch[: len(inputs)], batch[len(inputs) :]
    from fastgrad_dsl.models.text_data import load_text

    rows, tokens = text_sizes(plan, sizes)
    text = load_text(request.text, tokens, "--dim")
    held_out, following = next(text.validation_batches(tokens, rows, 1))
    return f"held-out text of {request.text}", (held_out,), (following,) if targets else ()


def input_of(tensor: TensorEntry) -> Input:
    """The input that an entry of a plan's `inputs` or `targets` describes."""
    return Input(**{**asdict(tensor), "shape": tuple(map(parse_dim, tensor.shape))})
