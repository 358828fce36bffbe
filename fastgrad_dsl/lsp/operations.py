"""What the operations of the language do, by their rows in docs/language.md.

`python -m fastgrad_dsl.lsp.operations`, in a checkout, writes operations.json anew after a change of that table.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fastgrad_compiler.frontend.operations import NAMES, NEEDED, OPERATIONS, OVERLOADS, Operation, Parameter
from fastgrad_compiler.frontend.values import show

_TABLE = Path(__file__).with_name("operations.json")
_PAGE = Path(__file__).parents[2] / "docs" / "language.md"
_CODE = re.compile(r"`([^`]*)`")


class Row(NamedTuple):
    """A row of the table: how the operation is written, and what it gives, in Markdown."""

    form: str
    meaning: str


@lru_cache(maxsize=1)
def rows() -> dict[str, Row]:
    """The row of each operation that the table has."""
    known = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: Row(*row) for name, row in known.items()}


def rows_of(page: str) -> dict[str, Row]:
    """The rows of the table `operation | gives` in the text of docs/language.md."""
    table = page[page.index("| operation | gives |") :].split("\n\n", 1)[0]
    found: dict[str, Row] = {}
    for line in table.splitlines()[2:]:
        form, meaning = (cell.replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:3])
        forms = _CODE.findall(form)
        names = [re.match(r"\w+", each) for each in forms]
        listed = forms[0].split() if "(" not in forms[0] else [each[0] for each in names if each]
        for name in (each for each in listed if each in NAMES):
            found.setdefault(name, Row(form.strip(), meaning.strip()))
    return found


def operation_forms(name: str) -> tuple[Operation, ...]:
    """The operations that a name stands for: `min` and `max` are two each."""
    if name in OVERLOADS:
        return tuple(OVERLOADS[name])
    return (OPERATIONS[name],) if name in OPERATIONS else ()


def parameter_text(parameter: Parameter) -> str:
    """`axis = -1`."""
    default = parameter.default
    if default is NEEDED:
        return parameter.name
    known = show(default) if default is None or isinstance(default, bool | int | float | str) else "..."
    return f"{parameter.name} = {known}"


def operation_signature(operation: Operation) -> str:
    """`softmax(x; axis = -1)`."""
    tensors = [parameter_text(each) for each in operation.parameters if each.is_tensor]
    given = [parameter_text(each) for each in operation.parameters if not each.is_tensor]
    separator = "; " if tensors and given else ""
    return f"{operation.name}({', '.join(tensors)}{separator}{', '.join(given)})"


if __name__ == "__main__":
    table = rows_of(_PAGE.read_text(encoding="utf-8"))
    _TABLE.write_text(
        json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
