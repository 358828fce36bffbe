"""What `make demo` measures, as a section of the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.settings import ROOT, Settings, heading, say


def measure(settings: Settings) -> dict[str, object]:
    """The section `demo`: minutes of training and of recall (seconds in a quick run), in a process of its own."""
    say("the demonstration")
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "demo.json"
        quick = ["--minutes", "0.05", "--tokens", "128", "--no-recall"] if settings.quick else []
        command = [
            sys.executable,
            str(ROOT / "examples" / "demo.py"),
            "--json",
            str(numbers),
            "--out",
            f"{folder}/gpt",
            *quick,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        found: dict[str, object] = json.loads(numbers.read_text())
    return {**heading(settings), **found}
