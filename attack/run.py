"""`python -m attack.run --minutes 60 --seed 7 --checks abcde`: programs until the time is up, findings as files."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

from attack.cases import Case, Undecided, sizes_of
from attack.findings import CHECKS, Kept, examine, smallest
from attack.operations import RULES
from attack.programs import grow

REGRESSIONS = Path(__file__).parent.parent / "tests" / "attack" / "regressions"
ALL = "".join(CHECKS)
STRIDE = 1_000_003  # between the programs of two seeds
SIZES = 2  # of each program
MINIMISE = 40.0  # seconds for a finding


@dataclass
class Attack:
    """A run: what was tried, and one finding of each kind."""

    seed: int
    checks: str = ALL
    found: dict[tuple[str, str], Kept] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    undecided: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tried: int = 0
    programs: int = 0

    def program(self, seed: int, minimise: float = MINIMISE) -> Iterator[Kept]:
        """Grow one program and put its claims to the test; the kinds of findings that are new."""
        grown = grow(seed)
        self.programs += 1
        self.used, self.refused = self.used + grown.used, self.refused + grown.refused
        self.tried += grown.tried
        for salt in range(SIZES):
            sizes = sizes_of(grown.text, random.Random(seed * SIZES + salt))
            case = Case(grown.text, sizes, seed)
            for check in self.checks:
                if salt and check == "e":
                    continue  # says nothing of sizes
                found = self._examine(check, case)
                if found is None:
                    continue
                self.again[f"({found.check}) {found.kind}"] += 1
                if (found.check, found.kind) not in self.found:
                    self.found[found.check, found.kind] = found
                    yield smallest(found, minimise) if minimise else found

    def _examine(self, check: str, case: Case) -> Kept | None:
        self.done[check] += 1
        try:
            return examine(check, case)
        except Undecided as error:
            self.undecided[f"({check}) {error}"] += 1
            return None

    def lines(self) -> Iterator[str]:
        """What was done, in words."""
        counts = ", ".join(f"({check}) {count:,}" for check, count in sorted(self.done.items()))
        yield f"{self.programs:,} programs, examined {counts}"
        for reason, count in self.undecided.most_common(8):
            yield f"  undecided: {count:,} times {reason}"
        share = sum(self.refused.values()) / max(self.tried, 1)
        yield f"  {self.tried:,} statements tried, {share:.1%} not well typed"
        least = sorted(RULES, key=lambda name: self.used[name])[:8]
        yield "  used least: " + ", ".join(f"{name} {self.used[name]}" for name in least)
        for kind, count in self.again.most_common():
            yield f"  found {count:,} times: {kind}"


def main(arguments: list[str] | None = None) -> int:
    """Attack for a time; the exit status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="attack", description=__doc__)
    option = parser.add_argument
    option("--minutes", type=float, default=60.0, help="of processor time: the machine may be busy")
    option("--seed", type=int, default=None, help="drawn and printed where it is not given")
    option("--checks", default=ALL, help=f"some of {ALL}: see CONTRIBUTING.md")
    option("--out", type=Path, default=REGRESSIONS, help="the folder for findings")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    print(f"attack with seed {seed}: {given.minutes:g} minutes, checks {given.checks}", flush=True)
    attack = Attack(seed, given.checks)
    deadline = time.process_time() + 60.0 * given.minutes
    while time.process_time() < deadline:
        for found in attack.program(seed * STRIDE + attack.programs):
            given.out.mkdir(parents=True, exist_ok=True)
            path = given.out / f"{found.name}.tfg"
            path.write_text(found.text, encoding="utf-8")
            said = f"({found.check}) {found.kind}\n  {found.message}\n  kept as {path}"
            print(f"\nfound {said}\n{found.case.text}", flush=True)
    print("\n".join(attack.lines()))
    print(f"seed {seed}: {f'{len(attack.found)} kinds of findings' if attack.found else 'nothing was found'}")
    return 1 if attack.found else 0


if __name__ == "__main__":
    logging.getLogger("fastgrad").setLevel(logging.ERROR)  # a guard's warning is what is looked for
    warnings.filterwarnings("ignore")
    sys.exit(main())
