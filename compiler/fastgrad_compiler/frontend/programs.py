"""From a file to a Program: picking the model, its run-time dims, the objective."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fastgrad_compiler.analysis.needs import needs
from fastgrad_compiler.frontend.blocks import evaluate_call, make_graph
from fastgrad_compiler.frontend.budgets import budget_for
from fastgrad_compiler.frontend.builder import Builder
from fastgrad_compiler.frontend.expressions import as_tensor, evaluate
from fastgrad_compiler.frontend.modules import Module, check_names, load
from fastgrad_compiler.frontend.parameters import dim_info, file_scope
from fastgrad_compiler.frontend.repeats import run_repeat
from fastgrad_compiler.frontend.reporter import Abort, Reporter, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Failed, Scope
from fastgrad_compiler.frontend.state import MAX_UNROLLED, State
from fastgrad_compiler.frontend.statements import dim_origin, tensor_type
from fastgrad_compiler.frontend.values import Origin, Tensor
from fastgrad_compiler.ir.calls import reachable
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import flat_size
from fastgrad_compiler.ir.graph import DimInfo, Graph, Program
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source

_RECURSION = 20_000
"""Blocks nest at most 64 deep and expressions 100; Python's default of 1,000 frames would not do."""


def models(source: Source) -> tuple[str, ...]:
    """The names of the models of a file, in order. Raises TfgError for its syntax."""
    return tuple(
        item.name.text for item in parse(source).items if isinstance(item, ast.BlockDecl) and item.is_model
    )


def elaborate(
    source: Source, *, model: str | None = None, params: Mapping[str, object] | None = None
) -> Program:
    """The program of one model of a file: typed graphs, dims, budget, objective.

    `model` picks one of several; `params` overrides the file's params by Python values or by command-line texts.
    Raises TfgError with every diagnostic found: FG1xx (syntax), FG2xx (the file), FG401 to FG405 (`model`, `params`).
    """
    with _deep_recursion():
        reporter = Reporter()
        main = load(source, reporter)
        state = State(reporter, main, evaluate_call, run_repeat)
        _file_scopes(state, main, params or {})
        scope = state.file_scopes[main]
        dims = dim_info(state, scope)
        state.multiples.update({name: info.multiple_of for name, info in dims.items()})
        block = _pick(reporter, main, model)
        budget = budget_for(state, scope, block.name.text)
        name = _model_graph(state, scope, block)
        objective = _objective(state, scope, block, name)
        reporter.check()
        assert name is not None  # otherwise something was reported
        graphs = reachable(state.graphs, [each for each in (name, objective) if each])
        used = _used_dims(graphs, dims)
        program = Program(graphs, name, objective, None, used, budget, block.name.text)
        _check_size(reporter, program)
        _shown(reporter, program, dims)
        reporter.check()
        return program


def _check_size(reporter: Reporter, program: Program) -> None:
    """FG241 where calls and repeats, which cost nothing here, multiply to what no pass could go through."""
    size = flat_size(program, program.main)
    if size > MAX_UNROLLED:
        reporter.error("FG241", f"the program is too large: {size:,} operations with those of every repeat and call, "
                       f"more than {MAX_UNROLLED:,}", program[program.main].span)  # fmt: skip
        reporter.stop()


@contextmanager
def _deep_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _file_scopes(state: State, module: Module, given: Mapping[str, object]) -> None:
    if module in state.file_scopes:
        return
    file_scope(state, module, given)
    for used in module.uses.values():
        _file_scopes(state, used, {})


def _pick(reporter: Reporter, main: Module, wanted: str | None) -> ast.BlockDecl:
    found = main.models
    listed = ", ".join(found)
    if wanted is not None and wanted not in found:
        help_ = did_you_mean(wanted, found) or (f"its models are {listed}" if found else None)
        reporter.error("FG404", f"the file has no model `{wanted}`", None, help_=(help_,))
        reporter.stop()
    if not found:
        if not reporter.diagnostics:  # a model whose name is taken was left out and reported
            help_ = "add model NAME(tokens: int[b, n]) -> float[b, n, d] { ... }"
            reporter.error("FG236", "the file has no model", None, help_=(help_,))
        reporter.stop()
    if wanted is None and len(found) > 1:
        notes = [Note(f"model {name}", block.name.span) for name, block in found.items()]
        reporter.error("FG405", f"the file has {len(found)} models: {listed}", None, notes=notes,
                       help_=(f"pick one, for instance --model {next(iter(found))}",))  # fmt: skip
        reporter.stop()
    return found[wanted] if wanted is not None else next(iter(found.values()))


# ---------------------------------------------------------------- signatures of models and objectives


def _tensors(
    state: State, scope: Scope, parameters: Sequence[ast.TensorParam], builder: Builder
) -> list[Tensor] | None:
    """The inputs of a model or objective; FG211 for dims that are neither params nor declared."""
    found: list[Tensor] = []
    failed = False
    for parameter in parameters:
        try:
            for expr in parameter.type.dims:
                _declared(state, scope, expr)
            kind = tensor_type(state, scope, parameter.type)
        except Abort:
            failed = True
            continue
        origins = tuple([dim_origin(scope, expr, parameter.name) for expr in parameter.type.dims])
        found.append(Tensor(parameter.name.text, kind, origins, builder))
    return None if failed else found


def _declared(state: State, scope: Scope, expr: ast.Expr) -> None:
    if isinstance(expr, ast.Ref) and expr.name not in scope.names and expr.name not in scope.hidden:
        near = did_you_mean(expr.name, scope.names)
        state.reporter.error("FG211", f"`{expr.name}` is neither a param nor a declared dim", expr.span, "not declared",
                             help_=(near, f"declare it: dim {expr.name}"))  # fmt: skip
        scope.names[expr.name] = Binding(Failed(), expr.span, "param")


def _model_graph(state: State, scope: Scope, block: ast.BlockDecl) -> str | None:
    for value in block.values:
        state.reporter.error("FG240", f"a model takes tensors only, `{value.name.text}` is a compile-time value",
                             value.span, "nothing sets it", help_=("make it a param of the file",))  # fmt: skip
    builder = Builder()
    arguments = _tensors(state, scope, block.tensors, builder)
    before = len(state.reporter.diagnostics)
    for kind in block.results:
        for expr in kind.dims:
            _declared(state, scope, expr)
    if arguments is None or block.values or len(state.reporter.diagnostics) > before:
        return None
    inner = Scope(scope.module, state.multiples)
    for name, binding in scope.names.items():
        if binding.kind == "dim":
            inner.names[name] = binding
    state.open.append((scope.module, block, block.name.span))
    try:
        instance = make_graph(state, inner, block, arguments)
    except Abort:
        return None
    finally:
        state.open.pop()
    return instance.graph


def _objective(state: State, scope: Scope, model: ast.BlockDecl, main: str | None) -> str | None:
    """The objective's graph; None where the file has none, or has several models and this one does not fit it."""
    items = [item for item in scope.module.items if isinstance(item, ast.Objective)]
    for extra in items[1:]:
        state.reporter.error("FG202", "a file has one objective", extra.name.span, "a second one",
                             notes=(Note("first here", items[0].name.span),))  # fmt: skip
    if not items:
        return None
    item = items[0]
    check_names([parameter.name for parameter in item.tensors], state.reporter)
    builder = Builder()
    tensors = _tensors(state, scope, item.tensors, builder)
    if tensors is None or not _fits(state, scope, item, tensors, model, main):
        return None
    inner = Scope(scope.module, state.multiples, builder)
    for name, binding in scope.names.items():
        if binding.kind == "dim":
            inner.names[name] = binding
    for parameter, tensor in zip(item.tensors, tensors, strict=True):
        builder.input(tensor.node, tensor.type, tensor.origins, parameter.span)
        origin = Origin(parameter.name.text, parameter.name.span)
        inner.names[parameter.name.text] = Binding(tensor, parameter.name.span, "input", origin)
    try:
        value = as_tensor(state, inner, evaluate(state, inner, item.value), item.value.span, "the objective")
        if value.type.shape or value.type.dtype != "float":
            state.reporter.fail("FG231", f"the objective is {value.type}, not a scalar", item.value.span,
                                f"{value.type} here", help_=("take the mean: mean(...)",))  # fmt: skip
    except Abort:
        return None
    _no_weights(state, item, builder)
    value = builder.rename(value, "loss" if item.name.text in inner.names else item.name.text)
    name = state.graph_name(item.name.text)
    state.graphs[name] = builder.graph(name, (value.node,), "", item.span)
    return name


def _no_weights(state: State, item: ast.Objective, builder: Builder) -> None:
    """FG231 where a block that the objective calls has weights: only the model's are trained."""
    called = [str(node["graph"]) for node in builder.nodes if node.op == "call"]
    known = [name for name in called if name in state.graphs]
    if any(node.op == "weight" for graph in reachable(state.graphs, known) for node in graph.nodes):
        state.reporter.error(
            "FG231",
            "an objective has no weights, but a block that it calls does",
            item.value.span,
            "only the model's weights are trained",
            help_=("let the model compute what needs weights, and return it",),
        )


def _fits(
    state: State,
    scope: Scope,
    item: ast.Objective,
    tensors: Sequence[Tensor],
    model: ast.BlockDecl,
    main: str | None,
) -> bool:
    """Whether the objective's first inputs are the model's results; FG231 where the only model does not fit."""
    if main is None:
        return True
    graph = state.graphs[main]
    found = [graph[name].tensor for name in graph.outputs]
    if [tensor.type for tensor in tensors[: len(found)]] == found:
        return True
    if len(scope.module.models) == 1:
        place = next((i for i, kind in enumerate(found) if i >= len(tensors) or tensors[i].type != kind), 0)
        at = item.tensors[place].span if place < len(item.tensors) else item.name.span
        given = tensors[place].type if place < len(tensors) else "missing"
        state.reporter.error("FG231", f"the objective takes the results of `{model.name.text}` first, {found[place]}",
                             at, f"{given} here", notes=(Note("the result", model.results[place].span),))  # fmt: skip
    return False


# ---------------------------------------------------------------- the finished program


def _shown(reporter: Reporter, program: Program, dims: Mapping[str, DimInfo]) -> None:
    """FG243 for run-time dims that a run needs and no input shows."""
    found = needs(program)
    roots = [("model", program.main)] + [("objective", each) for each in (program.objective,) if each]
    for kind, root in roots:
        for name in found[root].extra:
            info = dims[name]
            reporter.error("FG243", f"no input of the {kind} `{root}` shows the dimension `{name}`", info.span,
                           "its size is needed at run time",
                           help_=(f"give it an input with the dimension {name}, or make {name} a param",))  # fmt: skip


def _used_dims(graphs: Sequence[Graph], dims: Mapping[str, DimInfo]) -> tuple[DimInfo, ...]:
    names: set[str] = set()
    for graph in graphs:
        for node in graph.inputs:
            shape: tuple[Dim, ...] = node.tensor.shape
            names.update(name for dim in shape for name in dim.names)
    return tuple(info for name, info in dims.items() if name in names)
