"""A whole step of a model as one C++ operation, for one new token of each sequence.

The library of a model and a variant (see `native`) registers

    fastgrad::NAME_VARIANT_run(addresses, batch, past, threads) -> bool

addresses: int64, of the weights, of the tensors of the state, which it brings up to date, of the inputs and of the
results. False where it has done nothing, because an input is not one that a step could serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .native import Library, enabled
from .private_files import warn_once
from .softmax_pairs import is_mapped
from .state import SHARED, State

MOST = 16  # sequences; of more, PyTorch's products of matrices are faster
_DTYPES = {"sums": torch.float64, "log_gate": torch.float64, SHARED: torch.int64}  # else that of the model
_PLAIN = (Tensor, nn.Parameter)


class _Operations(NamedTuple):
    run: Callable[..., bool]


class _Weights(NamedTuple):
    """Where a model keeps its weights, and the blocks on the way, each with what should hold it."""

    places: list[tuple[dict[str, Any], str, int]]
    blocks: list[tuple[dict[str, Any], str, nn.Module]]


class StepKernel:
    """The kernel NAME.cpp, which lies beside the module of `spec`.

    weights, state: the tensors that it is given, (path, numbers); or (first, last, tensors) of the layers first to
    last - 1, in whose paths `{}` is the layer. Numbers of the state are those of each sequence, unless its path ends
    with `shared`. results: the shapes of the results for one sequence. drops: the model has dropout.
    """

    def __init__(
        self,
        name: str,
        spec: ModuleSpec | None,
        *,
        weights: tuple[Any, ...],
        state: tuple[Any, ...],
        results: tuple[tuple[int, ...], ...],
        drops: bool = False,
    ) -> None:
        self.results, self._drops = results, drops
        self._weights, self._state = list(_expanded(weights)), list(_expanded(state))
        self._library = Library(name, spec, _Operations, _warn)
        self._found: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, state: State, *inputs: Tensor) -> list[Tensor] | None:
        """The results for one token of each sequence, whose state is brought up to date; None where it does not serve.

        state: one that `enter` was called on.
        """
        if torch.compiler.is_compiling() or inputs[0].shape[1] != 1 or not self._serves(model, state):
            return None
        weights = self._weights_of(model)
        if weights is None:
            return None
        batch, dtype = inputs[0].shape[0], weights[0].dtype
        kept = [state.tensors.get(path) for path, _ in self._state]
        tensors = [*weights, *self._fitting(kept, batch, dtype), *(x.contiguous() for x in inputs)]
        if len(tensors) < len(weights) + len(kept) + len(inputs) or batch > MOST:
            return None
        for x in inputs:
            if type(x) not in _PLAIN or x.dtype not in (torch.int64, dtype) or not x.is_cpu:
                return None
        operations = self._library.of(dtype)
        if operations is None:
            return None
        results = [torch.empty((batch, *shape), dtype=dtype) for shape in self.results]
        addresses = torch.tensor([x.data_ptr() for x in (*tensors, *results)])
        done = operations.run(addresses, batch, state.known_past, torch.get_num_threads())
        return results if done else None

    def _serves(self, model: nn.Module, state: State) -> bool:
        """Whether nothing is at work that must see the operations of a step."""
        if state.known is None or state.starting or state.pieces is not None or not enabled():
            return False
        if (self._drops and model.training) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        return not modes and forward_ad._current_level < 0 and not is_mapped()

    def _fitting(self, kept: list[Tensor | None], batch: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Those of a state that are what the kernel takes."""
        for (path, count), x in zip(self._state, kept, strict=True):
            last = path.rpartition(".")[2]
            numbers = count if last == SHARED else count * batch
            if x is not None and _fits(x, numbers, _DTYPES.get(last, dtype)):
                yield x

    # ------------------------------------------------------------ weights

    def _weights_of(self, model: nn.Module) -> list[Tensor] | None:
        """The weights as they are now, None where the kernel cannot read them or would pass a block by."""
        if model not in self._found:
            self._found[model] = _found(model, self._weights)
        places, blocks = self._found[model]
        for holder, name, block in blocks:
            if holder.get(name) is not block or block._forward_hooks or block._forward_pre_hooks:
                return None
        weights: list[Tensor] = []
        for holder, name, count in places:
            x = holder.get(name)
            if not isinstance(x, Tensor) or not _fits(x, count, x.dtype if not weights else weights[0].dtype):
                return None
            weights.append(x)
        return weights or None


def _fits(x: Tensor, count: int, dtype: torch.dtype) -> bool:
    plain = type(x) in _PLAIN and x.is_cpu
    return plain and x.dtype == dtype and x.numel() == count and x.is_contiguous()


def _expanded(tensors: tuple[Any, ...], *layers: int) -> Iterator[tuple[str, int]]:
    """(path, numbers) of each tensor."""
    for each in tensors:
        if len(each) == 2:
            yield each[0].format(*layers), each[1]
        else:
            for layer in range(each[0], each[1]):
                yield from _expanded(each[2], *layers, layer)


def _found(model: nn.Module, weights: list[tuple[str, int]]) -> _Weights:
    """Where weights are; one that is not there is found nowhere."""
    places: list[tuple[dict[str, Any], str, int]] = []
    blocks: dict[str, tuple[dict[str, Any], str, nn.Module]] = {}
    for path, count in weights:
        block, passed = model, ""
        *labels, last = path.split(".")
        for label in labels:
            passed += f".{label}"
            child = block._modules.get(label)
            if child is None:
                return _Weights([({}, path, count)], [])
            blocks[passed] = (block._modules, label, child)
            block = child
        places.append((block._parameters if last in block._parameters else block._buffers, last, count))
    return _Weights(places, list(blocks.values()))


def _warn(reason: str) -> None:
    warn_once("native_warning", f"steps run without native kernels, and slower: {reason}", RuntimeWarning)
