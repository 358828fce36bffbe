"""Weights in parts: each rank keeps its share of every block, and has a block whole only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastgrad_compiler.runtime.pieces import serving


def shard_model(
    model: nn.Module, mesh: DeviceMesh, *, bfloat16: bool = False, recompute: bool = False
) -> nn.Module:
    """Shard a generated model in place over a mesh of one dimension, by its `blocks()`, with PyTorch's `fully_shard`.

    bfloat16: what runs is in bfloat16; weights, gradients and what the optimiser keeps stay as they are. A model on the
    device "meta" gets memory for its shards alone, and no values: `reset_parameters` gives those of one machine.

    recompute: each block keeps what it is given and nothing else, and runs again in the backward pass, where it also
    sends again what it sent; gradients are the same.

    Raises ValueError for a mesh of several dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"shard_model takes one dimension of a mesh, such as mesh['data'], not {mesh.ndim}")
    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks: Sequence[nn.Module] = model.blocks()  # type: ignore[operator]
    for block in blocks:
        if recompute:
            _run_again(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if hasattr(block, "step"):
            register_fsdp_forward_method(block, "step")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        model.to_empty(device=mesh.device_type)
    return model


def _run_again(block: nn.Module) -> None:
    """Have the methods of a block keep their inputs alone."""
    for name in ("forward", "step"):
        if hasattr(block, name):
            setattr(block, name, _made_again(getattr(block, name)))


def _made_again(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def kept(*given: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*given)
        pieces: Any = serving()
        layout = getattr(pieces, "layout", None)

        def again(*given: Any) -> Any:
            with _laid_out_as(pieces, layout):
                return run(*given)

        with set_checkpoint_early_stop(
            False
        ):  # all ranks make all exchanges again, whatever each of them needs
            return checkpoint(again, *given, use_reentrant=False)

    return kept


@contextmanager
def _laid_out_as(pieces: Any, layout: Any) -> Iterator[None]:
    """With the pieces where they were when the block ran first: another model may have run since."""
    if layout is None:
        yield
        return
    before, pieces.layout = pieces.layout, layout
    try:
        yield
    finally:
        pieces.layout = before


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as `like` is: whole or in parts. Nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    parts: Tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return parts


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts, which every rank has to ask for."""
    found: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    result: Tensor = found
    return result


def gathered(tensor: Tensor, *, keep: bool) -> Tensor:
    """As `whole`, on the CPU; without elements on ranks that do not `keep` it."""
    found = whole(tensor.detach())
    return found.cpu() if keep else found.new_empty(0)
