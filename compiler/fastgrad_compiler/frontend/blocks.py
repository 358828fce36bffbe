"""Calls of blocks: dims bound from arguments, one instance a signature, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.arguments import Formal, match_arguments
from fastgrad_compiler.frontend.builder import Builder, trace_origins
from fastgrad_compiler.frontend.calls import call_operation
from fastgrad_compiler.frontend.expressions import as_tensor, compile_time, dimension, tensor
from fastgrad_compiler.frontend.modules import Module, suggest_block
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Scope
from fastgrad_compiler.frontend.state import MAX_DEPTH, Instance, builder_of, emit_several
from fastgrad_compiler.frontend.statements import run_body, tensor_type
from fastgrad_compiler.frontend.values import Constant, Origin, Several, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import TensorType
from fastgrad_compiler.ir.words import counted
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span


def evaluate_call(scope: Scope, call: ast.Call) -> Value:
    """A call of a block of this file or of a used one, or of an operation.

    A block of the file hides the operation of its name, except in its own body: so a block can wrap it.
    """
    name = call.function.text
    if call.module is None:
        opened = scope.state.open
        own = name in NAMES and bool(opened) and opened[-1][1] is scope.module.blocks.get(name)
        if name in scope.module.blocks and not own:
            return _call_block(scope, call, scope.module)
        if name in NAMES:
            return call_operation(scope, call)
        elsewhere = any(name in module.blocks for module in scope.module.uses.values())
        help_ = None if elsewhere else did_you_mean(name, [*scope.module.blocks, *NAMES])
        raise scope.report("FG201", f"unknown block or operation `{name}`", call.function.span, "not found",
                           help_=(help_ or suggest_block(scope.module, name),))  # fmt: skip
    module = scope.module.uses.get(call.module)
    at = Span(call.span.source, call.span.start, call.span.start + len(call.module))
    if module is None:
        if call.module in scope.module.broken:
            raise Abort
        help_ = did_you_mean(call.module, scope.module.uses)
        missing = "add `use std` to the file" if call.module == "std" else help_
        raise scope.report(
            "FG201", f"unknown file or library `{call.module}`", at, "not used here", help_=(missing,)
        )
    if name not in module.blocks:
        raise scope.report("FG201", f"{call.module} has no block `{name}`", call.function.span, "not found",
                           help_=(did_you_mean(name, module.blocks),))  # fmt: skip
    return _call_block(scope, call, module)


def _call_block(scope: Scope, call: ast.Call, module: Module) -> Value:
    block = module.blocks[call.function.text]
    shown = f"{call.module}.{block.name.text}" if call.module else block.name.text
    builder = builder_of(scope, call.span)
    _check_callable(scope, call, block, shown)
    formals = [Formal(p.name.text, True, True, p.span) for p in block.tensors]
    formals += [Formal(p.name.text, False, p.default is None, p.span) for p in block.values]
    given = match_arguments(scope.report, call, formals, shown)
    arguments = []
    for parameter in block.tensors:
        (expr,), name = given[parameter.name.text], f"`{parameter.name.text}` of {shown}"
        arguments.append(_Argument(parameter, tensor(scope, expr, name), expr.span, shown))
    inner = Scope(scope.state, module)
    for value in block.values:
        if value.name.text in given:
            _bind_value(scope, inner, value, given[value.name.text][0], shown)
    _bind_dims(inner, block, arguments)
    for value in block.values:
        if value.name.text not in inner.names and value.default is not None:
            _bind_value(inner, inner, value, value.default, shown)
    _check_types(inner, arguments)
    tensors = [argument.tensor for argument in arguments]
    return _emit_call(scope, call, builder, _instantiate(inner, block, tensors, call.span, shown), tensors)


@dataclass(frozen=True, slots=True)
class _Argument:
    """A tensor that is given for a parameter of the block `shown`; `span` is where."""

    parameter: ast.TensorParam
    tensor: Tensor
    span: Span
    shown: str

    @property
    def name(self) -> str:
        """The parameter, in words."""
        return f"`{self.parameter.name.text}` of {self.shown}"

    def size(self, axis: int) -> str:
        """What stands at the place of the argument: `256 here (d_model, gpt.tfg:4)`."""
        return f"{self.tensor.type.shape[axis]} here{_from(self.tensor.origins[axis])}"

    @property
    def declared(self) -> Note:
        """What the block says of it."""
        return _declared(self.parameter)


def _declared(parameter: ast.TensorParam | ast.ValueParam) -> Note:
    return Note(f"declared as {parameter.type.span.text}", parameter.span)


def _from(origin: Origin | None) -> str:
    return "" if origin is None else f" ({origin})"


def _check_callable(scope: Scope, call: ast.Call, block: ast.BlockDecl, shown: str) -> None:
    if block.is_model:
        raise scope.report("FG240", f"{shown} is a model; only blocks can be called", call.function.span, "a model",
                           notes=(Note("declared here", block.name.span),),
                           help_=("make it a block, and a model that calls it",))  # fmt: skip
    opened = scope.state.open
    first = next((place for place, (_, each, _) in enumerate(opened) if each is block), None)
    if first is not None:
        cycle = " -> ".join([*(each.name.text for _, each, _ in opened[first:]), block.name.text])
        notes = [Note(f"{b.name.text} is called here", span) for _, b, span in opened[first + 1 :]]
        raise scope.report("FG220", f"block `{block.name.text}` calls itself: {cycle}", call.span, "closes the cycle",
                           notes=notes[-4:], help_=("use repeat for successive layers",))  # fmt: skip
    if len(opened) >= MAX_DEPTH:
        raise scope.report(
            "FG241", f"blocks call each other more than {MAX_DEPTH} deep", call.span, "one too deep"
        )


def _bind_value(outer: Scope, inner: Scope, parameter: ast.ValueParam, expr: ast.Expr, shown: str) -> None:
    name = parameter.name
    value = compile_time(outer, expr, f"`{name.text}` of {shown}")
    try:
        value = values.convert(value, parameter.type.name, parameter.type.optional)
    except ValueProblem as error:
        message = f"`{name.text}` of {shown}: {error.message}"
        raise outer.report(error.code, message, expr.span, f"{values.show(value)} here", notes=(_declared(parameter),),
                           help_=(error.help,)) from None  # fmt: skip
    origin = Origin(name.text, name.span)
    if isinstance(expr, ast.Ref) and outer is not inner:
        binding = outer.names.get(expr.name)
        origin = (binding and binding.origin) or origin
    inner.state.found(name.span, value)
    inner.names[name.text] = Binding(value, name.span, "value", origin)


# ---------------------------------------------------------------- dims of a signature


def _bind_dims(inner: Scope, block: ast.BlockDecl, arguments: Sequence[_Argument]) -> None:
    """Bind the names that stand alone as a dim of an argument; FG205 and FG209 where an argument is of another kind."""
    fixed = {p.name.text for p in block.values}
    bound_by: dict[str, _Argument] = {}
    for argument in arguments:
        _check_kind(inner, argument)
        for axis, expr in enumerate(argument.parameter.type.dims):
            if not isinstance(expr, ast.Ref) or expr.name in fixed:
                continue
            outer = inner.file.names.get(expr.name)
            if outer is not None and outer.kind == "param":
                continue
            size = values.normal(argument.tensor.type.shape[axis])
            bound = inner.names.get(expr.name)
            if bound is None:
                origin = argument.tensor.origins[axis] or Origin(expr.name, expr.span)
                inner.names[expr.name] = Binding(size, expr.span, "dim", origin)
                bound_by[expr.name] = argument
            elif bound.value != size:
                raise _differ(inner, expr.name, bound, bound_by[expr.name], argument, axis)


def _check_kind(scope: Scope, argument: _Argument) -> None:
    wanted, found = argument.parameter.type, argument.tensor.type
    if len(wanted.dims) != len(found.shape):
        message = f"{argument.name} has {len(wanted.dims)} dimensions, not {found}"
        raise scope.report("FG205", message, argument.span, f"{found} here", notes=(argument.declared,))
    if wanted.dtype != found.dtype:
        hint = "compare it, as in x != 0" if wanted.dtype == "bool" else f"convert it with {wanted.dtype}(x)"
        raise scope.report("FG209", f"{argument.name} is a tensor of {wanted.dtype}, not {found}", argument.span,
                           f"{found} here", notes=(argument.declared,), help_=(hint,))  # fmt: skip


def _differ(
    scope: Scope, name: str, bound: Binding, first: _Argument, argument: _Argument, axis: int
) -> Abort:
    message = (
        f"{name} of {argument.shown} is {bound.value} from {first.parameter.name.text}{_from(bound.origin)} "
        f"but {argument.tensor.type.shape[axis]} from {argument.parameter.name.text}"
    )
    note = Note(f"{name} is {bound.value} by this argument", first.span)
    return scope.report("FG210", message, argument.span, argument.size(axis), notes=(note, argument.declared))


def _check_types(inner: Scope, arguments: Sequence[_Argument]) -> None:
    """FG210 where a dim of an argument is not what the signature computes for it."""
    for argument in arguments:
        for axis, expr in enumerate(argument.parameter.type.dims):
            wanted, size = dimension(inner, expr), argument.tensor.type.shape[axis]
            if wanted != size:
                by = expr.span.text if isinstance(expr, ast.Literal) else f"{expr.span.text} = {wanted}"
                message = f"{argument.name} has {by} at axis {axis}, not {size}"
                notes = (argument.declared,)
                raise inner.report("FG210", message, argument.span, argument.size(axis), notes=notes)


# ---------------------------------------------------------------- instances


def _instantiate(
    inner: Scope, block: ast.BlockDecl, arguments: Sequence[Tensor], at: Span, shown: str
) -> Instance:
    """The graph of a block for these types and values, made where there is none yet."""
    state = inner.state
    settings = tuple(values.key(_known(inner, p.name.text)) for p in block.values)
    key = (id(block), tuple(a.type for a in arguments), settings)
    if key not in state.instances:
        state.open.append((inner.module, block, at))
        state.report.calls.append((shown, at))
        try:
            state.instances[key] = make_graph(inner, block, arguments)
        finally:
            state.open.pop()
            state.report.calls.pop()
    return state.instances[key]


def _known(scope: Scope, name: str) -> Constant:
    value = scope.names[name].value
    return value if isinstance(value, int | float | str | Dim | Several) else None


def make_graph(inner: Scope, block: ast.BlockDecl, arguments: Sequence[Tensor]) -> Instance:
    """Elaborate a block's body with its dims and values bound in `inner`; `arguments` give types and origins."""
    state = inner.state
    state.step(block.span, 5)  # a graph is more work than a statement
    shown = inner.module.qualified(block)
    name = state.graph_names.take(shown)
    weights = [s.name.text for s in ast.walk(block.body) if isinstance(s, ast.Weight | ast.Buffer)]
    builder = Builder(weights=weights)
    results = tuple([tensor_type(inner, result) for result in block.results])
    inner.builder = builder
    for parameter, argument in zip(block.tensors, arguments, strict=True):
        bind_input(inner, builder, parameter, argument)
    before = len(state.report.diagnostics)
    try:
        returned = run_body(inner, block.body)
        outputs = _outputs(inner, block, results, returned) if returned else None
    except Abort:
        return Instance(None, results)
    unsaid = len(state.report.diagnostics) == before
    if returned is None and unsaid:
        end = Span(block.span.source, block.span.end - 1, block.span.end)
        what = "model" if block.is_model else "block"
        inner.report("FG222", f"{what} `{block.name.text}` ends without a return", end, "reached here",
                     notes=(Note("its result is declared here", block.results[0].span),))  # fmt: skip
    if outputs is None or not unsaid:
        return Instance(None, results)
    state.graphs[name] = builder.graph(name, outputs, shown, block.span)
    return Instance(name, results)


def bind_input(scope: Scope, builder: Builder, parameter: ast.TensorParam, argument: Tensor) -> None:
    """An input of the graph for a tensor of its signature; `argument` gives type and origins."""
    value = builder.input(parameter.name.text, argument.type, argument.origins, parameter.span)
    origin = Origin(parameter.name.text, parameter.name.span)
    scope.state.found(parameter.name.span, value)
    scope.names[parameter.name.text] = Binding(value, parameter.name.span, "input", origin)


def _outputs(
    inner: Scope, block: ast.BlockDecl, results: Sequence[TensorType], returned: tuple[Value, ast.Return]
) -> list[str]:
    """The nodes that a body returns, checked against the declared types: FG224."""
    value, statement = returned
    found = value.items if isinstance(value, Several) else (value,)
    span = statement.value.span
    if len(found) != len(results):
        given = counted(len(found), "value")
        message = f"`{block.name.text}` returns {given}, not the declared {len(results)}"
        note = Note("declared here", block.results[0].span.to(block.results[-1].span))
        raise inner.report("FG224", message, span, f"{len(found)} here", notes=(note,))
    outputs = [as_tensor(inner, each, span, "a result") for each in found]
    for output, kind, written in zip(outputs, results, block.results, strict=True):
        if output.type != kind:
            message = f"`{block.name.text}` returns {output.type}, not the declared {kind}"
            label = f"{output.type} here{_from(_first_difference(output, kind))}"
            note = Note(f"declared as {written.span.text}", written.span)
            raise inner.report("FG224", message, span, label, notes=(note,))
    return [output.node for output in outputs]


def _first_difference(output: Tensor, kind: TensorType) -> Origin | None:
    if len(output.type.shape) != len(kind.shape):
        return None
    pairs = zip(output.type.shape, kind.shape, output.origins, strict=True)
    return next((origin for found, wanted, origin in pairs if found != wanted), None)


def _emit_call(
    scope: Scope, call: ast.Call, builder: Builder, instance: Instance, arguments: Sequence[Tensor]
) -> Value:
    label, results = _label(scope, call, builder), instance.results
    origins = [trace_origins(kind.shape, arguments) for kind in results]
    items = emit_several(
        scope, call.span, "call", arguments, results, origins, graph=instance.graph or "", label=label
    )
    return items[0] if len(items) == 1 else Several(tuple(items))


def _label(scope: Scope, call: ast.Call, builder: Builder) -> str:
    wanted = call.label or call.function
    if call.label and (wanted.text in builder.labels or wanted.text in builder.weights):
        taken = "a weight" if wanted.text in builder.weights else "another call"
        scope.report("FG228", f"the label `{wanted.text}` is taken by {taken}", wanted.span, "used again",
                     help_=("choose another label: paths are made of labels",))  # fmt: skip
    return builder.label(wanted.text)
