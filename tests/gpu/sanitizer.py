"""What a GPU would not forgive, found while Triton's interpreter runs a kernel.

Each tensor argument of a launch has an address space of its own here, so that a pointer knows which argument it came
from. Found are:

* accesses outside the argument, between the elements of a strided view as well as beyond its ends;
* two programs of a launch of which one writes what the other reads or writes; lanes of one store that write different
  values to one element; and a program that reads what it wrote itself with no `tl.debug_barrier()` between (other
  threads of it may not see the value yet);
* lanes that a load masks off without `other`: they hold NaN, or as integers 0x5A5A5A5A, and so spoil what depends on
  them;
* atomic operations, which make sums depend on the order of the programs.

Memory that the caller leaves uninitialised (outputs from `torch.empty`) is the caller's to fill with NaN.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

Indices = NDArray[np.int64]

_SPACE = 44
"""Bits of an address within the space of one argument; its first element lies in the middle."""
_SEVERAL = -1
"""The reader of an element that several programs have read."""


class Defect(Exception):
    """A kernel does what is not defined on a GPU."""


class OutOfBounds(Defect):
    """An access outside the tensor that the pointer came from."""


class Race(Defect):
    """Accesses whose outcome depends on the order of programs or threads."""


class Atomic(Defect):
    """An atomic operation."""


@dataclass(frozen=True)
class Storage:
    """The memory of one or more arguments, and who has used each element of it.

    An epoch is a stretch of one program that no barrier interrupts; they are counted through the launch from 1.
    """

    elements: NDArray[Any]
    written: NDArray[np.int32]
    """Epoch of the last write of each element, or 0."""
    read: NDArray[np.int32]
    """Epoch of the last read of each element, 0, or _SEVERAL."""


@dataclass(frozen=True)
class Argument:
    """A tensor that a launch was given."""

    name: str
    tensor: Tensor
    storage: Storage
    address: int
    holds: NDArray[np.bool_]
    """For each element of the storage from the first of the tensor to its last: whether the tensor has it."""

    def indices(self, addresses: NDArray[np.uint64], access: str) -> Indices:
        """Places in the storage of the elements at some addresses. Raises OutOfBounds."""
        places = (addresses.astype(np.int64) - self.address) // self.tensor.element_size()
        outside = (places < 0) | (places >= self.holds.size)
        outside[~outside] = ~self.holds[places[~outside]]
        if outside.any():
            shape, first = tuple(self.tensor.shape), places[outside][0]
            raise OutOfBounds(
                f"{access} of {outside.sum()} of {places.size} lanes is outside {self.name} of shape {shape}: one is"
                f" {first} elements from its first, and {self.holds.size - 1} is its last"
            )
        return places + int(self.tensor.storage_offset())


@dataclass
class Memory:
    """The arguments of one launch, and the programs that have run so far."""

    names: dict[tuple[Any, ...], str]
    """Of the arguments, by `identity`."""
    arguments: list[Argument] = field(default_factory=list)
    storages: dict[int, Storage] = field(default_factory=dict)
    programs: list[tuple[int, ...]] = field(default_factory=list)
    first_epochs: list[int] = field(default_factory=list)
    epoch: int = 0

    def begin(self, program: tuple[int, ...]) -> None:
        self.epoch += 1
        self.programs.append(program)
        self.first_epochs.append(self.epoch)

    def barrier(self) -> None:
        self.epoch += 1

    def address(self, tensor: Tensor) -> int:
        """Add an argument; the result is the address of its first element."""
        holds = np.zeros(_span(tensor), np.bool_)
        torch.from_numpy(holds).as_strided(tensor.shape, tensor.stride()).fill_(True)
        number = len(self.arguments) + 1
        address = (number << _SPACE) + (1 << (_SPACE - 1)) + tensor.data_ptr() % 16
        name = self.names.get(identity(tensor), f"tensor {number}")
        self.arguments.append(Argument(name, tensor, self._storage(tensor), address, holds))
        return address

    def _storage(self, tensor: Tensor) -> Storage:
        size = tensor.element_size()
        storage = tensor.untyped_storage()
        count = storage.nbytes() // size
        key = storage.data_ptr() or -id(tensor)  # those without elements have no address
        if key not in self.storages:
            octets = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            elements = octets[: count * size].view(f"u{size}")
            users = [np.zeros(count, np.int32) for _ in range(2)]
            self.storages[key] = Storage(elements, *users)
        known = self.storages[key]
        if known.elements.itemsize != size:
            raise NotImplementedError("arguments that share memory have elements of different sizes")
        return known

    def find(self, addresses: NDArray[np.uint64], size: int, access: str) -> tuple[Argument, Indices]:
        """The argument that some addresses point into, and where in its storage. All must point into the same."""
        numbers = (addresses >> np.uint64(_SPACE)).astype(np.int64)
        number = int(numbers[0])
        if (numbers != number).any() or not 0 < number <= len(self.arguments):
            raise OutOfBounds(f"{access} from pointers of no argument, or of several")
        argument = self.arguments[number - 1]
        if argument.tensor.element_size() != size:
            raise NotImplementedError(
                f"{access} of {size} bytes from {argument.name}, whose elements have others"
            )
        return argument, argument.indices(addresses, access)

    def load(self, addresses: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
        argument, places = self.find(addresses, dtype.itemsize, "load")
        storage, own = argument.storage, self.first_epochs[-1]
        written = storage.written[places]
        self._refuse(argument, "reads what was written by", written, (written > 0) & (written < own))
        if (written == self.epoch).any():
            raise Race(
                f"program {self.programs[-1]} reads what it wrote to {argument.name}, with no barrier between"
            )
        read = storage.read[places]
        storage.read[places] = np.where((read != 0) & (read < own), np.int32(_SEVERAL), np.int32(self.epoch))
        return storage.elements[places].view(dtype)

    def store(self, addresses: NDArray[np.uint64], values: NDArray[Any]) -> None:
        argument, places = self.find(addresses, values.itemsize, "store")
        storage, own = argument.storage, self.first_epochs[-1]
        written, read = storage.written[places], storage.read[places]
        self._refuse(argument, "writes what was written by", written, (written > 0) & (written < own))
        self._refuse(argument, "writes what was read by", read, (read != 0) & (read < own))
        bits = np.ascontiguousarray(values).view(storage.elements.dtype)
        storage.written[places] = self.epoch
        storage.elements[places] = bits
        if (storage.elements[places] != bits).any():
            raise Race(f"lanes of one store write different values to one element of {argument.name}")

    def _refuse(
        self, argument: Argument, what: str, epochs: NDArray[np.int32], raced: NDArray[np.bool_]
    ) -> None:
        if raced.any():
            epoch = int(epochs[raced][0])
            others = (
                "several" if epoch == _SEVERAL else self.programs[bisect_right(self.first_epochs, epoch) - 1]
            )
            raise Race(
                f"program {self.programs[-1]} {what} {others}: {raced.sum()} elements of {argument.name}"
            )


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one argument of a launch from the others, and is the same for the interpreter's copy of it."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _span(tensor: Tensor) -> int:
    """Elements from the first of a tensor to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


_memory = Memory({})


def reset(names: dict[tuple[Any, ...], str]) -> None:
    """Forget the launch before, at the start of one; `names` are its arguments'."""
    global _memory
    _memory = Memory(names)


def _convert(original: Any) -> Any:
    """A tensor argument becomes a pointer into its own address space."""

    def convert(argument: Any) -> Any:
        if not hasattr(argument, "data_ptr"):
            return original(argument)
        pointer = original(argument)
        pointer.handle.data = np.array([_memory.address(interpreter._unwrap_tensor(argument))], np.uint64)
        return pointer

    return convert


def _mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    values = (
        mask.data if isinstance(mask, interpreter.TensorHandle) else mask
    )  # block pointers give a bare array
    return np.broadcast_to(np.asarray(values, np.bool_), shape)


def _undefined(shape: tuple[int, ...], element: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values of lanes that were never loaded."""
    if element == tl.bfloat16:
        return np.full(shape, 0x7FC0, dtype)
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    return np.full((*shape, dtype.itemsize), 0x5A, np.uint8).view(dtype)[..., 0]


def _load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    shape = pointers.data.shape
    active = _mask(mask, shape)
    filling = _undefined(shape, element, dtype) if other is None else np.broadcast_to(other.data, shape)
    values = np.array(filling, dtype)
    if active.any():
        values[active] = _memory.load(pointers.data[active], dtype)
    return interpreter.TensorHandle(values, element)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    shape = pointers.data.shape
    active = _mask(mask, shape)
    if active.any():
        _memory.store(
            pointers.data[active], np.broadcast_to(value.data, shape)[active].astype(dtype, copy=False)
        )


def _refuse_atomic(self: Any, *_: Any) -> None:
    raise Atomic("the order of atomic operations, and with it the rounding of a sum, differs from run to run")


def _begin(original: Any) -> Any:
    def begin(self: Any, x: int, y: int, z: int) -> None:
        original(self, x, y, z)
        _memory.begin((x, y, z))

    return begin


def install() -> None:
    """Replace what the interpreter does with memory in this process, for good. Once only."""
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _load
    builder.create_masked_store = _store
    builder.create_atomic_cas = _refuse_atomic
    builder.create_atomic_rmw = _refuse_atomic
    builder.create_barrier = lambda self: _memory.barrier()
    builder.set_grid_idx = _begin(builder.set_grid_idx)
    interpreter._implicit_cvt = _convert(interpreter._implicit_cvt)
