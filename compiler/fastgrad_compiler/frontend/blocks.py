"""Calls of blocks: dims bound from arguments, one instance a signature, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.arguments import Formal, match_arguments
from fastgrad_compiler.frontend.builder import Builder, trace_origins
from fastgrad_compiler.frontend.calls import call_operation
from fastgrad_compiler.frontend.expressions import as_tensor, compile_time, dimension, evaluate
from fastgrad_compiler.frontend.modules import Module, suggest_block
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Scope, walk
from fastgrad_compiler.frontend.state import MAX_DEPTH, Instance, State, builder_of, emit_node
from fastgrad_compiler.frontend.statements import run_body, tensor_type
from fastgrad_compiler.frontend.values import Constant, Origin, Several, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import TensorType
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span


def evaluate_call(state: State, scope: Scope, call: ast.Call) -> Value:
    """A call of a block of this file or of a used one, or of an operation.

    A block of the file hides the operation of its name, except in its own body: so a block can wrap it.
    """
    name = call.function.text
    if call.module is None:
        own = name in NAMES and bool(state.open) and state.open[-1][1] is scope.module.blocks.get(name)
        if name in scope.module.blocks and not own:
            return _call_block(state, scope, call, scope.module)
        if name in NAMES:
            return call_operation(state, scope, call)
        help_ = did_you_mean(name, [*scope.module.blocks, *NAMES]) if name not in _elsewhere(scope) else None
        state.reporter.fail("FG201", f"unknown block or operation `{name}`", call.function.span, "not found",
                            help_=(help_ or suggest_block(scope.module, name),))  # fmt: skip
    module = scope.module.uses.get(call.module)
    at = Span(call.span.source, call.span.start, call.span.start + len(call.module))
    if module is None:
        if call.module in scope.module.broken:
            raise Abort
        help_ = did_you_mean(call.module, scope.module.uses)
        missing = "add `use std` to the file" if call.module == "std" else help_
        state.reporter.fail(
            "FG201", f"unknown file or library `{call.module}`", at, "not used here", help_=(missing,)
        )
    if name not in module.blocks:
        state.reporter.fail("FG201", f"{call.module} has no block `{name}`", call.function.span, "not found",
                            help_=(did_you_mean(name, module.blocks),))  # fmt: skip
    return _call_block(state, scope, call, module)


def _elsewhere(scope: Scope) -> set[str]:
    return {name for module in scope.module.uses.values() for name in module.blocks}


def _call_block(state: State, scope: Scope, call: ast.Call, module: Module) -> Value:
    block = module.blocks[call.function.text]
    shown = f"{call.module}.{block.name.text}" if call.module else block.name.text
    builder_of(state, scope, call.span)
    _check_callable(state, call, block, shown)
    formals = [Formal(p.name.text, True, True, p.span) for p in block.tensors]
    formals += [Formal(p.name.text, False, p.default is None, p.span) for p in block.values]
    given = match_arguments(state.reporter, call, formals, shown)
    arguments = [
        as_tensor(state, scope, evaluate(state, scope, given[p.name.text][0]), given[p.name.text][0].span,
                  f"`{p.name.text}` of {shown}")
        for p in block.tensors
    ]  # fmt: skip
    inner = Scope(module, scope.multiples)
    for parameter in block.values:
        if parameter.name.text in given:
            _bind_value(state, scope, inner, parameter, given[parameter.name.text][0], shown)
    places = [given[p.name.text][0].span for p in block.tensors]
    _bind_dims(state, inner, block, arguments, places, shown)
    for parameter in block.values:
        if parameter.name.text not in inner.names and parameter.default is not None:
            _bind_value(state, inner, inner, parameter, parameter.default, shown)
    _check_types(state, inner, block, arguments, places, call, shown)
    instance = instantiate(state, inner, block, arguments, call.span, shown)
    return _emit_call(state, scope, call, instance, arguments)


def _check_callable(state: State, call: ast.Call, block: ast.BlockDecl, shown: str) -> None:
    if block.is_model:
        state.reporter.fail("FG240", f"{shown} is a model, only blocks can be called", call.function.span, "a model",
                            notes=(Note("declared here", block.name.span),),
                            help_=("make it a block, and a model that calls it",))  # fmt: skip
    places: list[ast.BlockDecl] = [each for _, each, _ in state.open]
    if block in places:
        first = next(index for index, each in enumerate(places) if each is block)
        cycle = " -> ".join([each.name.text for each in places[first:]] + [block.name.text])
        notes = [Note(f"{b.name.text} is called here", span) for _, b, span in state.open[first + 1 :]]
        state.reporter.fail("FG220", f"block `{block.name.text}` calls itself: {cycle}", call.span, "closes the cycle",
                            notes=notes[-4:], help_=("use repeat for successive layers",))  # fmt: skip
    if len(state.open) >= MAX_DEPTH:
        state.reporter.fail(
            "FG241", f"blocks call each other more than {MAX_DEPTH} deep", call.span, "one too deep"
        )


def _bind_value(
    state: State, outer: Scope, inner: Scope, parameter: ast.ValueParam, expr: ast.Expr, shown: str
) -> None:
    name = parameter.name
    value = compile_time(state, outer, expr, f"`{name.text}` of {shown}")
    try:
        value = values.convert(value, parameter.type.name, parameter.type.optional)
    except ValueProblem as error:
        message = f"`{name.text}` of {shown}: {error.message}"
        state.reporter.fail(error.code, message, expr.span, f"{values.show(value)} here",
                            notes=(Note(f"declared as {parameter.type.span.text}", parameter.span),),
                            help_=(error.help,))  # fmt: skip
    origin = Origin(name.text, name.span)
    if isinstance(expr, ast.Ref) and outer is not inner:
        binding = outer.names.get(expr.name)
        origin = binding.origin if binding is not None and binding.origin is not None else origin
    inner.names[name.text] = Binding(value, name.span, "value", origin)


# ---------------------------------------------------------------- dims of a signature


def _bind_dims(
    state: State,
    inner: Scope,
    block: ast.BlockDecl,
    arguments: Sequence[Tensor],
    places: Sequence[Span],
    shown: str,
) -> None:
    """Bind the names that stand alone as a dim of an argument; FG205 and FG209 where an argument is of another kind."""
    fixed = {p.name.text for p in block.values}
    file = state.file_scopes[inner.module].names
    bound_by: dict[str, tuple[str, Span]] = {}
    for parameter, argument, place in zip(block.tensors, arguments, places, strict=True):
        _check_kind(state, parameter, argument, place, shown)
        for axis, expr in enumerate(parameter.type.dims):
            if not isinstance(expr, ast.Ref) or expr.name in fixed:
                continue
            outer = file.get(expr.name)
            if outer is not None and outer.kind == "param":
                continue
            size, origin = argument.type.shape[axis], argument.origins[axis]
            bound = inner.names.get(expr.name)
            if bound is None:
                origin = origin or Origin(expr.name, expr.span)
                inner.names[expr.name] = Binding(values.normal(size), expr.span, "dim", origin)
                bound_by[expr.name] = (parameter.name.text, place)
            elif bound.value != values.normal(size):
                _differ(state, expr.name, bound, bound_by[expr.name], parameter, argument, axis, place, shown)


def _check_kind(state: State, parameter: ast.TensorParam, argument: Tensor, place: Span, shown: str) -> None:
    wanted, found = parameter.type, argument.type
    note = Note(f"declared as {wanted.span.text}", parameter.span)
    if len(wanted.dims) != len(found.shape):
        message = f"`{parameter.name.text}` of {shown} has {len(wanted.dims)} dimensions, not {found}"
        state.reporter.fail("FG205", message, place, f"{found} here", notes=(note,))  # fmt: skip
    if wanted.dtype != found.dtype:
        hint = (
            f"convert it with {wanted.dtype}(x)"
            if wanted.dtype in ("float", "int")
            else "compare it, as in x != 0"
        )
        state.reporter.fail("FG209", f"`{parameter.name.text}` of {shown} is a tensor of {wanted.dtype}, not {found}",
                            place, f"{found} here", notes=(note,), help_=(hint,))  # fmt: skip


def _differ(
    state: State, name: str, bound: Binding, first: tuple[str, Span], parameter: ast.TensorParam, argument: Tensor,
    axis: int, place: Span, shown: str,
) -> NoReturn:  # fmt: skip
    size = argument.type.shape[axis]
    origin = argument.origins[axis]
    from_here = f" ({bound.origin})" if bound.origin is not None else ""
    state.reporter.fail(
        "FG210",
        f"{name} of {shown} is {bound.value} from {first[0]}{from_here} but {size} from {parameter.name.text}",
        place,
        f"{size} here" + (f" ({origin})" if origin is not None else ""),
        notes=(Note(f"{name} is {bound.value} by this argument", first[1]),
               Note(f"declared as {parameter.type.span.text}", parameter.span)),
    )  # fmt: skip


def _check_types(
    state: State, inner: Scope, block: ast.BlockDecl, arguments: Sequence[Tensor], places: Sequence[Span],
    call: ast.Call, shown: str,
) -> None:  # fmt: skip
    """FG210 where a dim of an argument is not what the signature computes for it."""
    for parameter, argument, place in zip(block.tensors, arguments, places, strict=True):
        for axis, expr in enumerate(parameter.type.dims):
            wanted = dimension(state, inner, expr)
            if wanted != argument.type.shape[axis]:
                size, origin = argument.type.shape[axis], argument.origins[axis]
                by = expr.span.text if isinstance(expr, ast.Literal) else f"{expr.span.text} = {wanted}"
                state.reporter.fail(
                    "FG210", f"`{parameter.name.text}` of {shown} has {by} at axis {axis}, not {size}", place,
                    f"{size} here" + (f" ({origin})" if origin is not None else ""),
                    notes=(Note(f"declared as {parameter.type.span.text}", parameter.span),),
                )  # fmt: skip


# ---------------------------------------------------------------- instances


def instantiate(
    state: State, inner: Scope, block: ast.BlockDecl, arguments: Sequence[Tensor], at: Span, shown: str
) -> Instance:
    """The graph of a block for these types and values, made where there is none yet."""
    settings = tuple(values.key(_known(inner, p.name.text)) for p in block.values)
    key = (id(block), tuple(a.type for a in arguments), settings)
    if key not in state.instances:
        state.open.append((inner.module, block, at))
        state.reporter.calls.append((shown, at))
        try:
            state.instances[key] = make_graph(state, inner, block, arguments)
        finally:
            state.open.pop()
            state.reporter.calls.pop()
    return state.instances[key]


def _known(scope: Scope, name: str) -> Constant:
    value = scope.names[name].value
    return value if isinstance(value, int | float | str | Dim | Several) else None


def make_graph(state: State, inner: Scope, block: ast.BlockDecl, arguments: Sequence[Tensor]) -> Instance:
    """Elaborate a block's body with its dims and values bound in `inner`; `arguments` give types and origins."""
    state.step(block.span, 5)  # a graph is more work than a statement
    shown = f"{inner.module.name}.{block.name.text}" if inner.module.name else block.name.text
    name = state.graph_name(shown)
    weights = [s.name.text for s in walk(block.body) if isinstance(s, ast.Weight | ast.Buffer)]
    builder = Builder(weights=weights)
    signature = Scope(inner.module, inner.multiples, None, dict(inner.names))
    results = tuple([tensor_type(state, signature, result) for result in block.results])
    inner.builder = builder
    for parameter, argument in zip(block.tensors, arguments, strict=True):
        tensor = builder.input(parameter.name.text, argument.type, argument.origins, parameter.span)
        origin = Origin(parameter.name.text, parameter.name.span)
        inner.names[parameter.name.text] = Binding(tensor, parameter.name.span, "input", origin)
    before = len(state.reporter.diagnostics)
    try:
        returned = run_body(state, inner, block.body)
        outputs = _outputs(state, inner, block, results, returned, before)
    except Abort:
        outputs = None
    if outputs is None or len(state.reporter.diagnostics) > before:
        return Instance(None, results)
    graph = builder.graph(name, outputs, shown, block.span)
    state.graphs[name] = graph
    return Instance(name, results)


def _outputs(
    state: State, inner: Scope, block: ast.BlockDecl, results: Sequence[TensorType],
    returned: tuple[Value, ast.Return] | None, before: int,
) -> list[str] | None:  # fmt: skip
    """The nodes that a body returns, checked against the declared types: FG222, FG224."""
    if returned is None:
        if len(state.reporter.diagnostics) == before:
            end = Span(block.span.source, block.span.end - 1, block.span.end)
            what = "model" if block.is_model else "block"
            state.reporter.error("FG222", f"{what} `{block.name.text}` ends without a return", end, "reached here",
                                 notes=(Note("its result is declared here", block.results[0].span),))  # fmt: skip
        return None
    value, statement = returned
    found = value.items if isinstance(value, Several) else (value,)
    span = statement.value.span
    if len(found) != len(results):
        count = f"{len(found)} value{'' if len(found) == 1 else 's'}"
        message = f"`{block.name.text}` returns {count}, not the declared {len(results)}"
        note = Note("declared here", block.results[0].span.to(block.results[-1].span))
        state.reporter.fail("FG224", message, span, f"{len(found)} here", notes=(note,))
    tensors = [as_tensor(state, inner, each, span, "a result") for each in found]
    for tensor, kind, written in zip(tensors, results, block.results, strict=True):
        if tensor.type != kind:
            origin = _first_difference(tensor, kind)
            state.reporter.fail(
                "FG224", f"`{block.name.text}` returns {tensor.type}, not the declared {kind}", span,
                f"{tensor.type} here" + (f" ({origin})" if origin else ""),
                notes=(Note(f"declared as {written.span.text}", written.span),),
            )  # fmt: skip
    return [tensor.node for tensor in tensors]


def _first_difference(tensor: Tensor, kind: TensorType) -> Origin | None:
    if len(tensor.type.shape) != len(kind.shape):
        return None
    pairs = zip(tensor.type.shape, kind.shape, tensor.origins, strict=True)
    return next((origin for found, wanted, origin in pairs if found != wanted), None)


def _emit_call(
    state: State, scope: Scope, call: ast.Call, instance: Instance, arguments: Sequence[Tensor]
) -> Value:
    builder = scope.builder
    assert builder is not None  # checked by `_call_block`
    label = _label(state, call, builder)
    results = instance.results
    kind = results[0] if len(results) == 1 else results
    node = emit_node(
        state, scope, call.span, "call", arguments, kind, graph=instance.graph or "", label=label
    )
    origins = _result_origins(results, arguments)
    if len(results) == 1:
        return Tensor(node.name, results[0], origins[0], builder)
    items: list[Value] = []
    for index, (each, origin) in enumerate(zip(results, origins, strict=True)):
        item = builder.add("item", (node.name,), each, call.span, {"index": index})
        items.append(Tensor(item.name, each, origin, builder))
    return Several(tuple(items))


def _label(state: State, call: ast.Call, builder: Builder) -> str:
    if call.label is None:
        return builder.label(call.function.text)
    wanted = call.label
    if wanted.text in builder.labels or wanted.text in builder.weights:
        taken = "a weight" if wanted.text in builder.weights else "another call"
        state.reporter.error("FG228", f"the label `{wanted.text}` is taken by {taken}", wanted.span, "used again",
                            help_=("choose another label: paths are made of labels",))  # fmt: skip
    return builder.label(wanted.text)


def _result_origins(
    results: Sequence[TensorType], arguments: Sequence[Tensor]
) -> list[tuple[Origin | None, ...]]:
    return [trace_origins(kind.shape, arguments) for kind in results]
