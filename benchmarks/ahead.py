"""Ahead-of-time compilation of Triton kernels for GPUs that are not there.

    with Ahead(workers=2) as ahead:
        results = ahead.map([Job(file, "forward_kernel", {"q": "bf16*", "n": 4096}, {"D": 64}, target="sm_90"), ...])

gives for each job the `Resources` of the compiled kernel, or a `Failure` with the compiler's words. The
specialisation is that of a launch: pointers are divisible by 16, integers that are 1 become constants, those
divisible by 16 are known to be.

Triton reads TRITON_INTERPRET when it is imported, and a process that interprets cannot compile, so that jobs go to
processes of their own, from whose environment the variable is gone.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.machine_code import ARCHITECTURES, Load, Resources, read

__all__ = ["ARCHITECTURES", "Ahead", "Failure", "Job", "Load", "Resources", "resources"]

Argument = str | int | float
"""Of a launch: "bf16*" is a pointer to bfloat16 (see ELEMENTS), "none" is None, a number is itself."""

Constant = str | int | float | bool | None
"""A value of a `tl.constexpr`; "tl.float32" is a type of Triton's."""

ELEMENTS: Mapping[str, str] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
    "i1": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
}
"""Triton's name of an element type, and PyTorch's."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a `@triton.jit` function of a file of Python, and how it would be launched."""

    file: Path
    kernel: str
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Constant]
    target: str
    """A key of ARCHITECTURES."""
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile."""

    error: str


Result = Resources | Failure


class _Driver:
    """What compiling asks of a driver, for a GPU that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps its compiled kernels by device: the name has to differ from target to target.
        return str(self.target)

    def get_current_stream(self, device: object = None) -> int:
        return 0


def resources(kernel: Any, job: Job) -> Resources:
    """Compile `kernel`, a function under `@triton.jit`, as a job says and read what it uses.

    Raises:
        RuntimeError: this process interprets kernels.
        KeyError: an unknown target or element type.
        Exception: whatever the compiler raises for a kernel that it rejects.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile: use Ahead")
    architecture = ARCHITECTURES[job.target]
    target_of_triton = GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)
    triton.runtime.driver.set_active(_Driver(target_of_triton))
    launch = {name: _argument(value) for name, value in job.arguments.items()}
    values = {name: _constant(value) for name, value in job.constants.items()}
    blocks = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return read(job.target, kernel.warmup(grid=(1,), **blocks, **launch, **values))


def _constant(value: Constant) -> Any:
    """A constant; "tl.bfloat16" is the type of that name."""
    import triton.language

    is_type = isinstance(value, str) and value.startswith("tl.")
    return getattr(triton.language, str(value)[3:]) if is_type else value


def _argument(value: Argument) -> Any:
    from triton.runtime.jit import MockTensor

    if not isinstance(value, str):
        return value
    if value == "none":
        return None
    return MockTensor(f"torch.{ELEMENTS[value.removesuffix('*')]}")


class Ahead:
    """Processes that compile, for the time of a `with` statement.

    Args:
        workers: how many of them; each takes one core and some hundred MiB.
        cache: folder for Triton's cache of compiled kernels; without one it is private and goes away at the end.
        limit: seconds for one job, after which its process is ended and the job counts as a failure.
    """

    def __init__(self, workers: int = 2, *, cache: Path | None = None, limit: float = 300.0) -> None:
        self._workers = workers
        self._limit = limit
        self._private = None if cache else tempfile.TemporaryDirectory(prefix="fastgrad-ahead-")
        self._cache = cache or Path(self._private.name if self._private else "")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Ahead:
        for _ in range(self._workers):
            self._idle.put(_Worker(self._cache, self._limit))
        return self

    def __exit__(self, *_: object) -> None:
        for _worker in range(self._workers):
            self._idle.get().close()
        if self._private is not None:
            self._private.cleanup()

    def map(self, jobs: Iterable[Job]) -> list[Result]:
        """The results of the jobs, in their order."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self._run, jobs))

    def _run(self, job: Job) -> Result:
        worker = self._idle.get()
        try:
            return worker.run(job)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process that compiles, started when it is first needed, and again after a job that ended it."""

    def __init__(self, cache: Path, limit: float) -> None:
        self._cache, self._limit = cache, limit
        self._process: BaseProcess | None = None
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (open until `close`)

    def run(self, job: Job) -> Result:
        process = self._process = self._process or self._start()
        with suppress(EOFError, OSError):  # the process has ended
            self._pipe.send(job)
            if self._pipe.poll(self._limit):
                result: Result = self._pipe.recv()
                return result
        self._end()
        self._log.seek(0)
        return Failure(f"the compiler ended with status {process.exitcode}: {self._log.read()[-2000:]}")

    def close(self) -> None:
        self._end()
        self._log.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> BaseProcess:
        context = get_context("spawn")
        self._pipe, there = context.Pipe()
        self._log.truncate(0)
        process = context.Process(target=_serve, args=(there, self._cache, self._log.name), daemon=True)
        process.start()
        there.close()  # so that the end of the process ends the pipe
        return process


def _serve(pipe: Connection, cache: Path, log: str) -> None:
    """Answer jobs, in a process of its own, which says on a file what its compiler says."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    with open(log, "a") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    with suppress(EOFError):
        while True:
            pipe.send(_answer(pipe.recv()))


def _answer(job: Job) -> Result:
    """The result of a job; a kernel that the compiler rejects gives a failure."""
    try:
        return resources(getattr(_module(job.file), job.kernel), job)
    except Exception as error:  # whatever it is, it is the answer
        return Failure(f"{type(error).__name__}: {error}")


@cache
def _module(file: Path) -> ModuleType:
    """A file of Python, executed once under a name of its own."""
    name = f"ahead_{len(sys.modules)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
