"""From a file to a Program: picking the model, its run-time dims, the objective."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fastgrad_compiler.analysis.needs import needs
from fastgrad_compiler.frontend.blocks import bind_input, evaluate_call, make_graph
from fastgrad_compiler.frontend.budgets import budget_for
from fastgrad_compiler.frontend.builder import Builder
from fastgrad_compiler.frontend.expressions import tensor
from fastgrad_compiler.frontend.modules import DISK, Module, Reader, check_names, load
from fastgrad_compiler.frontend.parameters import dim_info, file_scope
from fastgrad_compiler.frontend.repeats import run_repeat
from fastgrad_compiler.frontend.reporter import Abort, Reporter, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Failed, Scope
from fastgrad_compiler.frontend.state import MAX_UNROLLED, State, Watch
from fastgrad_compiler.frontend.statements import dim_origin, tensor_type
from fastgrad_compiler.frontend.values import Tensor
from fastgrad_compiler.ir.calls import reachable
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
    source: Source,
    *,
    model: str | None = None,
    params: Mapping[str, object] | None = None,
    reader: Reader = DISK,
    watch: Watch | None = None,
) -> Program:
    """The program of one model of a file: typed graphs, dims, budget, objective.

    `model` picks one of several; `params` overrides the file's params by Python values or by command-line texts.
    `reader` says how texts are read, and `watch` is told what each expression was found to be.
    Raises TfgError with every diagnostic found: FG1xx (syntax), FG2xx (the file), FG401 to FG405 (`model`, `params`).
    """
    with _deep_recursion():
        report = Reporter()
        main = load(source, report, reader)
        state = State(report, evaluate_call, run_repeat, watch=watch)
        scope = _file_scopes(state, main, params or {})
        dims = dim_info(scope)
        state.multiples.update({name: info.multiple_of for name, info in dims.items()})
        block = _pick(report, main, model)
        budget = budget_for(scope, block.name.text)
        name = _model_graph(scope, block)
        objective = _objective(scope, block, name)
        report.check()
        assert name is not None  # otherwise something was reported
        graphs = reachable(state.graphs, [each for each in (name, objective) if each])
        used = _used_dims(graphs, dims)
        program = Program(graphs, name, objective, dims=used, budget=budget, name=block.name.text)
        _check_size(report, program)
        _shown(report, program, dims)
        report.check()
        return program


def _check_size(report: Reporter, program: Program) -> None:
    """FG241 where calls and repeats, which cost nothing here, multiply to what no pass could go through."""
    size = flat_size(program, program.main)
    if size > MAX_UNROLLED:
        message = (
            f"the program is too large: {size:,} operations with those of every repeat and call, "
            f"more than {MAX_UNROLLED:,}"
        )
        report("FG241", message, program[program.main].span)
        report.stop()


@contextmanager
def _deep_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _file_scopes(state: State, module: Module, given: Mapping[str, object]) -> Scope:
    if module not in state.file_scopes:
        file_scope(state, module, given)
        for used in module.uses.values():
            _file_scopes(state, used, {})
    return state.file_scopes[module]


def _pick(report: Reporter, main: Module, wanted: str | None) -> ast.BlockDecl:
    found = main.models
    listed = ", ".join(found)
    if wanted is not None and wanted not in found:
        help_ = did_you_mean(wanted, found) or (f"its models are {listed}" if found else None)
        report("FG404", f"the file has no model `{wanted}`", None, help_=(help_,))
        report.stop()
    if not found:
        if not report.diagnostics:  # a model whose name is taken was left out and reported
            help_ = "add model NAME(tokens: int[b, n]) -> float[b, n, d] { ... }"
            report("FG236", "the file has no model", None, help_=(help_,))
        report.stop()
    if wanted is None and len(found) > 1:
        notes = [Note(f"model {name}", block.name.span) for name, block in found.items()]
        report("FG405", f"the file has {len(found)} models: {listed}", None, notes=notes,
               help_=(f"pick one, for instance --model {next(iter(found))}",))  # fmt: skip
        report.stop()
    return found[wanted] if wanted is not None else next(iter(found.values()))


# ---------------------------------------------------------------- signatures of models and objectives


def _tensors(scope: Scope, parameters: Sequence[ast.TensorParam], builder: Builder) -> list[Tensor] | None:
    """The inputs of a model or objective; FG211 for dims that are neither params nor declared."""
    found: list[Tensor] = []
    for parameter in parameters:
        try:
            for expr in parameter.type.dims:
                _declared(scope, expr)
            kind = tensor_type(scope, parameter.type)
        except Abort:
            continue
        origins = tuple([dim_origin(scope, expr, parameter.name) for expr in parameter.type.dims])
        found.append(Tensor(parameter.name.text, kind, origins, builder))
    return found if len(found) == len(parameters) else None


def _declared(scope: Scope, expr: ast.Expr) -> None:
    if isinstance(expr, ast.Ref) and expr.name not in scope.names and expr.name not in scope.hidden:
        near = did_you_mean(expr.name, scope.names)
        scope.report("FG211", f"`{expr.name}` is neither a param nor a declared dim", expr.span, "not declared",
                     help_=(near, f"declare it: dim {expr.name}"))  # fmt: skip
        scope.names[expr.name] = Binding(Failed(), expr.span, "param")


def _model_graph(scope: Scope, block: ast.BlockDecl) -> str | None:
    for value in block.values:
        scope.report("FG240", f"a model takes tensors only; `{value.name.text}` is a compile-time value", value.span,
                     "nothing sets it", help_=("make it a param of the file",))  # fmt: skip
    builder = Builder()
    arguments = _tensors(scope, block.tensors, builder)
    before = len(scope.report.diagnostics)
    for kind in block.results:
        for expr in kind.dims:
            _declared(scope, expr)
    if arguments is None or block.values or len(scope.report.diagnostics) > before:
        return None
    scope.state.open.append((scope.module, block, block.name.span))
    try:
        return make_graph(_inner(scope), block, arguments).graph
    except Abort:
        return None
    finally:
        scope.state.open.pop()


def _inner(scope: Scope, builder: Builder | None = None) -> Scope:
    """The scope of a model or objective, which sees the dims of the file."""
    dims = {name: binding for name, binding in scope.names.items() if binding.kind == "dim"}
    return Scope(scope.state, scope.module, builder, dims)


def _objective(scope: Scope, model: ast.BlockDecl, main: str | None) -> str | None:
    """The objective's graph; None where the file has none, or has several models and this one does not fit it."""
    state, items = scope.state, scope.module.of(ast.Objective)
    for extra in items[1:]:
        scope.report("FG202", "a file has one objective", extra.name.span, "a second one",
                     notes=(Note("first here", items[0].name.span),))  # fmt: skip
    if not items:
        return None
    item = items[0]
    check_names([parameter.name for parameter in item.tensors], scope.report)
    builder = Builder()
    tensors = _tensors(scope, item.tensors, builder)
    if tensors is None or not _fits(scope, item, tensors, model, main):
        return None
    inner = _inner(scope, builder)
    for parameter, given in zip(item.tensors, tensors, strict=True):
        bind_input(inner, builder, parameter, given)
    try:
        value = tensor(inner, item.value, "the objective")
        if value.type.shape or value.type.dtype != "float":
            raise scope.report("FG231", f"the objective is {value.type}, not a scalar", item.value.span,
                               f"{value.type} here", help_=("take the mean: mean(...)",))  # fmt: skip
    except Abort:
        return None
    _no_weights(scope, item, builder)
    value = builder.rename(value, "loss" if item.name.text in inner.names else item.name.text)
    name = state.graph_names.take(item.name.text)
    state.graphs[name] = builder.graph(name, (value.node,), "", item.span)
    return name


def _no_weights(scope: Scope, item: ast.Objective, builder: Builder) -> None:
    """FG231 where a block that the objective calls has weights: only the model's are trained."""
    graphs = scope.state.graphs
    called = [str(node["graph"]) for node in builder.nodes if node.op == "call" and node["graph"] in graphs]
    if any(node.op == "weight" for graph in reachable(graphs, called) for node in graph.nodes):
        message = "an objective has no weights, but a block that it calls does"
        help_ = "let the model compute what needs weights, and return it"
        label = "only the model's weights are trained"
        scope.report("FG231", message, item.value.span, label, help_=(help_,))


def _fits(
    scope: Scope,
    item: ast.Objective,
    tensors: Sequence[Tensor],
    model: ast.BlockDecl,
    main: str | None,
) -> bool:
    """Whether the objective's first inputs are the model's results; FG231 where the only model does not fit."""
    if main is None:
        return True
    graph = scope.state.graphs[main]
    found = [graph[name].tensor for name in graph.outputs]
    if [tensor.type for tensor in tensors[: len(found)]] == found:
        return True
    if len(scope.module.models) == 1:
        place = next((i for i, kind in enumerate(found) if i >= len(tensors) or tensors[i].type != kind), 0)
        at = item.tensors[place].span if place < len(item.tensors) else item.name.span
        given = tensors[place].type if place < len(tensors) else "missing"
        scope.report("FG231", f"the objective takes the results of `{model.name.text}` first, {found[place]}", at,
                     f"{given} here", notes=(Note("the result", model.results[place].span),))  # fmt: skip
    return False


# ---------------------------------------------------------------- the finished program


def _shown(report: Reporter, program: Program, dims: Mapping[str, DimInfo]) -> None:
    """FG243 for run-time dims that a run needs and no input shows."""
    found = needs(program)
    for kind, root in zip(("model", "objective"), program.roots, strict=False):
        for name in found[root].extra:
            message = f"no input of the {kind} `{root}` shows the dimension `{name}`"
            help_ = f"give it an input with the dimension {name}, or make {name} a param"
            report("FG243", message, dims[name].span, "its size is needed at run time", help_=(help_,))


def _used_dims(graphs: Sequence[Graph], dims: Mapping[str, DimInfo]) -> tuple[DimInfo, ...]:
    names = {
        name for graph in graphs for node in graph.inputs for dim in node.tensor.shape for name in dim.names
    }
    return tuple(info for name, info in dims.items() if name in names)
