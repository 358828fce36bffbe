"""An import inside a function defers what is slow to load or not everywhere there, and nothing else.

`make lint` asserts that no modules import each other in a circle, wherever their imports stand.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"fastgrad_grammar": "grammar", "fastgrad_compiler": "compiler", "fastgrad_dsl": "."}
MODULES = {
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
    for package, folder in FOLDERS.items()
    for path in (ROOT / folder / package).rglob("*.py")
}
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "jinja2",
    "jsonschema",
    "markupsafe",
    "msgspec",
    "pygments",
    "referencing",
    "rich",
}
ABSENT = {"triton", "tokenizers", "transformers", "grp", "pwd"}  # not there on every machine
SLOW = {"torch.distributed.tensor"}  # half a second more than torch alone
LINE = "fastgrad_dsl.commands.line."  # each command loads its own half there


def found(module: str, tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(name, whether inside a function) of each module that is imported when a program runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = f"{module.rpartition('.')[0]}.{node.module}" if node.level else str(node.module)
            names = [f"{home}.{alias.name}" for alias in node.names]
            yield from ((name if name in MODULES else home, inside) for name in names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from found(module, node, inside or isinstance(node, ast.FunctionDef))


@cache
def imports(module: str) -> frozenset[tuple[str, bool]]:
    return frozenset(found(module, ast.parse(MODULES[module].read_text(encoding="utf-8"))))


@cache
def loaded(module: str) -> frozenset[str]:
    """The heavy packages that come with a module, at the latest with those that it imports."""
    seen, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in seen:
            waiting += [each for each, inside in imports(name) if not inside]
            waiting.append(name.rpartition(".")[0])
        seen.add(name)
    return frozenset(name.partition(".")[0] for name in seen) & HEAVY


def test_an_import_inside_a_function_defers_something() -> None:
    needless = []
    for module in sorted(each for each in MODULES if not each.startswith(LINE)):
        for name, inside in imports(module):
            package = name.partition(".")[0]
            if inside and not {name, package} & (ABSENT | SLOW):
                deferred = loaded(name) if name in MODULES else {package} & HEAVY
                if not deferred - loaded(module):
                    needless.append(f"{module} may import {name} at its head")
    assert not needless


def test_what_is_deferred_is_seen() -> None:
    assert loaded("fastgrad_compiler.reference.oracle") == {"numpy"}
    assert not loaded("fastgrad_compiler.pipeline")
    assert "torch" in loaded("fastgrad_dsl.functional")
