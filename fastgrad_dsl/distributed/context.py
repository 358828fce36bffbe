"""`context_parallel`: generated models run on the piece of each sequence that this rank holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgrad_compiler.runtime.attention_op import Inputs
from fastgrad_compiler.runtime.pieces import serve, serving
from fastgrad_compiler.runtime.state import LIKE, State
from fastgrad_compiler.runtime.step_tokens import Rule
from fastgrad_dsl.distributed.attention import Whole, attention_of_piece
from fastgrad_dsl.distributed.exchange import Layout, sum_of_shares, tokens_from
from fastgrad_grammar.diagnostics import TfgError


@contextmanager
def context_parallel(mesh: DeviceMesh) -> Iterator[None]:
    """Within it each rank of a mesh of one dimension holds a contiguous piece of every sequence, in the order of ranks.

    Around forward and backward passes of generated models: their results are those of this rank's tokens, and the
    gradients of weights this rank's share, whose sum over the ranks is that of the whole. Pieces may differ in length.
    Every rank runs the same models in the same order. What torch.compile made runs without it.

    Raises ValueError for a mesh of several dimensions, or within another context.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"context_parallel takes one dimension of a mesh, such as mesh['context'], not {mesh.ndim}"
        )
    if serving() is not None:
        raise ValueError("context_parallel is within another one")
    serve(_Pieces(mesh.get_group()))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        serve(None)


def shard_sequence(tensors: Tensor | Sequence[Tensor], mesh: DeviceMesh, axis: int = 1) -> Any:
    """This rank's piece of whole sequences, that of tensors along an axis: n tokens in pieces of n / ranks, rounded.

    The first pieces are one token longer where ranks do not divide n. Raises ValueError for fewer tokens than ranks.
    """
    if isinstance(tensors, Tensor):
        count, rank, tokens = mesh.size(), mesh.get_local_rank(), tensors.shape[axis]
        if tokens < count:
            raise ValueError(
                f"{tokens} tokens are too few for {count} ranks, of which each needs one at least"
            )
        return tensors.tensor_split(count, axis)[rank].contiguous()
    return tuple(shard_sequence(each, mesh, axis) for each in tensors)


def mean_over_tokens(mean: Tensor, tokens: int) -> Tensor:
    """The mean over the tokens of all ranks, from the mean over `tokens` of this one's; itself outside of a context.

    The same on every rank; its gradient is that of this rank's share.
    """
    pieces = serving()
    if not isinstance(pieces, _Pieces):
        return mean
    total = torch.tensor([tokens], dtype=torch.int64, device=mean.device)
    dist.all_reduce(total, group=pieces.group)
    return sum_of_shares(mean * (tokens / total.item()), pieces.group)


class _Pieces:
    """The pieces of the sequences of a group; `layout` is that of the model that runs."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.layout = Layout((0,) * dist.get_world_size(group), dist.get_rank(group), group)

    def run(self, model: nn.Module, *given: Any, **named: Any) -> Any:
        """What `forward` of a generated model gives for this rank's piece."""
        kind: Any = type(model)
        if not hasattr(kind, "STEP"):
            message = f"model {kind.__name__} has no step form, and so it cannot run on a piece of a sequence"
            raise TfgError.of("FG502", message, "`compiled.stepped()` says which operation is in the way")
        inputs = inspect.signature(kind.forward).bind(model, *given, **named).arguments
        tokens = [inputs[name] for name, *_ in kind.TOKENS]
        fixed = [inputs[name] for name, *_ in kind.FIXED]
        state = _PieceState(self, kind, tokens[0].device, _like(model, tokens), _sizes(kind, fixed))
        if any(x.numel() == 0 for x in tokens):
            state.enter(kind.STEP, 0)  # the other ranks wait for this one's length
        *results, _ = kind.step.__wrapped__(model, *tokens, state, *fixed)
        return results[0] if len(results) == 1 else tuple(results)

    def before(self, x: Tensor, axis: int, count: int) -> Tensor:
        """The last `count` tokens before this piece along an axis, zeros where there are fewer."""
        found = tokens_from(x, axis, self.layout.since(count), self.layout)
        missing = list(x.shape)
        missing[axis] = count - found.shape[axis]
        return torch.cat((x.new_zeros(missing), found), axis)

    def attention(self, inputs: Inputs, rule: Rule, whole: Whole | None, guard: str) -> Tensor:
        """The causal attention of this piece's tokens to all before them."""
        return attention_of_piece(inputs, rule, whole, guard, self.layout)


class _PieceState(State):
    """The state of a step form that runs on a piece, which begins where the pieces of earlier ranks end."""

    def __init__(
        self, pieces: _Pieces, kind: Any, device: torch.device, like: torch.dtype, sizes: dict[str, int]
    ) -> None:
        position = torch.zeros((), dtype=torch.int64, device=device)
        super().__init__(kind.STEP, position, {LIKE: torch.zeros((), dtype=like, device=device)}, 0, sizes)
        self.served, self.pieces, self.starting = pieces, pieces, True

    def enter(self, model: str, tokens: int, *, batch: int | None = None, at_most: int | None = None) -> None:
        """Find where the piece begins. ValueError where there is none, or sequences are longer than declared."""
        group = self.served.group
        own = torch.tensor([tokens, -1 if batch is None else batch], device=self.position.device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, own, group=group)
        lengths, batches = zip(*(each.tolist() for each in found), strict=True)
        if min(lengths) < 1:
            raise ValueError("a rank has no token of the sequence, but each needs one at least")
        if len(set(batches)) > 1:
            raise ValueError(f"the ranks have pieces of different numbers of sequences: {list(batches)}")
        if at_most is not None and sum(lengths) > at_most:
            raise ValueError(f"{sum(lengths)} tokens, but the model is declared for at most {at_most}")
        layout = Layout(lengths, dist.get_rank(group), group)
        self.served.layout, self.known = layout, layout.offset
        self.position.fill_(layout.offset)

    def advance(self, tokens: int) -> State:
        """Nothing goes on after a piece."""
        return self


def _like(model: nn.Module, tokens: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a model."""
    floats = (x.dtype for x in (*model.parameters(), *model.buffers(), *tokens) if x.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _sizes(kind: Any, fixed: Sequence[Tensor]) -> dict[str, int]:
    """The run-time dims of the inputs that are the same for all tokens."""
    pairs = zip(kind.FIXED, fixed, strict=True)
    named = ((name, size) for (_, _, shape), x in pairs for name, size in zip(shape, x.shape, strict=True))
    return {name: size for name, size in named if isinstance(name, str)}
