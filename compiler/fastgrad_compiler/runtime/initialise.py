"""Initial values of tensors: each rule fills one in place, from a generator where it draws numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from .pieces import serving


@torch.no_grad()
def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Normal values."""
    return tensor.normal_(mean, std, generator=generator)


@torch.no_grad()
def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Normal values within two standard deviations of the mean."""
    low, high = mean - 2 * std, mean + 2 * std
    return torch.nn.init.trunc_normal_(tensor, mean, std, low, high, generator=generator)


@torch.no_grad()
def xavier_(tensor: Tensor, gain: float = 1.0, *, generator: Generator | None = None) -> Tensor:
    """Uniform within gain * sqrt(6 / (in + out)), for a weight [.., in, out]; a vector counts as [1, out]."""
    fans = [1, 1, *tensor.shape][-2:]
    limit = gain * math.sqrt(6 / sum(fans))
    return tensor.uniform_(-limit, limit, generator=generator)


@torch.no_grad()
def linspace_(tensor: Tensor, first: float, last: float, *, generator: Generator | None = None) -> Tensor:
    """Evenly spaced from `first` to `last` along the last dim, which has `first` alone where it is of size 1."""
    return tensor.copy_(torch.linspace(first, last, tensor.shape[-1], device=tensor.device))


@torch.no_grad()
def zeros_(tensor: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Zeros."""
    return tensor.zero_()


@torch.no_grad()
def ones_(tensor: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Ones."""
    return tensor.fill_(1)


@torch.no_grad()
def constant_(tensor: Tensor, value: float, *, generator: Generator | None = None) -> Tensor:
    """One value everywhere."""
    return tensor.fill_(value)


INITIALISERS: dict[str, Callable[..., Tensor]] = {
    "normal": normal_,
    "trunc_normal": trunc_normal_,
    "xavier": xavier_,
    "linspace": linspace_,
    "zeros": zeros_,
    "ones": ones_,
    "constant": constant_,
}
"""The rules by the first member of a weight's `init`; the other members are the positional arguments."""


class Generated(nn.Module):
    """The base of a generated model: its tensors can be made again where it was built without memory for them."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As that of nn.Module; where the sequences are in pieces on several ranks, `forward` is run on this one's."""
        if torch.compiler.is_compiling() or (pieces := serving()) is None or "forward" in self.__dict__:
            return super().__call__(*given, **named)
        self.__dict__["forward"] = partial(pieces.run, self)
        try:
            return super().__call__(*given, **named)
        finally:
            del self.__dict__["forward"]

    def blocks(self) -> list[nn.Module]:
        """The blocks that the model repeats, in order; those within another are parts of that one."""
        return list(_repeated(self, within=False))

    def reset_parameters(self, seed: int = 0) -> None:
        """Give every tensor the value that it has in a model made with `seed`."""
        initialise(self, seed)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As PyTorch's, but nothing is left to chance: constants have their values, weights are NaN.

        Until `reset_parameters` or `load_state_dict`. Whole numbers and truth values start as those of seed 0.
        """
        super().to_empty(device=device, recurse=recurse)
        _restore_constants(self)
        _visit(self, torch.Generator(device="cpu").manual_seed(0), None, _blank)
        return self


def _repeated(module: nn.Module, *, within: bool) -> Iterator[nn.Module]:
    """What lists below a module hold; `within`: the module is a list, or in one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _repeated(child, within=True)
        elif within:
            yield child
        else:
            yield from _repeated(child, within=False)


def initialise(model: nn.Module, seed: int = 0) -> None:
    """Give every tensor of a generated model its initial value, in place, constants of its text too.

    One generator, seeded once, serves what a module holds itself, in the order of its INIT, then its children. Values
    are drawn in float32 on the CPU, so that every dtype, device and sharding starts from the same ones. What is on the
    device "meta" stays without values.
    """
    _restore_constants(model)
    _visit(model, torch.Generator(device="cpu").manual_seed(seed), None, draw)


Rule = tuple[str | float, ...]


def _visit(
    module: nn.Module,
    generator: Generator,
    rule: Rule | None,
    fill: Callable[[Tensor, Rule | None, Generator], None],
) -> None:
    """fill(tensor, rule, generator) for what has a rule; `rule` is what a list takes from its owner's class."""
    rules = getattr(module, "INIT", {})
    constants = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in constants}
    own = dict(module.named_parameters(recurse=False)) | buffers
    for name in [*(label for label in rules if label in own), *(name for name in own if name not in rules)]:
        fill(own[name], rules.get(name, rule), generator)
    for name, child in module.named_children():
        _visit(child, generator, rules.get(name, rule), fill)


@torch.no_grad()
def draw(tensor: Tensor, rule: Rule | None, generator: Generator) -> None:
    """Fill a tensor by a rule (name, argument...) of INITIALISERS; TypeError where it has none."""
    if rule is None:
        raise TypeError(f"no initial value is known for a tensor of shape {list(tensor.shape)}")
    if tensor.is_meta:
        return
    kind, *arguments = rule
    whole = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    _copy(tensor, INITIALISERS[str(kind)](whole, *arguments, generator=generator))


@torch.no_grad()
def _blank(tensor: Tensor, rule: Rule | None, generator: Generator) -> None:
    if tensor.is_floating_point():
        tensor.fill_(math.nan)
    else:
        draw(tensor, rule, generator)


def _copy(tensor: Tensor, whole: Tensor) -> None:
    """Into a tensor of one device, or of FSDP, of which every process has a part."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        # every process has drawn the same, and keeps its part: nothing is sent
        whole = distribute_tensor(whole.to(tensor.device), mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


@torch.no_grad()
def _restore_constants(model: nn.Module) -> None:
    """Buffers outside of the state_dict have the values of the text, which a new module has."""
    kept = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    ]
    if not kept or model.get_buffer(kept[0]).is_meta:
        return
    root = hasattr(model, "reset_parameters")  # of this package or another's copy of this file
    with torch.device("cpu"):
        other = type(model)(None) if root else type(model)()
    for name in kept:
        _copy(model.get_buffer(name), other.get_buffer(name))
