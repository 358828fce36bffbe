"""The demonstration: phases that say how long they take, a sample as soon as a model is trained, ways on from there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_tutorial import run

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SHORT = ("--minutes", "0.02", "--tokens", "128", "--no-recall")


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, DEMO, *SHORT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    places = [
        done.stdout.find(text) for text in ("─ 2. train gpt", "sample (", "─ 3. train softmax", "─ 6. ")
    ]
    assert -1 < places[0] < places[1] < places[2] < places[3], done.stdout
    headings = re.findall(r"^─+ \d\. .* ─+\n(.*)", done.stdout, re.MULTILINE)
    assert all(line.startswith("takes ") for line in headings[:-1]), headings
    (command,) = re.findall(r"fastgrad (generate .*)", done.stdout)
    monkeypatch.chdir(tmp_path)
    assert run(["fastgrad", *shlex.split(command), "--tokens", "3"])
    for file in re.findall(r"^(?:open|read|write) .*  (\S+)$", done.stdout, re.MULTILINE):
        assert Path(file).is_file(), file
