"""The arithmetic peak of this machine: float32 multiply-adds per second of a loop that touches only registers."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import cast

from fastgrad_compiler.runtime.native import NativeError, find_compiler

SOURCE = Path(__file__).with_name("fma_peak.cpp")
TRIES, SECONDS = 5, 0.2
FIRST_ROUNDS = 10_000


def compiler_command() -> tuple[str, ...] | None:
    """The C++ compiler that also builds kernels; None without one."""
    try:
        return find_compiler().command
    except NativeError:
        return None


def peak_flops(threads: int) -> float | None:
    """Flops a second of `threads` threads, a multiply-add being 2; the best of some tries. None without a compiler.

    Of processor time: what else runs on the machine does not make it lower.
    """
    compiler = compiler_command()
    function = None if compiler is None else _loop(compiler)
    if function is None:
        return None

    def run(rounds: int) -> float:
        return function(threads, rounds, 0.999, 0.001)

    rounds = FIRST_ROUNDS
    flops_a_round = 2 * 16 * 24 * threads  # of the widest loop: no more than scales the length of a try
    rounds = max(rounds, int(SECONDS * run(rounds) / flops_a_round))
    rounds = max(rounds, int(SECONDS * run(rounds) / flops_a_round))
    return max(run(rounds) for _ in range(TRIES))


def highest(peaks: Iterable[float | None]) -> float | None:
    """The peak, of measurements between passes: a machine that slows down for some time lowers one of them only."""
    return max((peak for peak in peaks if peak is not None), default=None)


def error_of_shares(shares: Iterable[float | None]) -> str:
    """What is said where a share of the peak is above 1, which nothing can reach; empty where none is."""
    largest = max((share for share in shares if share is not None), default=0.0)
    if largest <= 1:
        return ""
    return (
        f"{largest:.0%} of the peak is an error of the measurement: the machine was slower while the peak was "
        "measured than during a pass"
    )


@cache
def _loop(compiler: tuple[str, ...]) -> Callable[[int, int, float, float], float] | None:
    """(threads, rounds, factor, term) -> flops a second; None where it cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        if not _build(compiler, library):
            return None
        function = ctypes.CDLL(str(library)).fma_peak
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_float]
    return cast(Callable[[int, int, float, float], float], function)


def _build(compiler: tuple[str, ...], library: Path) -> bool:
    machine = platform.machine()
    native = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    wide = ["-mprefer-vector-width=512"] if machine in ("x86_64", "AMD64") else []
    command = [
        *compiler, "-std=c++17", "-O3", native, *wide, "-ffp-contract=fast", "-fPIC", "-shared", "-pthread",
        str(SOURCE), "-o", str(library),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
