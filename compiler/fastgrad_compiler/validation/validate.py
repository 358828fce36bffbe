"""Whether a pass kept the meaning of a program: the program before and after it, run on small random inputs.

Graphs are compared one by one, each on inputs of its own: where the claims of each hold (`validation/structure.py`),
the two programs agree, however deep. A value that is claimed is computed from what the program *before* the pass gives
for everything around, so that a rounding error is never amplified by what comes later. `oracle.py` runs both; it shares
no code with the passes.

What the earlier program leaves undefined, NaN, the later one may define: exp(s) / sum exp(s) of a hidden row. An
infinity must stay one. Runs where an intermediate value nears the end of float64 are repeated with smaller inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import print_program
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.validation.cases import Case
from fastgrad_compiler.validation.cone import Pair
from fastgrad_compiler.validation.runs import Checked, Difference, Pass, compare_graphs
from fastgrad_compiler.validation.structure import Claim, SignatureChanged, pairs
from fastgrad_grammar.quote import python_docstring

__all__ = ["Checked", "Difference", "compare", "told", "validate"]

REMEMBERED = 32  # pairs of programs of this process that agree


def validate(before: Program, after: Program, name: str, again: Pass | None = None) -> tuple[Checked, ...]:
    """Compare the programs before and after the pass `name`, graph by graph; what was compared of those that changed.

    `again` runs the pass, for a graph whose sizes are made smaller before it can be run at all. Programs that were
    found to agree once are not compared anew.
    Raises CompilerBug, which names the pass, the graph, the node and its place in the source, and a file that
    reproduces the difference.
    """
    key = before, after
    if key not in _AGREED:
        checked = []
        for found in compare(before, after, again):
            if isinstance(found, Difference):
                raise CompilerBug(_message(before, after, name, found))
            checked.append(found)
        while len(_AGREED) >= REMEMBERED:
            _AGREED.pop(next(iter(_AGREED)))
        _AGREED[key] = tuple(checked)
    return _AGREED[key]


_AGREED: dict[tuple[Program, Program], tuple[Checked, ...]] = {}


def compare(
    before: Program, after: Program, again: Pass | None = None, seed: int = 0
) -> Iterator[Checked | Difference]:
    """For each graph that changed, what was compared, or the first difference; another `seed` draws other inputs."""
    try:
        for old, new, found in pairs(before, after):
            if found.claims:
                free = old.name in (before.main, before.objective)
                yield compare_graphs(Pair(before, after, old, new, found, free), again, seed)
    except SignatureChanged as error:
        claim = Claim("return", "return", "return")
        yield Difference(before.main, claim, "", Case({}), f"a graph changed its signature: {error}")


# ---------------------------------------------------------------- what is told


def _message(before: Program, after: Program, name: str, found: Difference) -> str:
    where = _write(_reproducer(before, after, name, found), name)
    return f"after {name}: {told(found)}. {where}"


def told(found: Difference) -> str:
    """What differs, on which inputs, in a sentence."""
    sizes = ", ".join(f"{key} = {size}" for key, size in found.case.sizes.items())
    given = f"inputs {found.case.style}, seed {found.case.seed}, sizes {sizes or 'none'}"
    value = f"{found.graph}.{found.claim.old}" + (f" ({found.place})" if found.place else "")
    return f"{value} is not what it was, on {given}: {found.text}"


def _reproducer(before: Program, after: Program, name: str, found: Difference) -> str:
    return f'''"""After {name}, {python_docstring(told(found))}.

Run this file: it compares the program before the pass with what the pass made of it, and, where the pass needs nothing
but the program, with what it makes of it now. It ends with status 1 where it finds a difference.
"""

from fastgrad_compiler.pipeline import reproduce

BEFORE = {_literal(print_program(before))}
AFTER = {_literal(print_program(after))}

if __name__ == "__main__":
    raise SystemExit(reproduce(BEFORE, AFTER, {name!r}))
'''


def _literal(text: str) -> str:
    """A program's text as a readable literal."""
    return "(\n" + "".join(f"    {line!r}\n" for line in text.splitlines(keepends=True)) + ")"


def _write(text: str, name: str) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"fastgrad-{name}-", suffix=".py", delete=False
        ) as file:
            file.write(text)
    except OSError as error:
        return f"No file that reproduces it could be written: {error}"
    return f"{Path(file.name)} reproduces it"
