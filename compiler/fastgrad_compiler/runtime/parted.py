"""Heads in parts on several ranks: each rank works on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def is_parted(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank has a part."""
    return hasattr(x, "device_mesh")


def of_own_heads(work: Callable[..., Tensor], given: Sequence[Tensor | None]) -> Tensor:
    """work(this rank's parts), as the DTensor of all; whatever has heads is in parts along them, the rest whole."""
    from torch.distributed.tensor import DTensor

    first = given[0]
    assert isinstance(first, DTensor)
    own = [x.to_local() if isinstance(x, DTensor) else x for x in given]
    found: Tensor = DTensor.from_local(work(*own), first.device_mesh, first.placements, run_check=False)
    return found
