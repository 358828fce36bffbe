"""What every section of the benchmark is told, and what every section's entry in the JSON begins with."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastgrad_dsl.bench.machine import describe_machine

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Settings:
    """target: of the polynomial attention; seconds: for the passes of one contender at one place; quick: tiny sizes,
    to try the benchmark and not to learn from."""

    target: str = "auto"
    threads: int = 2
    repeats: int = 5
    seconds: float = 30.0
    quick: bool = False


def heading(settings: Settings) -> dict[str, object]:
    """Machine, versions, day and command."""
    return {
        "machine": describe_machine(settings.threads),
        "target": settings.target,
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "quick": settings.quick,
    }


def say(what: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
