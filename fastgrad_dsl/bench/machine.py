"""What a measurement was made on, to stand beside it: the processor and the versions, and no name of a host."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastgrad_dsl import __version__
from fastgrad_dsl.bench.peak import compiler_command
from fastgrad_dsl.models.batches import memory_bytes

VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))


def describe_machine(threads: int) -> dict[str, object]:
    """Processor, memory, versions, threads and the day, as they go into the JSON (docs/benchmark.md)."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vectors": next((name for flag, name in VECTORS if flag in flags), None),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _compiler(),
        "fastgrad": __version__,
        "threads": threads,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def package_version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _compiler() -> str | None:
    found = compiler_command()
    if found is None:
        return None
    said = subprocess.run([*found, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else None
