"""Generated packages as Python modules: from memory, and from a folder that `fastgrad compile` wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import linecache
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastgrad_dsl.documents import read_document
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
PACKAGE = "fastgrad_generated"


def load(folder: str | Path, *, seed: int = 0) -> nn.Module:
    """The model of a folder that `fastgrad compile` wrote: weights.safetensors if it is there, else initial weights.

    Raises TfgError FG419 where the folder is no compiled model, FG418 where its weights are not the model's.
    """
    path = Path(folder)
    package = load_package(path)
    model: nn.Module = package.MODEL(seed)
    weights = path / WEIGHTS
    if weights.exists():
        from fastgrad_dsl.weights import load_weights

        load_weights(model, weights)
    return model


def load_objective(folder: Path) -> Callable[..., Tensor] | None:
    """The objective of a compiled folder, None where its spec has none."""
    return getattr(load_package(folder), "OBJECTIVE", None)


def load_plan(folder: Path) -> dict[str, Any]:
    """plan.json of a compiled folder; TfgError FG419 where there is none, FG430 where it is not of its form."""
    if not (folder / PLAN).is_file():
        raise _not_compiled(folder, PLAN)
    return read_document(folder / PLAN, PLAN)


def load_package(folder: Path) -> ModuleType:
    """Import a compiled folder as a package of its own."""
    init = folder / "__init__.py"
    if not init.is_file() or not (folder / "model.py").is_file():
        raise _not_compiled(folder, "model.py")
    files = (file for file in sorted(folder.iterdir()) if file.suffix in (".py", ".cpp"))
    return package_from_texts({file.name: file.read_text(encoding="utf-8") for file in files})


def package_from_texts(files: Mapping[str, str]) -> ModuleType:
    """Import generated files, by name, as one package; the same texts give the same package.

    The sources stay visible to inspect, tracebacks and torch.compile.
    """
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
    name = f"{PACKAGE}_{digest}"
    if name not in sys.modules:
        finder = _TextFinder(name, files)
        sys.meta_path.append(finder)
        try:
            return importlib.import_module(name)
        finally:
            sys.meta_path.remove(finder)
    return sys.modules[name]


class _TextFinder:
    """Finds and loads the modules of one package from their texts, and gives what lies beside them."""

    def __init__(self, package: str, texts: Mapping[str, str]) -> None:
        self.package, self.texts = package, texts

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module of the package; None for any other."""
        package, _, module = name.partition(".")
        if package != self.package or f"{module or '__init__'}.py" not in self.texts:
            return None
        spec = ModuleSpec(name, self, origin=f"<{name}>", is_package=not module)  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module object."""

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's text, known to linecache by the name that tracebacks show."""
        text = self.texts[f"{module.__name__.partition('.')[2] or '__init__'}.py"]
        file = f"<{module.__name__}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), module.__dict__)

    def get_data(self, path: str) -> bytes:
        """A file of the package by its name; OSError where there is none."""
        if path not in self.texts:
            raise FileNotFoundError(path)
        return self.texts[path].encode()


def _not_compiled(folder: Path, missing: str) -> TfgError:
    help_ = ("write one with `fastgrad compile FILE -o DIR`",)
    return TfgError([Diagnostic("FG419", f"{folder} is no compiled model: it has no {missing}", help=help_)])
