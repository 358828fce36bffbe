"""The example notebooks run from top to bottom, and show what they say that they show."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

nbclient = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")
nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
pytest.importorskip("ipykernel", reason="the extra `docs` is not installed")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
SHOWN = {"report": ["<svg", "measured on one batch of 1,024 tokens", '<pre style="overflow-x'], "degrees": []}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(
        cell.get("outputs") for cell in notebook.cells
    )  # outputs are not kept: they would grow old
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
        client.execute()
    html = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    for text in SHOWN[name]:
        assert any(text in each for each in html), text
