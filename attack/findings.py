"""Findings: a case under a check, and the file in which a finding is kept as a regression test."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attack.cases import Array, Case, Finding, Undecided, run_meaning
from attack.check_agreement import check_agreement
from attack.check_bounds import check_bounds
from attack.check_errors import check_errors
from attack.check_guards import check_guards
from attack.check_texts import check_texts
from attack.minimise import minimise
from fastgrad_compiler.ir.graph import Node
from fastgrad_grammar.diagnostics import TfgError

CHECKS: dict[str, Callable[[Case], None]] = {
    "a": check_agreement,
    "b": check_bounds,
    "c": check_errors,
    "d": check_guards,
    "e": check_texts,
}
CRASH = "a traceback"  # the kind of a finding begins so where something other than a diagnostic was raised
_HEADER = re.compile(r"# attack: check (\w), seed (\d+), sizes((?: \w+=\d+)*)\n")


@dataclass(frozen=True)
class Kept:
    """A finding with its case."""

    check: str
    kind: str
    message: str
    case: Case

    @property
    def text(self) -> str:
        """The file that keeps it."""
        sizes = "".join(f" {name}={size}" for name, size in self.case.sizes.items())
        said = "\n".join(f"# {line}" for line in f"{self.kind}: {self.message}".splitlines())
        return f"# attack: check {self.check}, seed {self.case.seed}, sizes{sizes}\n{said}\n{self.case.text}"

    @property
    def name(self) -> str:
        """A name for the file."""
        words = re.sub(r"[^a-z0-9]+", "_", self.kind.lower()).strip("_")[:50]
        return f"{self.check}_{words}_{self.case.seed}"


def read(path: Path) -> tuple[str, Case]:
    """The check and the case of a kept finding. Raises ValueError for another file."""
    text = path.read_text(encoding="utf-8")
    found = _HEADER.match(text)
    if found is None:
        raise ValueError(f"{path} does not begin with the line of a kept finding")
    sizes = {name: int(size) for name, size in (part.split("=") for part in found[3].split())}
    return found[1], Case(text, sizes, int(found[2]))


def examine(check: str, case: Case) -> Kept | None:
    """What a check finds in a case; None where all holds. Raises Undecided where nothing can be said."""
    _has_meaning(case)
    try:
        CHECKS[check](case)
    except Finding as found:
        return Kept(check, found.kind, found.message, case)
    except Undecided:
        raise
    except TfgError as error:
        raise Undecided(f"a diagnostic, {error.diagnostics[0].code}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "fastgrad" in f.filename or "attack" in f.filename]
        own = (ours or frames)[-1]
        kind = f"{CRASH}, {type(error).__name__} in {Path(own.filename).stem}.{own.name}"
        return Kept(check, kind, str(error).splitlines()[0] if str(error) else "", case)
    return None


def _has_meaning(case: Case) -> None:
    """Raises Undecided where the text has no value here: an id beyond a table, an int of what is not finite."""
    finite: dict[str, bool] = {}

    def watch(path: str, node: Node, value: Array) -> None:
        finite[path] = bool(np.isfinite(value).all())
        if node.op == "cast" and node["dtype"] == "int":
            before, _, after = path.rpartition(node.name)
            if not finite.get(f"{before}{node.inputs[0]}{after}", True):
                raise Undecided("an int of what is not finite")

    try:
        run_meaning(case.elaborated, case.point, watch)
    except ValueError as error:
        raise Undecided(f"no value: {error}") from None
    except Undecided:
        raise
    except Exception:  # the checks will meet it
        return


def smallest(found: Kept, seconds: float) -> Kept:
    """The finding with a case that is as small as the time allows."""
    failed = [found]

    def fails(case: Case) -> bool:
        with suppress(Undecided):
            again = examine(found.check, case)
            if again is not None and again.kind == found.kind:
                failed.append(again)
                return True
        return False

    minimise(found.case, fails, seconds)
    return failed[-1]
