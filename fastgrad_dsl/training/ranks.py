"""The processes of a training run: which part of a batch is whose, and what all of them decide alike.

A run in one process is a mesh of one. On several, PyTorch's elastic agent starts the processes and restarts them,
and each dimension of the mesh divides the work: `data` the sequences of a batch, `context` every sequence, `tensor`
heads and hidden widths. Ranks count along the last first. `fully_shard` has the weights of a place of `tensor` in parts
on all ranks of that place.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from fastgrad_dsl.distributed.context import context_parallel, shard_sequence
from fastgrad_dsl.distributed.sharding import shard_model
from fastgrad_dsl.training.stopping import Stop, StopAsked
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.render import render

T = TypeVar("T")
RANK, WORLD_SIZE, RESTARTS = "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"  # set by torchrun
CLAIMED = "fastgrad/claimed"
LOST = 70  # exit status of a process that lost another one: the agent starts all of them again
GRACE = 5.0  # seconds in which those who lost another one say that they are there
OF_GROUPS = ("gloo", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")


@dataclass(frozen=True)
class Mesh:
    """In how many parts are a batch, by its sequences; each sequence; and heads and hidden widths."""

    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def count(self) -> int:
        """The processes of it."""
        return self.data * self.context * self.tensor


@dataclass
class Ranks:
    """The processes of a run, as one of them sees them; by default a single one.

    rank: its number. meshes: of weights, whose dimensions are "all" that work with the same ones and "tensor", and of
    all three dimensions. timeout: seconds in which every process has to answer. claimed_before: this is a restart of a
    run that had its folder.
    """

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    timeout: float = 600.0
    meshes: tuple[DeviceMesh, DeviceMesh] | None = None
    store: Any = None
    claimed_before: bool = False
    signals: Stop = field(default_factory=Stop)

    @property
    def leads(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self.mesh.count

    # ------------------------------------------------------------ whose is what

    def sharded(
        self, model: nn.Module, plan: Mapping[str, ParallelStyle], *, recompute: bool = False
    ) -> nn.Module:
        """The model with its weights in parts, in place; as it is in one process.

        plan: the blocks that `tensor` divides. `recompute`: as `shard_model`.
        """
        if self.meshes is None:
            return model
        weights, _ = self.meshes
        if self.mesh.tensor > 1:
            parallelize_module(model, weights["tensor"], dict(plan))
        return shard_model(model, weights["all"], recompute=recompute)

    def context(self) -> AbstractContextManager[None]:
        """Around forward and backward passes."""
        if self.meshes is None or self.mesh.context == 1:
            return nullcontext()
        return context_parallel(self.meshes[1]["context"])

    def own(self, places: Sequence[T]) -> Sequence[T]:
        """Those of the sequences of a batch that are this process's: as many on each."""
        size = len(places) // self.mesh.data
        first = self._data_rank * size
        return places[first : first + size]

    def own_rows(self, rows: int) -> tuple[slice, float]:
        """Own rows of a batch, and the weight of their mean in that of all; one of weight 0 where none is left."""
        size, rest = divmod(rows, self.mesh.data)
        first = self._data_rank * size + min(self._data_rank, rest)
        mine = size + (self._data_rank < rest)
        return (slice(first, first + mine), mine / rows) if mine else (slice(0, 1), 0.0)

    def pieces(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """This process's pieces of sequences."""
        if self.meshes is None or self.mesh.context == 1:
            return tensors
        pieces: Sequence[Tensor] = shard_sequence(tensors, self.meshes[1]["context"])
        return pieces

    @property
    def of_batch(self) -> int:
        """Which part of a batch is this process's: the number of those that have an earlier one."""
        return self.rank // self.mesh.tensor

    @property
    def _data_rank(self) -> int:
        return self.of_batch // self.mesh.context

    # ------------------------------------------------------------ what all do alike

    def gathered(self, *numbers: float) -> list[list[float]]:
        """These numbers of every process, by rank."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.count == 1:
            return [list(numbers)]
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def objects(self, own: T) -> list[T]:
        """An object of every process, by rank."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own)
        return found

    def mean(self, *numbers: float) -> list[float]:
        """The means of these numbers over all processes, the same on each."""
        return [sum(each) / self.count for each in zip(*self.gathered(*numbers), strict=True)]

    def each(self, work: Callable[[], T]) -> T:
        """What this process makes of `work`, which all do; the first TfgError of any is raised by all of them."""
        if self.count == 1:
            return work()
        found: T | None = None
        wrong: tuple[Diagnostic, ...] = ()
        try:
            found = work()
        except TfgError as error:
            wrong = error.diagnostics
        for diagnostics in self.objects(wrong):
            if diagnostics:
                raise TfgError(diagnostics)
        return found  # type: ignore[return-value]  # there is one where nothing is wrong

    def first(self, work: Callable[[], object]) -> None:
        """Done by the process that leads, while the others wait; its TfgError is raised by all of them."""
        self.each(lambda: work() if self.leads else None)

    def stop_of(self, stop: Stop) -> int | None:
        """The signal that any process got."""
        return int(max(signal for (signal,) in self.gathered(stop.signal or 0))) or None

    def check(self, stop: Stop) -> None:
        """Raise StopAsked on every process where one of them is to stop."""
        stop.signal = self.stop_of(stop) if self.count > 1 else stop.signal
        if stop.signal is not None:
            raise StopAsked

    # ------------------------------------------------------------ who is there

    def begins(self, step: int) -> None:
        """Tell the others, should this process be lost."""
        if self.store is not None:
            self.store.set(f"step/{self.rank}", str(step))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What fails because another process is lost ends this one, with a message that names the other.

        What fails here ends all of them with the status of this one.
        """
        if self.store is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in OF_GROUPS):
                with suppress(Exception):
                    known = isinstance(error, TfgError | OSError | MemoryError)
                    self.store.set(f"left/{self.rank}", str(2 if known else 1))
                raise
            leaving = threading.Timer(2 * GRACE, os._exit, [LOST])  # the store may be out of reach, too
            leaving.daemon = True
            leaving.start()
            status = self._lost(str(error))
            sys.stderr.flush()
            if status is not None:
                leaving.cancel()
                raise SystemExit(status) from None
            os._exit(LOST)  # threads that wait for the lost process would keep this one

    def _lost(self, reason: str) -> int | None:
        """Say who is lost; the status of a process that has left by itself."""
        missing = list(range(self.count))
        try:
            self.store.set(f"here/{self.rank}", "")
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and missing and self.signals.signal is None:
                missing = [each for each in missing if not self.store.check([f"here/{each}"])]
                for each in list(missing):
                    if self.store.check([f"left/{each}"]):
                        return int(self.store.get(f"left/{each}"))
                time.sleep(0.05)
            present = min(set(range(self.count)) - set(missing), default=self.rank)
            if self.signals.signal is None and present == self.rank:
                sys.stderr.write(render([self._told(missing, reason)], colour=False))
        except RuntimeError:  # the agent is gone
            pass
        return None

    def _told(self, missing: Sequence[int], reason: str) -> Diagnostic:
        waited = "Timed out" in reason or "timeout" in reason.lower()
        if not missing:
            message = f"the connection between processes broke: {reason.splitlines()[0][:200]}"
            return Diagnostic("FG504", message)
        who = ", ".join(self._named(each) for each in missing)
        if waited:
            message = (
                f"no answer within {self.timeout:g} seconds from {who}: it hangs, or the network to it is cut"
            )
            help_: tuple[str, ...] = ("give a longer --timeout where a step takes that long",)
        else:
            message, help_ = f"lost {who}", tuple[str, ...]()
        return Diagnostic("FG504", message, help=help_)

    def _named(self, rank: int) -> str:
        known = self.store.check([f"who/{rank}"])
        who = f" ({self.store.get(f'who/{rank}').decode()})" if known else ""
        step = (
            f" in step {self.store.get(f'step/{rank}').decode()}"
            if self.store.check([f"step/{rank}"])
            else ""
        )
        return f"rank {rank}{who}{step}"


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return RANK in os.environ and WORLD_SIZE in os.environ


def join(mesh: Mesh, timeout: float, signals: Stop) -> Ranks:
    """Meet the other processes that torchrun started, as many as the mesh has."""
    lasting, rank, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    lasting.set_timeout(timedelta(seconds=timeout))
    restarts = int(os.environ.get(RESTARTS, "0"))
    store = PrefixStore(f"fastgrad/{restarts}", lasting)  # the agent's store outlives a restart
    store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=mesh.count, timeout=timedelta(seconds=timeout)
    )
    claimed = restarts > 0 and lasting.check([CLAIMED])
    return Ranks(mesh, rank, timeout, meshes_of(mesh), store, claimed, signals)


def meshes_of(mesh: Mesh) -> tuple[DeviceMesh, DeviceMesh]:
    """`Ranks.meshes`, where all processes are there."""
    if mesh.tensor > 1:  # PyTorch warns of whatever is summed up or gathered along both dimensions
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    sizes = asdict(mesh)
    weights = init_device_mesh(
        "cpu", (mesh.data * mesh.context, mesh.tensor), mesh_dim_names=("all", "tensor")
    )
    return weights, init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def mark_claimed(ranks: Ranks) -> None:
    """Remember, beyond a restart of all processes, that the run's folder is this run's."""
    if ranks.store is not None:
        ranks.store.underlying_store.set(CLAIMED, "")


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
