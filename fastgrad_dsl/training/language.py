"""Which specs are language models of a text, and their loss."""

from __future__ import annotations

from fastgrad_compiler.ir.graph import Program, TensorType
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.batches import model_inputs
from fastgrad_dsl.models.text_data import BYTES
from fastgrad_dsl.models.tokenizer import Tokenizer, check_size
from fastgrad_dsl.training.loop import Loss
from fastgrad_grammar.diagnostics import TfgError


def language_model_loss(compiled: Compiled, tokens: int, tokenizer: Tokenizer = BYTES) -> Loss:
    """The objective of a spec that maps int[b, n] to float[b, n, vocab], with a class for each of the tokenizer's ids.

    TfgError FG415 for any other spec, FG436 where a tokenizer has more ids.
    """
    program = compiled.program
    graph = program[program.main]
    problem = not_a_language_model(program, tokenizer)
    if problem is None and compiled.loss is not None:
        limit = token_limit(program)
        if limit is None or tokens <= limit:
            return compiled.loss
        problem = f"its sequences have at most {limit} tokens, not {tokens}"
    help_ = "a language model takes int[b, n], gives float[b, n, vocab] and has an objective(logits, targets)"
    if problem is None:
        problem = "the file has no objective"
        batch, result = graph.inputs[0].tensor.shape, graph.output_type
        shapes = f"logits: {result}, targets: int[{', '.join(map(str, batch))}]"
        help_ = f"add to the file: objective loss({shapes}) = cross_entropy(logits, targets)"
    said = f"model {program.name} cannot be trained on text: {problem}"
    raise TfgError.of("FG415", said, help_, span=graph.span)


def not_a_language_model(program: Program, tokenizer: Tokenizer) -> str | None:
    """Why a model does not learn a text, None where it may; TfgError FG436 where a tokenizer has more ids."""
    inputs, result = program[program.main].inputs, program[program.main].output_type
    if len(inputs) != 1 or inputs[0].tensor.dtype != "int" or len(inputs[0].tensor.shape) != 2:
        return "it does not take one int[b, n] of tokens"
    given = inputs[0].tensor.shape
    if not isinstance(result, TensorType) or result.shape[:2] != given or len(result.shape) != 3:
        return "it does not give float[b, n, vocab] for its tokens"
    (tokens,), known = model_inputs(program), result.shape[2].constant
    if known is None:
        return f"it has {result.shape[2]} classes, which is not one number"
    known = min(known, tokens.below) if tokens.ids else known
    if tokenizer.source is None and known < tokenizer.size:
        return f"it has {known} classes, fewer than the {tokenizer.size} values of a byte"
    check_size(tokenizer, known, program.name)
    return None


def token_limit(program: Program) -> int | None:
    """The most tokens of a sequence, None where the file sets no limit."""
    dim = program[program.main].inputs[0].tensor.shape[1]
    limits = [info.at_most for info in program.dims if dim.names == {info.name} and info.at_most is not None]
    return dim.constant if dim.constant is not None else min(limits, default=None)
