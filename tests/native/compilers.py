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
import torch

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "compiler", "grammar"))
TORCH = Path(torch.__file__).parent
STAND_IN = f"""
import ctypes, types
__version__ = {torch.__version__!r}
ops = types.SimpleNamespace(load_library=ctypes.CDLL, fastgrad=types.SimpleNamespace())
"""
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
        ours = {"PYTHONPATH": PATHS, "CXX": str(self.folder / "compiler"), "FASTGRAD_CACHE": str(self.cache)}
        return {**os.environ, "FASTGRAD_NATIVE": "1", "FASTGRAD_QUIET": "1", **ours}

    def write_compiler(self, body: str = "") -> None:
        """A compiler that notes each compilation, then does what `body` says, a shell script, before it is g++.

        It does not optimise, whatever it is asked: what is built here is hardly run.
        """
        path = self.folder / "compiler"
        count = f'case " $* " in *" -c "*) echo "$*" >> "{self.folder}/compilations";; esac'
        path.write_text(f'#!/bin/sh\n{count}\n{body}\nexec g++ "$@" -O0\n')
        path.chmod(0o755)

    @property
    def compilations(self) -> list[str]:
        """The arguments of each compilation so far."""
        log = self.folder / "compilations"
        return log.read_text().splitlines() if log.exists() else []

    def libraries(self) -> list[Path]:
        """What the cache holds."""
        return sorted(self.cache.glob("*.so"))

    @property
    def without_torch(self) -> dict[str, str]:
        """That of a process which starts at once: it has of PyTorch what a build needs, and loads libraries itself."""
        package = self.folder / "stand-in" / "torch"
        if not package.exists():
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(STAND_IN)
            for part in ("include", "lib"):
                (package / part).symlink_to(TORCH / part)
        return {**self.environment, "PYTHONPATH": os.pathsep.join((str(package.parent), PATHS))}

    def run(
        self,
        code: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        with_torch: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own, which must end well."""
        given = {**(self.environment if with_torch else self.without_torch), **(environment or {})}
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Start Python code in a process of its own."""
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command, env=self.without_torch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
