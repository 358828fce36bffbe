"""`compile` and what it gives: the stages of one program, its generated files, and modules made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrad_compiler.analysis.widths import divisible_blocks
from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.codegen.torch import emit_package
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import print_program
from fastgrad_compiler.passes.step import with_step
from fastgrad_compiler.pipeline import Stage, run
from fastgrad_compiler.planning.plan import Assignment
from fastgrad_compiler.targets import BACKENDS, check_target
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.documents.report import Batch
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.models.batches import ENTRY_BYTES, check_memory, dims_of, tokens_of, weight_entries
from fastgrad_dsl.models.plan_document import plan_document
from fastgrad_dsl.report.document import build_report
from fastgrad_dsl.report.notebook import compiled_html
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.storage.build_folder import write_build
from fastgrad_dsl.storage.import_record import record_for_build
from fastgrad_grammar.read import included, read_source
from fastgrad_grammar.source import Source

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor, nn
    from torch.distributed.tensor.parallel import ParallelStyle

    from fastgrad_dsl.distributed.objective import Objective
    from fastgrad_dsl.documents.calibration import Calibration
    from fastgrad_dsl.documents.plan import Plan
    from fastgrad_dsl.documents.report import Report
    from fastgrad_dsl.models.certify import AttentionCertificate

SPEC = "spec.tfg"  # in a written folder, what it was compiled from


def compile(
    spec: str | Path,
    *,
    params: Mapping[str, object] | None = None,
    model: str | None = None,
    target: str = "auto",
    out: str | Path | None = None,
    validate: bool = True,
    include: Iterable[str | Path] = (),
    force: bool = False,
    dims: Mapping[str, int] | None = None,
) -> Compiled:
    """Compile a `.tfg` file, or source text, to a Compiled; with `out`, also write its files there (`Compiled.write`).

    A string with a line break is source text; any other is a path. `params` override the file's; `model` picks one of
    several; `dims` are sizes of run-time dims for which a budget of memory is planned, in place of their declared
    limits (docs/memory.md); `include` names folders, besides the file's own, from which it may `use` files. With
    `validate`, each pass is tested on small random inputs (docs/architecture.md). Raises TfgError with every diagnostic
    that was found, and CompilerBug if a pass changed what the model computes.
    """
    check_target(target)
    is_text = isinstance(spec, str) and "\n" in spec
    source = Source("<text>", str(spec), included(include)) if is_text else read_source(spec, include=include)
    compiled = compile_source(source, params=params, model=model, target=target, validate=validate, dims=dims)
    if out is not None:
        compiled.write(out, force=force)
    return compiled


def compile_source(
    source: Source,
    *,
    params: Mapping[str, object] | None = None,
    model: str | None = None,
    target: str = "auto",
    validate: bool = True,
    dims: Mapping[str, int] | None = None,
) -> Compiled:
    """`compile` of a text that was read, or changed since; raises as that does."""
    program, given = elaborate(source, model=model, params=params), dict(dims or {})
    stages = run(program, target=target, validate=validate, dims=given)
    overrides = dict(sorted((params or {}).items()))
    return Compiled(source, target, stages, overrides, validate=validate, dims=given)


@dataclass(frozen=True)
class Compiled:
    """One compiled model.

    `stages` holds the program as elaborated and after each pass; `params` are those that override the file's.
    If the plan rests on a calibration, `calibration` is calibration.json and `assignment` what it decided; `validate`
    says whether passes are tested; `dims` are sizes for which memory is planned.
    """

    source: Source
    target: str
    stages: tuple[Stage, ...]
    params: Mapping[str, object] = field(default_factory=dict)
    calibration: Calibration | None = None
    validate: bool = True
    assignment: Assignment | None = None
    dims: Mapping[str, int] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """The program after the last pass."""
        return self.stages[-1].program

    @property
    def recognised(self) -> Program:
        """The program after recognition, in which each attention is one node."""
        return next(stage.program for stage in self.stages if stage.name == "attention")

    def stepped(self, along: str | None = None) -> Program:
        """The program with its step form along a dim, by default the only one that has it (docs/generation.md).

        Raises TfgError FG501 with the operation that has none, FG502 where no dim, or more than one, could be it.
        """
        if along is None and self.program.step is not None:
            return self.program
        return with_step(next(stage.program for stage in self.stages if stage.name == "lowrank"), along)

    def with_decisions(self, assignment: Assignment, calibration: Calibration | None = None) -> Compiled:
        """The same model planned anew, by what was decided of its attentions and what that rests on."""
        stages = run(
            self.stages[0].program,
            target=self.target,
            assignment=assignment,
            dims=self.dims,
            validate=self.validate,
        )
        return replace(self, stages=stages, assignment=assignment, calibration=calibration)

    def tensor_parallel_plan(self) -> dict[str, ParallelStyle]:
        """By path, the blocks whose heads or hidden width can be in parts, for PyTorch's `parallelize_module`.

        docs/distributed.md says which they are. Empty where there are none.
        """
        from fastgrad_dsl.distributed.tensor_parallel import Divided

        return {path: Divided(parts) for path, parts in divisible_blocks(self.program).items()}

    @property
    def plan(self) -> tuple[AttentionEntry, ...]:
        """Every attention, with what was decided for it."""
        return attention_table(self.program)

    @cached_property
    def plan_document(self) -> Plan:
        """plan.json; by key too, as the JSON: `plan_document["attentions"]`."""
        return plan_document(self.program, self.source.path, self.target, self.params)

    @cached_property
    def modules(self) -> dict[str, str]:
        """The generated package: file name to text."""
        return emit_package(self.program, source=self.source.path, backends=BACKENDS[self.target])

    @cached_property
    def files(self) -> dict[str, str]:
        """Every file that `write` writes: path within the folder to text; deterministic."""
        numbered = enumerate(self.stages)
        stages = {f"stages/{i:02d}-{each.name}.txt": print_program(each.program) for i, each in numbered}
        report = self.report()
        texts = {
            "plan.json": to_json(self.plan_document),
            "report.json": to_json(report),
            "report.html": render_html(report),
            SPEC: self.source.text,
            **record_for_build(self.source.path),
        }
        if self.calibration is not None:
            texts["calibration.json"] = to_json(self.calibration)
        return {**self.modules, **texts, **stages}

    def write(self, folder: str | Path, *, force: bool = False) -> None:
        """Write all files; an existing build is replaced as a whole, and the user's own files beside it are kept.

        Raises TfgError FG421 if the folder cannot be written, and FG428 if `force` is not set and the folder holds
        something other than a build, or a build that was changed by hand. The folder is then unchanged.
        """
        write_build(Path(folder), self.files, force=force)

    def module(self, seed: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
        """A new module with initial weights from `seed`, in torch's default dtype unless `dtype` says otherwise.

        The values are drawn in float32, so that each dtype starts from the same ones.

        Raises TfgError FG426 if they are larger than the machine's memory.
        """
        import torch

        if torch.get_default_device().type != "meta":
            check_memory("the model", ENTRY_BYTES * weight_entries(self.program))
        model: nn.Module = self._package.MODEL(seed)
        return model if dtype is None else model.to(dtype)

    def adopt(self, model: nn.Module) -> nn.Module:
        """A module of this plan that shares the weights of `model`, a module of another plan of the same spec."""
        return _with_weights_of(model, self._package.MODEL(None))

    def calibrate(
        self,
        model: nn.Module | None = None,
        batches: Sequence[Sequence[Tensor]] | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        seed: int = 0,
        measured_pace: bool = True,
    ) -> Compiled:
        """The same model with the fastest plan that keeps the budget on data (docs/calibration.md).

        A batch is the model's inputs, then what its objective takes beyond the results; of several the last third is
        held out to verify the plan. Without batches they are random inputs of the sizes `dims`, without a model its
        weights are the initial ones of `seed`. `measured_pace`: the cost model is fitted to this machine, once, in some
        ten seconds. Raises TfgError FG312 where rules of the budget keep it from being met, ValueError for tensors that
        are not a batch of the model.
        """
        from fastgrad_dsl.calibration.replan import Request, replan
        from fastgrad_dsl.models.batch_check import batch_problem

        for problem in (batch_problem(self.program, batch) for batch in batches or ()):
            if problem is not None:
                raise ValueError(problem)
        return replan(self, Request(model, batches, dims=dims, seed=seed, measured_pace=measured_pace))

    def reference(self, model: nn.Module) -> nn.Module:
        """The exact model, which shares the weights of `model`: a change of one is a change of both.

        No attention is approximated: all are softmax except those whose weights are a polynomial of the model's own.
        """
        return _with_weights_of(model, self._reference_package.MODEL(None))

    @property
    def loss(self) -> Objective | None:
        """The objective of the file as a function of tensors, None if it has none.

        `loss.of(model, inputs, targets)` makes no logits where the loss is a cross entropy of a product. Within
        `distributed.context_parallel` it is that of the tokens of all ranks.
        """
        from fastgrad_dsl.distributed.objective import Objective

        found = getattr(self._package, "OBJECTIVE", None)
        return None if found is None else Objective(found, self.program)

    def report(
        self,
        model: nn.Module | None = None,
        batch: Sequence[Tensor] | None = None,
        *,
        calibration: Calibration | None = None,
    ) -> Report:
        """The error report (docs/report.md), measured on a batch if one is given; by key too, as the JSON.

        `batch` holds the model's inputs, then what its objective takes beyond its results (docs/language.md);
        `calibration` is a calibration document to show. Raises ValueError if only one of model and batch is given,
        or the tensors are not a batch of the model.
        """
        plan, calibration = self.plan_document, calibration or self.calibration
        shown = partial(
            build_report, plan, spec=self.source.text, files=self.modules, calibration=calibration
        )
        if model is None or batch is None:
            if model is not None or batch is not None:
                raise ValueError("report takes a model and a batch, or neither")
            return shown()

        # they need PyTorch, which files are made without
        from fastgrad_dsl.models.batch_check import batch_problem
        from fastgrad_dsl.models.measure_plan import measure_plan

        problem = batch_problem(self.program, batch)
        if problem is not None:
            raise ValueError(problem)
        count = len(plan.inputs)
        errors = measure_plan(plan, model, batch[:count], batch[count:], self.loss)
        described = Batch(
            batches=1,
            tokens=tokens_of(plan, batch),
            kind="a given batch",
            dims=dims_of(plan, batch),
            seed=None,
            weights="the given weights",
        )
        return shown(errors, described)

    def certify(self, model: nn.Module) -> tuple[AttentionCertificate, ...]:
        """What the weights of `model` now prove about each attention: R, whether the planned R holds, worst cases.

        Can be called at any time in training; takes seconds and no gradients (docs/mathematics.md, section 7).
        Attentions whose weights are a polynomial of the model's own need no certificate. Raises ValueError for another
        model's weights.
        """
        from fastgrad_dsl.models.certify import certify

        return certify(self.program, model, self.target)

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, the plan, and the picture of the model."""
        return compiled_html(self.report(), self.program)

    @cached_property
    def _package(self) -> ModuleType:
        return package_from_texts(self.modules)

    @cached_property
    def _reference_package(self) -> ModuleType:
        return package_from_texts(emit_package(self.program, source=self.source.path, exact=True))


def _with_weights_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """`other` with the parameters and buffers of `model` in place of its own."""
    for name, parameter in model.named_parameters():
        owner, key = owner_of(other, name)
        setattr(owner, key, parameter)
    kept = other.state_dict()
    for name, buffer in model.named_buffers():
        if name not in kept:
            continue  # a constant of the program, which `other` has itself
        owner, key = owner_of(other, name)
        owner.register_buffer(key, buffer)
    return other.train(model.training)


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The block that holds the tensor at a path, and the tensor's name in it."""
    *parents, key = path.split(".")
    for name in parents:
        model = model._modules[name]  # type: ignore[assignment]  # get_submodule takes a label like `half` for a method
    return model, key
