"""The short form of `make attack`: a few programs of fixed seeds, and every finding that was kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from attack.cases import Undecided
from attack.findings import examine, read
from attack.run import ALL, Attack
from tests.grids import wide

REGRESSIONS = Path(__file__).parent / "regressions"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", wide(range(1, 7), few=(1, 2)))
def test_nothing_is_found_in_a_few_programs(seed: int) -> None:
    attack = Attack(seed, ALL)
    found = [
        f"({kept.check}) {kept.kind}: {kept.message}\n{kept.text}"
        for kept in attack.program(seed, minimise=0.0)
    ]
    assert not found, "\n".join(found)
    assert attack.done["a"] > 0


@pytest.mark.medium
@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.tfg")), ids=lambda path: path.stem)
def test_what_was_found_stays_mended(path: Path) -> None:
    check, case = read(path)
    try:
        found = examine(check, case)
    except Undecided:
        return  # the text has no value here any more, and claims none
    assert found is None, f"({found.check}) {found.kind}: {found.message}"
