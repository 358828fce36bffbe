"""A whole step of a model as one C++ operation, for one new token of each sequence.

The library of a model and a variant (see `native`) registers

    fastgrad::NAME_VARIANT_run(addresses, batch, past, threads) -> bool

addresses: int64, of the weights, of the tensors of the state, which it brings up to date, of the inputs and of the
results. False where it has done nothing, because an input is not one that a step could serve.
"""

from __future__ import annotations

import math
from array import array
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
from .state import SHARED, State, Stepped

MOST = 16  # sequences; of more, PyTorch's products of matrices are faster
_DTYPES = {"sums": torch.float64, "log_gate": torch.float64, SHARED: torch.int64}  # else that of the model
_SERVED = (torch.float32, torch.float64)
_PLAIN = {Tensor, nn.Parameter}


class _Operations(NamedTuple):
    run: Callable[..., bool]


class _Weights(NamedTuple):
    """Where a model keeps its weights, and the blocks on the way, each with what should hold it."""

    places: list[tuple[dict[str, Any], str]]
    blocks: list[tuple[dict[str, Any], str, nn.Module]]


class StepKernel:
    """The kernel NAME.cpp, which lies beside the module of `spec`.

    weights, state: the tensors that it is given, (path, numbers); or (layers, tensors), in whose paths `{}` is the
    layer. Numbers of the state are those of each sequence, unless its path ends with `shared`. results: the shapes of
    the results for one sequence. drops: the model has dropout.
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
        self._sizes: dict[tuple[int, torch.dtype], tuple[list[int], list[torch.dtype]]] = {}
        self._found: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()

    def __call__(self, model: Stepped, state: State, tokens: int, *inputs: Tensor) -> list[Tensor] | None:
        """The results for one token of each sequence, whose state is brought up to date; None where it does not serve.

        state: one that `enter` was called on, for so many tokens.
        """
        if torch.compiler.is_compiling() or tokens != 1 or not self._serves(model, state):
            return None
        weights = self._weights_of(model)
        kept = [state.tensors[path] for path, _ in self._state if path in state.tensors]
        batch = inputs[0].shape[0]
        if weights is None or len(kept) < len(self._state) or batch > MOST:
            return None
        dtype = weights[0].dtype
        given = [x.contiguous() for x in inputs]
        tensors = [*weights, *kept, *given]
        if dtype not in _SERVED or not _fit(tensors, *self._expected(model, batch, dtype)):
            return None
        operations = self._library.of(dtype)
        if operations is None:
            return None
        results = [torch.empty((batch, *shape), dtype=dtype) for shape in self.results]
        addresses = torch.frombuffer(
            array("q", [x.data_ptr() for x in (*tensors, *results)]), dtype=torch.int64
        )
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

    def _expected(
        self, model: Stepped, batch: int, dtype: torch.dtype
    ) -> tuple[list[int], list[torch.dtype]]:
        """The numbers and dtypes of all weights, of what a state of so many sequences keeps, and of the inputs."""
        if (batch, dtype) in self._sizes:
            return self._sizes[batch, dtype]
        numbers, dtypes = [count for _, count in self._weights], [dtype] * len(self._weights)
        for path, count in self._state:
            last = path.rpartition(".")[2]
            numbers.append(count if last == SHARED else count * batch)
            dtypes.append(_DTYPES.get(last, dtype))
        for _, kind, shape in model.TOKENS:
            numbers.append(batch * math.prod(shape[1:]))
            dtypes.append(torch.int64 if kind == "int" else dtype)
        return self._sizes.setdefault((batch, dtype), (numbers, dtypes))

    # ------------------------------------------------------------ weights

    def _weights_of(self, model: nn.Module) -> list[Tensor] | None:
        """The weights as they are now, None where the kernel cannot read them or would pass a block by."""
        known = self._found.get(model)
        if known is None or any(holder.get(name) is not block for holder, name, block in known.blocks):
            known = _found(model, self._weights)
            if known is None:
                return None
            self._found[model] = known
        places, blocks = known
        if any(block._forward_hooks or block._forward_pre_hooks for *_, block in blocks):
            return None
        weights = [holder[name] for holder, name in places if holder.get(name) is not None]
        return weights if len(weights) == len(places) else None


def _fit(tensors: list[Any], numbers: list[int], dtypes: list[torch.dtype]) -> bool:
    """Whether they are plain tensors of these sizes and dtypes, as they should lie in memory."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and [x.dtype for x in tensors] == dtypes
        and [*map(Tensor.numel, tensors)] == numbers
        and all(map(Tensor.is_contiguous, tensors))
        and all([x.is_cpu for x in tensors])
    )


def _expanded(tensors: tuple[Any, ...], *layers: int) -> Iterator[tuple[str, int]]:
    """(path, numbers) of each tensor."""
    for what, of in tensors:
        if isinstance(what, str):
            yield what.format(*layers), of
        else:
            for layer in what:
                yield from _expanded(of, *layers, layer)


def _found(model: nn.Module, weights: list[tuple[str, int]]) -> _Weights | None:
    """Where weights are, None where one is not there, or is in a block of another's making."""
    ours = (__package__, nn.ModuleList.__module__.rpartition(".")[0])
    places: list[tuple[dict[str, Any], str]] = []
    blocks: dict[str, tuple[dict[str, Any], str, nn.Module]] = {}
    for path, _ in weights:
        block, passed = model, ""
        *labels, last = path.split(".")
        for label in labels:
            passed += f".{label}"
            child = block._modules.get(label)
            if child is None or type(child).__module__.rpartition(".")[0] not in ours:
                return None
            blocks[passed] = (block._modules, label, child)
            block = child
        places.append((block._parameters if last in block._parameters else block._buffers, last))
    return _Weights(places, list(blocks.values()))


def _warn(reason: str) -> None:
    warn_once("native_warning", f"steps run without native kernels, and slower: {reason}", RuntimeWarning)
