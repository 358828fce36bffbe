"""A conversion from end to end: the changed spec, attention transfer, tuning, and what each of them did.

OUT/model, OUT/spec, OUT/weights.safetensors    the converted model, as a training run has it
OUT/transfer, OUT/tuning                        the phases, each a run of its own, which can be resumed
OUT/conversion.json                             the report
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor, nn

from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import WEIGHTS
from fastgrad_dsl.conversion.adapters import adapted, add_adapters, merge_adapters
from fastgrad_dsl.conversion.document import FORMAT, Conversion, LeftAttention, Measured
from fastgrad_dsl.conversion.inputs import Inputs, encoder_inputs, load_texts
from fastgrad_dsl.conversion.measure import HeldOut, Task
from fastgrad_dsl.conversion.objective import AttentionTransfer, Distillation, sites_of
from fastgrad_dsl.conversion.spec import ConvertedSpec, Form, convert_spec
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.models.batches import model_inputs
from fastgrad_dsl.models.text_data import BYTES, load_text
from fastgrad_dsl.models.tokenizer import Tokenizer, load_tokenizer
from fastgrad_dsl.storage.files import write_atomically, writing
from fastgrad_dsl.storage.weights import load_weights, read_tensors
from fastgrad_dsl.training.checkpoint import broken, save_weights
from fastgrad_dsl.training.folder import claimed, model_identity, publish, spec_files
from fastgrad_dsl.training.language import language_model_loss, not_a_language_model, token_limit
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Context, Loss, Options, is_finished, train
from fastgrad_dsl.training.sharded import has_checkpoint, latest
from fastgrad_dsl.training.stopping import Stop
from fastgrad_grammar.diagnostics import TfgError

TRANSFER, TUNING, REPORT = "transfer", "tuning", "conversion.json"


@dataclass(frozen=True)
class Request:
    """What to convert, and how.

    compiled, weights: the original. data: a text for a language model; for an encoder a file with a text in each line.
    patterns: of the paths of the attentions to convert, all of them without any. transfer, tuning: the options of each
    phase; what is measured has the length of the transfer. adapters: the rank of those that are tuned in place of all
    weights.
    """

    compiled: Compiled
    weights: Path
    data: Path
    folder: Path
    transfer: Options
    tuning: Options
    form: Form = field(default_factory=Form)
    patterns: tuple[str, ...] = ()
    adapters: int | None = None
    tokenizer: Path | None = None
    resume: bool = False
    force: bool = False


class Shown(Protocol):
    """What people see of a conversion."""

    def say(self, line: str) -> None:
        """One line."""
        ...

    def phase(self, name: str, options: Options, events: Generator[Event, None, None]) -> None:
        """Run a phase to its end."""
        ...


class Silent:
    """Nothing is shown."""

    def say(self, line: str) -> None:
        """Nothing."""

    def phase(self, name: str, options: Options, events: Generator[Event, None, None]) -> None:
        """Run a phase to its end."""
        for _ in events:
            pass


def convert(request: Request, shown: Shown | None = None, stop: Stop | None = None) -> Conversion:
    """Convert a model, in the request's folder, and report what became of it.

    Raises TfgError: FG302 and FG606 where nothing can be converted, FG415 for a model that is neither a language model
    nor an encoder of texts, FG411, FG412 and FG436 for the text, FG418 for weights, FG413, FG414, FG421, FG431 and
    FG432 for the folder, FG433 for numbers that are not finite. Raises Stopped or StopAsked where `stop` asks for it.
    """
    work = _Work(request, shown or Silent(), stop or Stop())
    if request.resume and (report := work.finished()) is not None:
        return report
    with claimed(
        request.folder, resume=request.resume, force=request.force, parts=(TRANSFER, TUNING), record=REPORT
    ):
        return work.run()


class _Work:
    """One conversion."""

    def __init__(self, request: Request, shown: Shown, stop: Stop) -> None:
        self.request, self.shown, self.stop = request, shown, stop
        self.spec: ConvertedSpec = convert_spec(request.compiled, request.form, request.patterns)
        self.original = request.compiled.module(seed=0).eval()
        load_weights(self.original, request.weights)
        self.task = _task(request, self.original)
        self.model = self.spec.compiled.module(seed=request.transfer.seed)
        self.new = _take_weights(self.model, self.original)
        self.sites = sites_of(self.model, self.spec.converted)
        self.texts = spec_files(self.spec.compiled.source)
        self.transfer = AttentionTransfer(self.sites, self.task.inputs)
        self.held_out = HeldOut(
            self.task,
            self.original,
            request.compiled.program,
            request.transfer,
            self.transfer,
            self.stop,
            shown.say,
        )
        self.started = time.monotonic()

    # ------------------------------------------------------------ phases

    def run(self) -> Conversion:
        """All of it, or the rest."""
        folder = self.request.folder
        report = self.recorded() if self.request.resume else self.begun()
        self.publish()
        if not report.measured or report.measured[0].before is None:
            report = self.measured(report, "original", "before")
            self.keep(report)
        self.phase(TRANSFER, self.request.transfer, self.transfer, trained=self.new)
        if report.measured[0].transferred is None:
            report = self.measured(report, "transferred")
            self.keep(report)
        self.tune()
        report = self.measured(report, "tuned")
        self.keep(report)
        self.shown.say(f"written to {folder}: fg.load, `fastgrad generate` and `fastgrad report` take it")
        return report

    def begun(self) -> Conversion:
        """The report before anything is measured, written at once, so that what comes can be resumed."""
        request = self.request
        report = Conversion(
            FORMAT,
            request.compiled.program.name,
            request.form.near,
            request.form.far_dim,
            tuple(entry.path for entry in self.spec.converted),
            tuple(LeftAttention(each.path, each.reason) for each in self.spec.left),
            _tokens(request.transfer),
            _tokens(request.tuning),
            request.adapters,
            0.0,
            (),
        )
        self.write(report)
        return report

    def recorded(self) -> Conversion:
        """The report of the conversion that is resumed. TfgError FG413 where there is none, FG414 of another one."""
        path = self.request.folder / REPORT
        if not path.exists():
            raise broken(path, "there is no conversion to continue")
        report = read_document(path, Conversion)
        for name in (TRANSFER, TUNING):
            if has_checkpoint(self.request.folder / name):
                options = self.options(name)
                latest(self.request.folder / name).belongs_to(options.settings, self.identity(name))
        return report

    def finished(self) -> Conversion | None:
        """The report of a conversion that has done all of its steps, None where there are some to do."""
        report = self.recorded()
        for name in (TRANSFER, TUNING):
            place = self.request.folder / name
            if not has_checkpoint(place):
                return None
            if not is_finished(latest(place), self.options(name), self.context(name)):
                return None
        return report if report.measured and report.measured[0].tuned is not None else None

    def options(self, phase: str) -> Options:
        """Those of a phase."""
        return self.request.transfer if phase == TRANSFER else self.request.tuning

    def phase(self, name: str, options: Options, loss: Loss, *, trained: Sequence[str]) -> None:
        """One phase in its folder, from its beginning or its checkpoint; only the weights `trained` get gradients."""
        place = self.request.folder / name
        with writing(place):
            place.mkdir(exist_ok=True)
        wanted = set(trained)
        for path, weight in self.model.named_parameters():
            weight.requires_grad_(path in wanted)
        resume, context = has_checkpoint(place), self.context(name)
        events = train(self.model, loss, self.task.data, options, place, resume=resume, context=context)
        self.shown.phase(name, options, events)

    def tune(self) -> None:
        """The second phase: all weights, or adapters and the attentions' own weights."""
        request = self.request
        if request.adapters is None:
            everything = [name for name, _ in self.model.named_parameters()]
            self.phase(TUNING, request.tuning, self.task.loss, trained=everything)
            return
        paths = adapted(self.spec.compiled.program, request.adapters)
        add_adapters(self.model, paths, request.adapters, request.tuning.seed)
        own = [name for name, _ in self.model.named_parameters() if ".parametrizations." in f".{name}"]
        own = [name for name in own if not name.endswith(".original")]
        self.phase(TUNING, request.tuning, self.task.loss, trained=[*own, *self.new])
        merge_adapters(self.model, paths)

    def context(self, phase: str) -> Context:
        """What a phase depends on."""
        return Context(self.identity(phase), stop=self.stop)

    @cached_property
    def digest(self) -> str:
        """Of the original's weights."""
        return _digest_of(read_tensors(self.request.weights, "FG418", "weights"))

    def identity(self, phase: str) -> dict[str, str]:
        """What a resumed conversion must share with the one that was begun."""
        request = self.request
        own = model_identity(self.spec.compiled, self.texts, self.task.data)
        return {
            **own,
            "--weights": self.digest,
            "--near": str(request.form.near),
            "--far-dim": str(request.form.far_dim),
            "--at": ", ".join(request.patterns) or "not given",
            "--adapters": str(request.adapters or "not given"),
            "--transfer-steps": str(request.transfer.steps),
            "the phase": phase,
        }

    # ------------------------------------------------------------ files

    def publish(self) -> None:
        """The converted model and its spec, which `load` takes."""
        publish(
            self.spec.compiled,
            self.texts,
            self.request.folder,
            tokenizer=self.task.data.tokenizer.source,
            force=self.request.force,
        )
        if not (self.request.folder / WEIGHTS).exists():
            self.save()

    def save(self) -> None:
        """The weights of now."""
        with writing(self.request.folder / WEIGHTS):
            save_weights(self.request.folder / WEIGHTS, self.model)

    def keep(self, report: Conversion) -> None:
        """The weights of now, and what was measured of them."""
        self.save()
        self.write(report)

    def write(self, report: Conversion) -> None:
        """The report."""
        with writing(self.request.folder / REPORT):
            write_atomically(self.request.folder / REPORT, to_json(report))

    # ------------------------------------------------------------ measurements

    def measured(self, report: Conversion, *phases: str) -> Conversion:
        """The report with the numbers of the model as it is now, under the names of these phases."""
        old = {(each.what, each.tokens): each for each in report.measured}
        found = []
        for what, tokens, value in self.held_out.numbers(self.model):
            each = old.get((what, tokens)) or Measured(what, tokens, self.held_out.of_original(what, tokens))
            each = msgspec.structs.replace(each, **{phases[-1]: value})
            found.append(each)
            for name in phases:
                self.shown.say(f"{name}: {what} {getattr(each, name):.4f} at {tokens} tokens, held out")
        seconds = report.seconds + time.monotonic() - self.started
        self.started = time.monotonic()
        return msgspec.structs.replace(report, measured=tuple(found), seconds=seconds)


def _task(request: Request, original: nn.Module) -> Task:
    """A language model learns from its loss, an encoder from what the original gives."""
    compiled, tokens = request.compiled, max(request.transfer.tokens, request.tuning.tokens)
    tokenizer: Tokenizer = BYTES if request.tokenizer is None else load_tokenizer(request.tokenizer)
    inputs, program = encoder_inputs(compiled.program), compiled.program
    is_of_text = compiled.loss is not None and not_a_language_model(program, tokenizer) is None
    if inputs is None or is_of_text:
        loss = language_model_loss(compiled, tokens, tokenizer)
        return Task(load_text(request.data, tokens, tokenizer=tokenizer), Inputs(), loss, "loss")
    limit = token_limit(program)
    if limit is not None and tokens > limit:
        raise TfgError.of("FG415", f"texts of model {program.name} have at most {limit} tokens, not {tokens}")
    texts = load_texts(request.data, inputs, tokenizer, model_inputs(program)[0].below, program.name)
    return Task(texts, inputs, Distillation(original, inputs), "output error")


def _take_weights(model: nn.Module, original: nn.Module) -> tuple[str, ...]:
    """Give the model the original's weights; the names of those that the original has not."""
    present = model.state_dict()
    given: Mapping[str, Tensor] = original.state_dict()
    new = tuple(name for name in present if name not in given)
    assert given.keys() <= present.keys(), "a conversion keeps the paths of weights"
    model.load_state_dict({**present, **given})
    return new


def _tokens(options: Options) -> int:
    return options.steps * options.batch * options.tokens


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    found = sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256 {found.hexdigest()}"
