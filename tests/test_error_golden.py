"""Every bad file of golden/errors is answered with exactly the text beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Golden
from tests.golden_errors import ERRORS, diagnose

FILES = sorted(ERRORS.glob("*.tfg"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_diagnostics_are_exactly_the_golden_ones(path: Path, golden: Golden) -> None:
    golden(path.with_suffix(".out"), diagnose(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_shows_the_code_that_its_name_says(path: Path) -> None:
    """`fg102_unclosed_brace.tfg` must be answered with FG102."""
    assert f"[{path.stem.split('_')[0].upper()}]" in path.with_suffix(".out").read_text(encoding="utf-8")


def test_every_golden_output_has_its_file() -> None:
    assert {path.stem for path in ERRORS.glob("*.out")} == {path.stem for path in FILES}
