"""The sizes of a batch's run-time dims."""

from __future__ import annotations

from collections.abc import Mapping

from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_dsl.documents.plan import Dim, Plan
from fastgrad_grammar.diagnostics import TfgError, nearest

DEFAULT_LENGTH = 2048  # tokens of a batch whose size nobody gave


def batch_sizes(plan: Plan, given: Mapping[str, int]) -> dict[str, int]:
    """A size for every dim of a batch: what was given, else 1 for the first dim (the batch), else a usual length."""
    shapes = [parse_dim(dim) for tensor in (*plan.inputs, *plan.targets) for dim in tensor.shape]
    names = list(dict.fromkeys(name for dim in shapes for name in sorted(dim.names)))
    for name in given:
        if name not in names:
            near = nearest(name, names)
            help_ = (f"did you mean {near}?",) if near else (f"the model's dims are {', '.join(names)}",)
            raise TfgError.of("FG416", f"the model has no run-time dim {name}", *help_)
        if not isinstance(given[name], int) or given[name] < 1:
            raise TfgError.of("FG416", f"--dim {name}={given[name]}: a size is a whole number of at least 1")
    limits = {dim.name: dim for dim in plan.dims}
    sizes = {}
    for place, name in enumerate(names):
        limit = limits.get(name, Dim(name, None, 1))
        multiple = limit.multiple_of
        usual = 1 if place == 0 else min(DEFAULT_LENGTH, limit.at_most or DEFAULT_LENGTH)
        sizes[name] = given.get(name, max(usual // multiple, 1) * multiple)
        if sizes[name] > (limit.at_most or sizes[name]) or sizes[name] % multiple:
            declared = f"at most {limit.at_most}" + (f", a multiple of {multiple}" if multiple > 1 else "")
            raise TfgError.of("FG416", f"--dim {name}={sizes[name]}: the spec declares {name} {declared}")
    return sizes


def text_sizes(plan: Plan, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(rows, tokens) of a batch of text; TfgError FG415 where the model does not take bytes."""
    inputs = plan.inputs
    is_text = len(inputs) == 1 and inputs[0].dtype == "int" and len(inputs[0].shape) == 2
    if not is_text or inputs[0].below < 256:
        help_ = ("random inputs need no text, and a .safetensors file can hold batches",)
        raise TfgError.of("FG415", f"model {plan.model} does not take bytes of text", *help_)
    rows, tokens = (parse_dim(dim).evaluate(sizes) for dim in inputs[0].shape)
    return rows, tokens
