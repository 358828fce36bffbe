"""Compilers that count what they are asked to compile, or cannot do it, and processes that use them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@dataclass(frozen=True)
class Builder:
    """A folder with a compiler of its own and a cache."""

    folder: Path

    @property
    def cache(self) -> Path:
        """Where its libraries go."""
        return self.folder / "cache"

    @property
    def environment(self) -> dict[str, str]:
        """That of a process which builds here."""
        paths = os.pathsep.join(str(ROOT / part) for part in (".", "compiler", "grammar"))
        ours = {"PYTHONPATH": paths, "CXX": str(self.folder / "compiler"), "FASTGRAD_CACHE": str(self.cache)}
        return {**os.environ, "FASTGRAD_NATIVE": "1", "FASTGRAD_QUIET": "1", **ours}

    def write_compiler(self, body: str = "") -> None:
        """A compiler that notes each compilation, then does what `body` says, a shell script, before it is g++."""
        path = self.folder / "compiler"
        count = f'case " $* " in *" -c "*) echo "$*" >> "{self.folder}/compilations";; esac'
        path.write_text(f'#!/bin/sh\n{count}\n{body}\nexec g++ "$@"\n')
        path.chmod(0o755)

    @property
    def compilations(self) -> list[str]:
        """The arguments of each compilation so far."""
        log = self.folder / "compilations"
        return log.read_text().splitlines() if log.exists() else []

    def libraries(self) -> list[Path]:
        """What the cache holds."""
        return sorted(self.cache.glob("*.so"))

    def run(
        self, code: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own, which must end well."""
        given = {**self.environment, **(environment or {})}
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Start Python code in a process of its own."""
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
