"""A report as it is asked for: of a folder or a spec, measured on a text or on random inputs, or not at all."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad_compiler.codegen.kernel import ENDINGS
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.api.attention_rounding import spec_of
from fastgrad_dsl.api.batches import random_batch, tokens_of
from fastgrad_dsl.documents.plan import input_of, is_approximated
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.report.document import build_report
from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest
from fastgrad_grammar.read import read_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastgrad_dsl.api.measure import ModelErrors

DEFAULT_LENGTH = 2048  # tokens of a batch whose size nobody gave
CALIBRATION = "calibration.json"  # in a build folder
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ReportRequest:
    """What to report on: a build folder or a spec, its params and model, a text, trained weights, sizes of dims.

    `calibration` is a calibration document; without one, that of the folder, if it holds one.
    """

    where: Path
    params: Mapping[str, object]
    model: str | None
    text: Path | None
    weights: Path | None
    dims: Mapping[str, int]
    seed: int
    measure: bool
    calibration: Mapping[str, Any] | None = None
    include: Sequence[Path] = ()


@dataclass(frozen=True)
class Subject:
    """A plan with its spec and generated files and, where it is to be run, its module and objective."""

    plan: Mapping[str, Any]
    spec: str | None
    files: Mapping[str, str]
    calibration: Mapping[str, Any] | None
    module: Callable[[int], nn.Module]
    objective: Callable[[], Callable[..., Tensor] | None]


def make_report(request: ReportRequest, tell: Tell) -> dict[str, Any]:
    """The report of a folder or a spec.

    Raises TfgError: what compiling or loading finds wrong; FG416 for an unknown dim, FG411 or FG412 for the text,
    FG418 for weights that are not this model's.
    """
    subject = _subject(request)
    calibration = subject.calibration if request.calibration is None else request.calibration
    shown: dict[str, Any] = {"spec": subject.spec, "files": subject.files, "calibration": calibration}
    if not request.measure:
        return build_report(subject.plan, **shown)
    sizes = batch_sizes(subject.plan, request.dims)
    kind, inputs, targets = _batch(subject.plan, request, sizes)
    model = subject.module(request.seed)
    if request.weights is not None:
        from fastgrad_dsl.storage.weights import load_weights

        load_weights(model, request.weights)
    batch = {
        "tokens": tokens_of(subject.plan, inputs),
        "kind": kind,
        "dims": sizes,
        "seed": request.seed,
        "weights": f"weights of {request.weights}"
        if request.weights
        else f"initial weights, seed {request.seed}",
        "options": _options(request, sizes),
    }
    errors = measure_plan(subject.plan, model, inputs, targets, subject.objective(), tell)
    return build_report(subject.plan, errors, batch, **shown)


def measure_plan(
    plan: Mapping[str, Any],
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Callable[..., Tensor] | None,
    tell: Tell = lambda what: None,
) -> ModelErrors:
    """Measured errors of a model that was compiled with this plan."""
    from fastgrad_dsl.api.measure import Served, measure_errors

    served = [
        Served(
            entry["path"],
            entry["eps"],
            entry["eps_prime"],
            entry["scale"],
            own=not is_approximated(entry),
            bound=entry["bound"] or 0.0,
            spec=spec_of(entry) if is_approximated(entry) else None,
            backends=BACKENDS[plan["target"]],
        )
        for entry in plan["attentions"]
        if entry["decision"] == "polynomial"
    ]
    return measure_errors(model, inputs, targets, objective if targets else None, served, progress=tell)


def _options(request: ReportRequest, sizes: Mapping[str, int]) -> list[str]:
    """The options of the command line that measure on this batch again."""
    options = [f"--dim {shlex.quote(f'{name}={size}')}" for name, size in sizes.items()]
    for name, path in (("text", request.text), ("weights", request.weights)):
        options += [f"--{name} {shlex.quote(str(path))}"] if path else []
    return [*options, f"--seed {request.seed}"]


def _subject(request: ReportRequest) -> Subject:
    import fastgrad_dsl as fg
    from fastgrad_dsl.api.compiled import SPEC
    from fastgrad_dsl.api.loader import built, load_objective, load_plan

    if request.where.is_dir():
        folder = built(request.where)
        plan = load_plan(folder)
        kernels = {f"{e['kernel']}{ending}" for e in plan["attentions"] for ending in ENDINGS}
        files = {name: text for name in sorted(kernels) if (text := _code(folder / name)) is not None}
        return Subject(
            plan,
            read_source(folder / SPEC).text if (folder / SPEC).is_file() else None,
            files,
            _calibration(folder),
            lambda seed: fg.load(folder, seed=seed),
            lambda: load_objective(folder),
        )
    compiled = fg.compile(request.where, params=request.params, model=request.model, include=request.include)
    return Subject(
        compiled.plan_document,
        compiled.source.text,
        compiled.modules,
        None,
        lambda seed: compiled.module(seed=seed),
        lambda: compiled.loss,
    )


def _calibration(folder: Path) -> dict[str, Any] | None:
    path = folder / CALIBRATION
    return read_document(path, CALIBRATION) if path.is_file() else None


def _code(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def batch_sizes(plan: Mapping[str, Any], given: Mapping[str, int]) -> dict[str, int]:
    """A size for every dim of a batch: what was given, else 1 for the first dim (the batch), else a usual length."""
    shapes = [parse_dim(dim) for tensor in (*plan["inputs"], *plan["targets"]) for dim in tensor["shape"]]
    names = list(dict.fromkeys(name for dim in shapes for name in sorted(dim.names)))
    for name in given:
        if name not in names:
            near = nearest(name, names)
            help_ = (f"did you mean {near}?",) if near else (f"the model's dims are {', '.join(names)}",)
            raise TfgError([Diagnostic("FG416", f"the model has no run-time dim {name}", help=help_)])
        if not isinstance(given[name], int) or given[name] < 1:
            message = f"--dim {name}={given[name]}: a size is a whole number of at least 1"
            raise TfgError([Diagnostic("FG416", message)])
    limits = {dim["name"]: dim for dim in plan["dims"]}
    sizes = {}
    for place, name in enumerate(names):
        limit = limits.get(name, {"at_most": None, "multiple_of": 1})
        multiple = limit["multiple_of"] or 1
        usual = 1 if place == 0 else min(DEFAULT_LENGTH, limit["at_most"] or DEFAULT_LENGTH)
        sizes[name] = given.get(name, max(usual // multiple, 1) * multiple)
        if sizes[name] > (limit["at_most"] or sizes[name]) or sizes[name] % multiple:
            declared = (
                f"at most {limit['at_most']}, a multiple of {multiple}"
                if multiple > 1
                else f"at most {limit['at_most']}"
            )
            raise TfgError(
                [Diagnostic("FG416", f"--dim {name}={sizes[name]}: the spec declares {name} {declared}")]
            )
    return sizes


def text_sizes(plan: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, int]:
    """(rows, tokens) of a batch of text; TfgError FG415 where the model does not take bytes."""
    inputs = plan["inputs"]
    is_text = len(inputs) == 1 and inputs[0]["dtype"] == "int" and len(inputs[0]["shape"]) == 2
    if not is_text or inputs[0]["below"] < 256:
        message = f"model {plan['model']} does not take bytes of text"
        help_ = ("random inputs need no text, and a .safetensors file can hold batches",)
        raise TfgError([Diagnostic("FG415", message, help=help_)])
    rows, tokens = (parse_dim(dim).evaluate(sizes) for dim in inputs[0]["shape"])
    return rows, tokens


def _batch(
    plan: Mapping[str, Any], request: ReportRequest, sizes: Mapping[str, int]
) -> tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs, targets = ([input_of(tensor) for tensor in plan[key]] for key in ("inputs", "targets"))
    if request.text is None:
        batch = random_batch([*inputs, *targets], sizes, request.seed)
        return "random inputs", batch[: len(inputs)], batch[len(inputs) :]
    from fastgrad_dsl.training.text_data import load_text

    rows, tokens = text_sizes(plan, sizes)
    text = load_text(request.text, tokens, "--dim")
    held_out, following = next(text.validation_batches(tokens, rows, 1))
    return f"held-out text of {request.text}", (held_out,), (following,) if targets else ()
