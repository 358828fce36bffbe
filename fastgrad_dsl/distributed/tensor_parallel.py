"""Heads and hidden widths in parts: the styles of a plan for PyTorch's `parallelize_module`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from fastgrad_compiler.analysis.widths import Parts


# what PyTorch has no rule for: entry by entry, whatever the dim that is in parts; `buffer` is empty on a GPU
@register_sharding(torch.ops.aten.log_sigmoid_backward.default)  # type: ignore[untyped-decorator]
def _log_sigmoid_backward(gradient: Any, x: Any, buffer: Any) -> list[tuple[list[Any], list[Any]]]:
    alike = len(buffer.shape) == len(x.shape)
    parted = [Shard(dim) for dim in range(len(x.shape))]
    return [([each], [each, each, each if alike else Replicate()]) for each in (Replicate(), *parted)]


@dataclass
class Divided(ParallelStyle):
    """A block of which each rank has some heads, or entries of the hidden width; it takes and gives whole tensors.

    `parallelize_module` raises ValueError where the ranks cannot have as many each.
    """

    parts: Parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        size = device_mesh.size()
        if self.parts.units % size:
            raise ValueError(f"{self.parts.units} heads or entries cannot be divided among {size} ranks")
        for path, child in module.named_modules():
            for name, weight in list(child.named_parameters(recurse=False)):
                dim = self.parts.dims.get(f"{path}.{name}" if path else name)
                placements = [Replicate() if dim is None else Shard(dim)]
                parted = distribute_tensor(weight.detach(), device_mesh, placements, src_data_rank=None)
                child.register_parameter(name, nn.Parameter(parted, requires_grad=weight.requires_grad))
        for name in ("forward", "step"):
            if hasattr(module, name):
                setattr(module, name, _whole(getattr(module, name), device_mesh))
        return module


def _whole(forward: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """A forward of whole tensors, whose parts are on the ranks of a mesh."""

    @wraps(forward)
    def run(*given: Any) -> Any:
        inputs = [_entering(x, mesh) for x in given]
        found = forward(*inputs)
        return _leaving(found) if isinstance(found, Tensor) else tuple(map(_leaving, found))

    return run


def _entering(x: Any, mesh: DeviceMesh) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, DTensor):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _leaving(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    found: Tensor = x.redistribute(placements=[Replicate()]).to_local()
    return found.clone()  # no view, of which FSDP warns, nor a tensor that is still being sent
