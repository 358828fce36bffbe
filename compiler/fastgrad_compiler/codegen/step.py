"""The methods of generated classes that run their step form on the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastgrad_compiler.codegen.block import Block, Module, place_of
from fastgrad_compiler.codegen.cpp.step_kernel import StepKernel, emit_step
from fastgrad_compiler.codegen.kernel import RUNTIME
from fastgrad_compiler.codegen.liveness import FOREVER
from fastgrad_compiler.codegen.members import Member
from fastgrad_compiler.codegen.names import variable
from fastgrad_compiler.codegen.writer import LINE_LENGTH, Expr, Writer, call, literal, noun, tuple_text
from fastgrad_compiler.ir.calls import reachable
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, step_form
from fastgrad_compiler.ir.text import print_graph
from fastgrad_compiler.runtime.content_name import content_name

REMARKS = frozenset(("asserted", "proof", "source", "why"))
BASE, STATE, SCOPE = "Stepped", "State", "Scope"  # of runtime/state.py
KERNEL = "StepKernel"  # of runtime/step_kernel.py
KERNEL_FILES = ("content_name.py", "native.py", "private_files.py", "step_kernel.py")


def has_step(module: Module, graph: Graph) -> bool:
    """Whether a class has a step form of its own."""
    return step_form(graph.name) in module.program.by_name


def write_step(module: Module, graph: Graph, writer: Writer, found: dict[str, Member]) -> None:
    """The method `step` of a block."""
    form = module.program[step_form(graph.name)]
    module.imports.steps.add(SCOPE)
    block = Block(module, form, writer, found)
    needed = module.needs[form.name]
    typed = [f"{name}: Tensor" for name in block.bind_inputs()]
    typed += [f"state: {SCOPE}", *(f"{variable(name)}: int" for name in needed.extra)]
    typed += ["like: Tensor"] if needed.like else []
    count = _results(graph)
    result = "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"
    writer.line()
    writer.statement("def ", call("step", "self", *typed), f" -> {result}:")
    with writer.indented():
        block.name_dims(needed.dims)
        for node in form.inputs:
            block.read_dims(node, needed.dims)
        block.write_function()


# ---------------------------------------------------------------- the model


def write_step_values(module: Module, graph: Graph, writer: Writer) -> None:
    """What the base class reads: a hash of the step form, and the inputs: name, dtype and shape, a token's extent 1."""
    module.imports.steps |= {BASE, STATE}
    tokens, fixed = _inputs(module, graph)
    if module.imports.backends.cpp:
        module.imports.step_kernel = emit_step(module.program, module.exact, module.guards)
    writer.statement("STEP = ", literal(_digest(module)))
    for name, nodes in (("TOKENS", tokens), ("FIXED", fixed)):
        along = module.program.along if nodes is tokens else None
        entries = [_described(node, along) for node in nodes]
        if entries:
            writer.names(
                f"{name}: ClassVar[tuple[object, ...]] = ", entries, "(", ",)" if len(entries) == 1 else ")"
            )
    if module.imports.step_kernel is not None:
        _write_kernel(module.imports.step_kernel, writer)
    writer.line()


def write_model_step(module: Module, graph: Graph, writer: Writer, found: dict[str, Member]) -> None:
    """The method `step` of the model, whose fixed inputs the first call alone is given."""
    form = module.program[step_form(graph.name)]
    tokens, fixed = _inputs(module, form)
    block = Block(module, form, writer, found)
    needed = module.needs[form.name]
    late = [node.name for node in fixed]
    names = dict(zip((node.name for node in form.inputs), block.bind_inputs(late), strict=True))
    typed = [*(f"{names[node.name]}: Tensor" for node in tokens), f"state: {STATE}"]
    typed += ["*fixed: Tensor"] if fixed else []
    types = ["Tensor"] * _results(graph)
    writer.line()
    writer.line("@torch.no_grad()")
    writer.statement("def ", call("step", "self", *typed), f" -> tuple[{', '.join(types)}, {STATE}]:")
    with writer.indented():
        said = " `start` gives what is the same in every call." if fixed else ""
        writer.docstring(
            f"The results for the next tokens, and the state, which is brought up to date in place.{said}"
        )
        _enter(module, block, writer, tokens, needed.dims)
        _whole_step(module, block, writer, [names[node.name] for node in tokens])
        block.fixed = [names[node.name] for node in fixed]
        if needed.makes and block.template is None:
            writer.line("like = state.like")
        block.write()
        # results may be calls that read the position: they come first, from left to right
        end = f"state.advance({block.dims[str(module.program.along)]})"
        results = block.results()
        if writer.column + len(f"return {', '.join(map(str, results))}, {end}") > LINE_LENGTH:
            named = zip(form.outputs, results, strict=True)
            results = [
                value if value.is_name else block.bind(value, noun(form[name])) for name, value in named
            ]
        writer.line(f"return {', '.join(map(str, results))}, {end}")


def _write_kernel(kernel: StepKernel, writer: Writer) -> None:
    """The kernel of the whole step, and the tensors that it is given."""
    writer.line(f"KERNEL = {KERNEL}(")
    with writer.indented():
        writer.line(f'"{step_kernel_name(kernel)}",')
        writer.line("__spec__,")
        for name in ("weights", "state", "results"):
            writer.tuples(f"{name}=", getattr(kernel, name))
        if kernel.drops:
            writer.line("drops=True,")
    writer.line(")")


def step_kernel_name(kernel: StepKernel) -> str:
    """Of its file and operation: a hash of its content and of the files of `runtime` that it needs."""
    contents = [(RUNTIME / name).read_bytes() for name in KERNEL_FILES]
    return content_name("step", [kernel.text.encode(), *contents])


def _whole_step(module: Module, block: Block, writer: Writer, tokens: Sequence[str]) -> None:
    """The call of the kernel of the whole step, where the model has one."""
    kernel = module.imports.step_kernel
    if kernel is None:
        return
    found = block.allocate("found", FOREVER)
    writer.comment("one token of each sequence, by one kernel where it can be had")
    writer.line(
        f"{found} = {call('self.KERNEL', 'self', 'state', block.dims[str(module.program.along)], *tokens)}"
    )
    writer.line(f"if {found} is not None:")
    with writer.indented():
        results = ", ".join(f"{found}[{i}]" for i, _ in enumerate(kernel.results))
        writer.line(f"return {results}, state.advance(1)")


def _inputs(module: Module, graph: Graph) -> tuple[list[Node], list[Node]]:
    """The inputs that are tokens, and the others."""
    tokens = [node for node in graph.inputs if module.is_token(node)]
    return tokens, [node for node in graph.inputs if node not in tokens]


def _results(graph: Graph) -> int:
    outputs = graph.output_type
    return len(outputs) if isinstance(outputs, tuple) else 1


def _digest(module: Module) -> str:
    """A hash of all that decides what a state means."""
    program = module.program
    graphs = [
        replace(graph, span=None, nodes=tuple(map(_meaning, graph.nodes)))
        for graph in reachable(program.by_name, [str(program.step)])
    ]
    texts = [program.name, str(module.exact), *map(print_graph, graphs)]
    return content_name("step", [text.encode() for text in texts])


def _meaning(node: Node) -> Node:
    """A node without what is said about it, which names files and places."""
    kept = tuple((key, value) for key, value in node.attributes if key not in REMARKS)
    return replace(node, span=None, bound=None, attributes=kept)


def _described(node: Node, along: str | None) -> str:
    sizes = [_size(dim.substitute({along: 1}) if along else dim) for dim in node.tensor.shape]
    return tuple_text((literal(node.name), literal(node.tensor.dtype), tuple_text(sizes)))


def _size(dim: Dim) -> Expr:
    return literal(str(dim) if dim.constant is None else dim.constant)


def _enter(
    module: Module, block: Block, writer: Writer, tokens: Sequence[Node], wanted: Sequence[str]
) -> None:
    """Shapes of the new tokens, and that the state is this model's."""
    along = str(module.program.along)
    shown = {name for node in tokens for dim in node.tensor.shape for name in dim.names}
    dims = sorted({*wanted, along} & shown)
    block.name_dims(sorted({*wanted, along}))
    known: set[str] = set()
    check = block.helper("check_shape")
    for node in tokens:
        sizes = [block.dim(d) if d.names <= known else literal(str(d)) for d in node.tensor.shape]
        writer.statement("", call(check, literal(node.name), block.values[node.name], tuple_text(sizes)))
        known.update(block.read_dims(node, dims, tokens))
    for name in sorted(set(wanted) - shown - {along}):
        writer.line(f"{block.dims[name]} = state.sizes[{literal(name)}]")
    info = next((dim for dim in module.program.dims if dim.name == along), None)
    if info is not None and info.at_most is not None and info.span is not None:
        writer.comment(f"{place_of(info.span)}: {info.span.text.strip()}")
    first = tokens[0]
    batch = f"{block.values[first.name]}.shape[0]" if module.has_batch(first) else None
    at_most = None if info is None else info.at_most
    writer.statement("", call("state.enter", "self.STEP", block.dims[along], batch=batch, at_most=at_most))
