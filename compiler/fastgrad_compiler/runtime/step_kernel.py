"""A whole step of a model as one C++ operation, for one new token of each sequence.

The library of a model and a variant (see `native`) registers

    fastgrad::NAME_VARIANT_run(addresses, batch, past, room, threads) -> bool

addresses: int64, of the weights, of the tensors of the state, which it brings up to date, of the inputs and of the
results. room: the tokens for which caches have room, more than `past`. False where it has done nothing, because an
input is not one that a step could serve.
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
from torch.nn.modules import module as hooks

from .native import Library, enabled
from .private_files import warn_once
from .state import SHARED, State, Stepped

LONGEST_CACHE = 8192  # tokens: PyTorch reads the keys and values of more faster, except in bfloat16
MOST = 16  # sequences; of more, PyTorch's products of matrices are faster
_DTYPES = {  # of what a state keeps, by the last part of its path; else that of the model
    **dict.fromkeys(("sums", "log_gate"), torch.float64),
    **dict.fromkeys((SHARED, "run", "document", "id", "documents"), torch.int64),
    "seen": torch.bool,
}
_OF_INPUTS = {"int": torch.int64, "bool": torch.bool}
_SERVED = (torch.float32, torch.float64, torch.bfloat16)
_PLAIN = {Tensor, nn.Parameter}


class _Operations(NamedTuple):
    run: Callable[..., bool]


class _Weights(NamedTuple):
    """A model's weights, each by its block and name, and all its blocks, each by what should hold it and its label."""

    places: list[tuple[nn.Module, str]]
    blocks: list[tuple[nn.Module, str, nn.Module]]


class StepKernel:
    """The kernel NAME.cpp, which lies beside the module of `spec`.

    weights, state: the tensors that it is given, (path, numbers); or (layers, tensors), in whose paths `{}` is the
    layer. Numbers of the state are those of each sequence, unless its path ends with `shared`; below 0 those of one
    token of a cache, which a call without the kernel makes larger. results: the shapes of the results for one sequence.
    drops: the model has dropout.
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
        caches = ((place, -count) for place, (_, count) in enumerate(self._state) if count < 0)
        self._cache = next(caches, None)  # the place of the first one, and its numbers of one token
        self._library = Library(name, spec, _Operations, _warn, together=False)  # no training asks for it
        self._sizes: dict[tuple[int, torch.dtype], tuple[list[int], list[torch.dtype]]] = {}
        self._found: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()
        self._kinds: dict[str, type[nn.Module]] = {}  # of the blocks of a new model, by path

    def __call__(self, model: Stepped, state: State, tokens: int, *inputs: Tensor) -> list[Tensor] | None:
        """The results for one token of each sequence, whose state is brought up to date; None where it does not serve.

        state: one that `enter` was called on, for so many tokens.
        """
        past = state.known_past
        if torch.compiler.is_compiling() or past is None or tokens != 1 or not self._serves(model, state):
            return None
        weights = self._weights_of(model)
        kept = [state.tensors[path] for path, _ in self._state if path in state.tensors]
        batch = inputs[0].shape[0]
        if weights is None or len(kept) < len(self._state) or batch > MOST:
            return None
        given = [x.contiguous() for x in inputs]
        tensors = [*weights, *kept, *given]
        dtype = next((x.dtype for x in (*weights, *given) if x.is_floating_point()), None)
        if dtype not in _SERVED:
            return None
        numbers, dtypes = self._expected(model, batch, dtype)
        room = 0
        if self._cache is not None:
            place, each = self._cache
            room = kept[place].numel() // max(each * batch, 1)  # which all other caches should have
            if past >= (room if dtype == torch.bfloat16 else min(room, LONGEST_CACHE)):
                return None
            numbers = [count if count >= 0 else -count * room for count in numbers]
        if not _fit(tensors, numbers, dtypes):
            return None
        operations = self._library.of(dtype)
        if operations is None:
            return None
        results = [torch.empty((batch, *shape), dtype=dtype) for shape in self.results]
        pointers = array("q", [x.data_ptr() for x in (*tensors, *results)])
        if any(count and not pointer for count, pointer in zip(numbers, pointers, strict=False)):
            return None  # its memory was given back
        addresses = torch.frombuffer(pointers, dtype=torch.int64)
        done = operations.run(addresses, batch, past, room, torch.get_num_threads())
        return results if done else None

    def _serves(self, model: nn.Module, state: State) -> bool:
        """Whether nothing is at work that must see the operations of a step."""
        if state.starting or state.pieces is not None or not enabled():
            return False
        if (self._drops and model.training) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        if modes or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return False
        traced = torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack()
        return not traced and forward_ad._current_level < 0

    def _expected(
        self, model: Stepped, batch: int, dtype: torch.dtype
    ) -> tuple[list[int], list[torch.dtype]]:
        """The numbers and dtypes of all weights, of what a state of so many sequences keeps, and of the inputs.

        Numbers below 0 are those of one token of a cache.
        """
        if (batch, dtype) in self._sizes:
            return self._sizes[batch, dtype]
        numbers, dtypes = [count for _, count in self._weights], [dtype] * len(self._weights)
        for path, count in self._state:
            last = path.rpartition(".")[2]
            numbers.append(count if last == SHARED else count * batch)
            dtypes.append(_DTYPES.get(last, dtype))
        for _, kind, shape in model.TOKENS:
            numbers.append(batch * math.prod(shape[1:]))
            dtypes.append(_OF_INPUTS.get(kind, dtype))
        return self._sizes.setdefault((batch, dtype), (numbers, dtypes))

    # ------------------------------------------------------------ weights

    def _weights_of(self, model: nn.Module) -> list[Tensor] | None:
        """The weights as they are now, None where the kernel cannot read them or would pass a block by."""
        known = self._found.get(model)
        if known is None or any(of._modules.get(label) is not block for of, label, block in known.blocks):
            self._kinds = self._kinds or _kinds_of_new(model)
            known = _found(model, self._weights, self._kinds)
            if known is None:
                return None
            self._found[model] = known
        places, blocks = known
        if any(map(_is_changed, [block for *_, block in blocks])):
            return None
        found = [block._parameters.get(name, block._buffers.get(name)) for block, name in places]
        weights = [weight for weight in found if weight is not None]
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


def _kinds_of_new(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The classes of the blocks of a new model of the class that has a kernel, by path."""
    made: Any = next(kind for kind in type(model).__mro__ if "KERNEL" in vars(kind))
    with torch.device("meta"):
        return {path: type(block) for path, block in made(None).named_modules() if path}


def _found(
    model: nn.Module, weights: list[tuple[str, int]], kinds: dict[str, type[nn.Module]]
) -> _Weights | None:
    """Where weights are, None where one is not there, or where a block is not of the kind of a new model's."""
    blocks = {"": model}
    held: list[tuple[nn.Module, str, nn.Module]] = []
    for path, kind in kinds.items():
        of, _, label = path.rpartition(".")
        block = blocks[of]._modules.get(label)
        if type(block) is not kind:
            return None
        blocks[path] = block
        held.append((blocks[of], label, block))
    places = [path.rpartition(".") for path, _ in weights]
    if any(of not in blocks for of, *_ in places):
        return None
    return _Weights([(blocks[of], name) for of, _, name in places], held)


def _is_changed(block: nn.Module) -> bool:
    """Whether a user has given this block hooks, or other methods than its class has."""
    own = block.__dict__
    return bool(block._forward_hooks or block._forward_pre_hooks or "forward" in own or "step" in own)


def _warn(reason: str) -> None:
    warn_once("native_warning", f"steps run without native kernels, and slower: {reason}", RuntimeWarning)
