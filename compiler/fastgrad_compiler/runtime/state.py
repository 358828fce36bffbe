"""What a model keeps of the tokens it has seen, so that the next ones cost the same whatever came before.

A `State` holds tensors under the paths of what keeps them, and the number of tokens. It is a pytree. A call of `step`
brings it up to date in place; `clone` it before a call to go on in two ways.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree

from .initialise import Generated
from .pieces import Pieces

FLOAT64 = ("sums", "log_gate", "pending")  # last parts of the paths of what is so whatever the model's dtype
LIKE = "like.kept.shared"
SHARED = "shared"  # the last part of the path of what has no batch axis


class Scope:
    """The part of a state that belongs to one path: what generated code writes and reads."""

    def __init__(self, root: State, prefix: str) -> None:
        self._root, self.prefix = root, prefix

    @property
    def root(self) -> State:
        """The whole state."""
        return self._root

    def at(self, *labels: str | int) -> Scope:
        """The part of a label below, after the indices of the loops around it."""
        return Scope(self.root, ".".join((*([self.prefix] if self.prefix else []), *map(str, labels))))

    @property
    def past(self) -> Tensor:
        """int64, no dimensions: the tokens before this call."""
        return self.root.position

    @property
    def known_past(self) -> int | None:
        """The same as a number, None in a graph that is compiled or exported."""
        return self.root.known

    @property
    def starts(self) -> bool:
        """Whether this is the first call, which computes what all later ones share."""
        return self.root.starting

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is the same for all that is asked in one call, made when it is asked first."""
        if self.root.known is None:
            return make()
        if key not in self.root.made:
            self.root.made[key] = make()
        return self.root.made[key]

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of this part, made where there is none yet."""
        path = f"{self.prefix}.{name}"
        if path not in self.root.tensors:
            self.root.tensors[path] = make()
        return self.root.tensors[path]

    def find(self, name: str) -> Tensor | None:
        """A tensor of this part, None where there is none."""
        return self.root.tensors.get(f"{self.prefix}.{name}")

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor of this part by one of another size."""
        self.root.tensors[f"{self.prefix}.{name}"] = tensor

    def keep(self, *tensors: Tensor, shared: Iterable[int] = ()) -> None:
        """What is the same in every call; those at the places `shared` have no batch axis."""
        for place, tensor in enumerate(tensors):
            name = f"kept.{place}.{SHARED}" if place in shared else f"kept.{place}"
            self.put(name, tensor.clone(memory_format=torch.contiguous_format))

    def kept(self) -> list[Tensor]:
        """What `keep` was given."""
        first, found = f"{self.prefix}.kept.", {}
        for path, tensor in self.root.tensors.items():
            if path.startswith(first):
                found[int(path.removeprefix(first).partition(".")[0])] = tensor
        return [found[place] for place in sorted(found)]


class State(Scope):
    """What a model keeps of its tokens: `tensors` by path, and how many there were, `position`: int64, no dimensions.

    Made by the model's `start`. `capacity`: the tokens for which caches of exact attention are made; they grow.
    """

    def __init__(
        self,
        model: str,
        position: Tensor,
        tensors: dict[str, Tensor],
        capacity: int = 0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.prefix = ""
        self.model, self.position, self.tensors, self.capacity = model, position, tensors, capacity
        self.sizes = dict(sizes or {})  # of the run-time dims of what is the same in every call
        self.starting = False
        self.entered = False  # whether a call is under way
        self.known: int | None = None
        self.made: dict[Hashable, Any] = {}
        self.pieces: Pieces | None = None  # where this state is that of a piece of a sequence

    @property
    def root(self) -> State:
        """Itself, which it does not hold: what a call has made ends with it, without the garbage collector."""
        return self

    # ------------------------------------------------------------ what users ask

    @property
    def batch_size(self) -> int | None:
        """The number of sequences, None where nothing that is kept tells."""
        return next((x.shape[0] for path, x in self.tensors.items() if not path.endswith(SHARED)), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in (self.position, *self.tensors.values()))

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self._mapped(lambda path, x: x.clone())

    def __getitem__(self, sequences: slice | Tensor) -> State:
        """Some of the sequences, as a copy: state[2:3], or by a tensor [m] of places or [b] of truth values.

        Raises TypeError for anything else, a single place too: a state always is of a batch.
        """
        if not isinstance(sequences, slice) and not (isinstance(sequences, Tensor) and sequences.ndim == 1):
            raise TypeError("sequences of a state are a slice, state[2:3], or a tensor of one dimension")
        return self._mapped(lambda path, x: x.clone() if path.endswith(SHARED) else x[sequences].clone())

    def repeat(self, times: int) -> State:
        """All sequences, so many times after each other. Raises ValueError for a number below 1."""
        if times < 1:
            raise ValueError(f"times {times}: expected at least 1")
        return self._mapped(
            lambda path, x: x.clone() if path.endswith(SHARED) else x.repeat(times, *(1,) * (x.ndim - 1))
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """On another device, or for a model of another dtype; sums, also those of gates, stay in float64."""

        def moved(path: str, x: Tensor) -> Tensor:
            keeps = path.endswith(FLOAT64) or not x.is_floating_point()
            return x.to(device=device, dtype=None if keeps else dtype)

        found = self._mapped(moved)
        found.position = self.position.to(device=device)
        return found

    # ------------------------------------------------------------ what generated code asks

    @property
    def like(self) -> Tensor:
        """A number of the model's dtype and device."""
        return self.tensors[LIKE]

    def enter(self, model: str, tokens: int, *, batch: int | None = None, at_most: int | None = None) -> None:
        """Begin a call for some tokens.

        ValueError where the state is another model's, of another batch size, or before its first token; RuntimeError
        where the call before ended with an error, and may have brought a part of the state up to date.
        """
        if self.entered:
            raise RuntimeError(
                "a step on this state failed half way: go on from a clone that was made before it"
            )
        self.made.clear()  # of a call that failed
        if model != self.model:
            raise ValueError("the state was made by another model")
        if batch is not None and self.batch_size not in (None, batch):
            raise ValueError(f"the state is of {self.batch_size} sequences, and the inputs are of {batch}")
        if torch.compiler.is_compiling():
            self.known = None
            return
        self.known = int(self.position)
        if self.known < 0:
            raise ValueError(f"the state's position is {self.known}: a state has seen no token or more")
        if at_most is not None and self.known + tokens > at_most:
            raise ValueError(f"{self.known + tokens} tokens, but the model is declared for at most {at_most}")
        self.entered = not self.starting

    def advance(self, tokens: int) -> State:
        """End a call: this state. What belongs to the call must have been computed."""
        self.position.add_(tokens)
        self.known, self.entered = None, False
        self.made.clear()
        return self

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> State:
        tensors = {path: change(path, x) for path, x in self.tensors.items()}
        return State(self.model, self.position.clone(), tensors, self.capacity, self.sizes)


class Stepped(Generated):
    """The base of a generated model that has a step form.

    STEP: a hash of the form. TOKENS, FIXED: (name, dtype, shape) of the inputs that are tokens, of which one has the
    shape that is given, and of those that are the same in every call; names in a shape stand for any size.
    """

    STEP: ClassVar[str]
    TOKENS: ClassVar[tuple[Any, ...]]
    FIXED: ClassVar[tuple[Any, ...]] = ()

    @torch.no_grad()
    def start(self, *given: Any, capacity: int = 0, **sizes: int) -> State:
        """The state before the first token.

        start(batch_size=1) where all inputs are tokens; else start(inputs..), what is the same in every call, in the
        order of the model's inputs. `capacity`: tokens for which caches of exact attention are made; they grow, but not
        in a graph that is compiled. `sizes`: of further dims of the tokens. TypeError where something is missing,
        ValueError for a batch of less than one sequence.

        One token of no meaning is run, which makes the tensors; what was kept of it is cleared.
        """
        fixed, batch, known = self._fixed(given), self.TOKENS[0][2][:1], dict(sizes)
        for (_, _, shape), tensor in zip(self.FIXED, fixed, strict=True):
            known |= {
                name: size for name, size in zip(shape, tensor.shape, strict=True) if isinstance(name, str)
            }
        size = known.pop("batch_size", 1) if fixed or not given else given[0]
        if size < 1:
            raise ValueError(f"batch_size {size}: expected at least 1")
        for name in batch:
            known.setdefault(name, size)
        floats = (x for x in (*self.parameters(), *self.buffers(), *fixed) if x.is_floating_point())
        like = next(floats, fixed[0] if fixed else torch.empty(()))
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        tensors = {LIKE: torch.zeros((), dtype=dtype, device=like.device)}
        named = {name: size for name, size in known.items() if isinstance(name, str)}
        state = State(
            self.STEP, torch.zeros((), dtype=torch.int64, device=like.device), tensors, capacity, named
        )
        state.starting = True
        step: Any = self.step  # of the class that was generated
        step(*(_token(each, known, state.like) for each in self.TOKENS), state, *fixed)
        state.starting = False
        for path, tensor in state.tensors.items():
            if ".kept." not in path:
                tensor.zero_()
        state.position.zero_()
        return state

    def restored(
        self, position: Tensor, tensors: dict[str, Tensor], capacity: int, sizes: Mapping[str, int]
    ) -> State:
        """A state of this model from what another one held."""
        return State(self.STEP, position, tensors, capacity, sizes)

    def _fixed(self, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        count = len(self.FIXED)
        if count and len(given) != count:
            names = ", ".join(name for name, *_ in self.FIXED)
            raise TypeError(f"start takes {names}, which are the same in every call")
        if not count and (len(given) > 1 or any(isinstance(each, Tensor) for each in given)):
            raise TypeError("start takes the number of sequences")
        return given if count else ()


def _token(described: Any, sizes: dict[str, int], like: Tensor) -> Tensor:
    """A token of no meaning: zeros, or true."""
    name, kind, shape = described
    missing = [size for size in shape if isinstance(size, str) and size not in sizes]
    if missing:
        raise TypeError(f"start needs the size {missing[0]} of {name}")
    dtype = {"int": torch.int64, "bool": torch.bool}.get(kind, like.dtype)
    whole = [sizes[size] if isinstance(size, str) else size for size in shape]
    return torch.full(whole, kind == "bool", dtype=dtype, device=like.device)


def _flatten(state: State) -> tuple[list[Tensor], tuple[Any, ...]]:
    names = tuple(state.tensors)
    return [state.position, *state.tensors.values()], (
        names,
        state.model,
        state.capacity,
        tuple(state.sizes.items()),
    )


def _unflatten(tensors: Iterable[Any], context: tuple[Any, ...]) -> State:
    names, model, capacity, sizes = context
    position, *others = tensors
    return State(model, position, dict(zip(names, others, strict=True)), capacity, dict(sizes))


def _with_keys(state: State) -> tuple[list[tuple[Any, Tensor]], tuple[Any, ...]]:
    leaves, context = _flatten(state)
    return list(zip(map(_pytree.MappingKey, ("position", *state.tensors)), leaves, strict=True)), context


_pytree.register_pytree_node(
    State,
    _flatten,
    _unflatten,
    serialized_type_name=f"{State.__module__}.State",
    flatten_with_keys_fn=_with_keys,
)
