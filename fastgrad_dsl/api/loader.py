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
from typing import TYPE_CHECKING, SupportsIndex

from fastgrad_dsl.documents.plan import Plan
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.storage.build_folder import recover
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
MODEL = "model"  # in the folder of a training run, what `compile` would have written
PACKAGE = "fastgrad_generated"


def load(folder: str | Path, *, seed: int = 0) -> nn.Module:
    """The model of a folder that `fastgrad compile` wrote: with weights.safetensors if it exists, else initial weights.

    The folder of a training run also works, with the weights of its last checkpoint. Raises TfgError FG419 if the
    folder is not a compiled model, or is a run without weights yet, and FG418 if its weights are not the model's.
    """
    path = Path(folder)
    package = load_package(path)
    weights = path / WEIGHTS
    if built(path) != path and not weights.exists():
        raise _not_compiled(path, WEIGHTS)
    model: nn.Module = package.MODEL(seed)
    if weights.exists():
        from fastgrad_dsl.storage.weights import load_weights

        load_weights(model, weights)
    return model


def built(folder: Path) -> Path:
    """The folder that `compile` wrote: this one, or the one in the folder of a training run."""
    inside = folder / MODEL
    is_run = (inside / "model.py").is_file() and not (folder / "model.py").exists()
    return inside if is_run else folder


def load_objective(folder: Path) -> Callable[..., Tensor] | None:
    """The objective of a compiled folder, None where its spec has none."""
    return getattr(load_package(folder), "OBJECTIVE", None)


def load_plan(folder: Path) -> Plan:
    """plan.json of a compiled folder; TfgError FG419 if there is none, FG430 if it does not match its schema."""
    _restore(folder)
    folder = built(folder)
    if not (folder / PLAN).is_file():
        raise _not_compiled(folder, PLAN)
    return read_document(folder / PLAN, Plan)


def load_package(folder: Path) -> ModuleType:
    """Import a compiled folder as a package of its own.

    Raises TfgError FG419 if it is not one, or if its code, which anybody may have changed, does not load.
    """
    _restore(folder)
    folder = built(folder)
    init = folder / "__init__.py"
    if not init.is_file() or not (folder / "model.py").is_file():
        raise _not_compiled(folder, "model.py")
    there = sorted(file for file in folder.iterdir() if file.is_file())  # a pipe would be waited for
    files = (file for file in there if file.suffix in (".py", ".cpp"))
    try:
        package = package_from_texts({file.name: file.read_text(encoding="utf-8") for file in files})
        package.MODEL  # noqa: B018 (is it there?)
    except Exception as error:
        message = f"{folder} does not load: {type(error).__name__}: {error}"
        raise TfgError.of("FG419", message, "compile the spec again") from error
    return package


def package_from_texts(files: Mapping[str, str]) -> ModuleType:
    """Import generated files, by name, as one package; the same texts give the same package.

    The sources stay visible to inspect, tracebacks and torch.compile. A pickle of one of its modules holds the texts,
    which are imported where it is read.
    """
    return _Package(dict(files)).imported()


class _Package:
    """Finds and loads the modules of one package from their texts, and gives what lies beside them."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()[:16]
        self.name = f"{PACKAGE}_{digest}"

    def imported(self) -> ModuleType:
        """The package, executed once per process."""
        if self.name not in sys.modules:
            sys.meta_path.append(self)
            try:
                return importlib.import_module(self.name)
            finally:
                sys.meta_path.remove(self)
        return sys.modules[self.name]

    def __reduce__(self) -> tuple[object, ...]:
        return _Package, (self.texts,)

    def __deepcopy__(self, memo: object) -> _Package:
        return self

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module of the package; None for any other."""
        package, _, module = name.partition(".")
        if package != self.name or f"{module or '__init__'}.py" not in self.texts:
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
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                _carry_texts(value, self)

    def get_data(self, path: str) -> bytes:
        """A file of the package by its name; OSError where there is none."""
        if path not in self.texts:
            raise FileNotFoundError(path)
        return self.texts[path].encode()


def _restore(folder: Path) -> None:
    """Put a folder back whose replacement by a compile was cut short."""
    if not folder.exists():
        recover(folder)


def _carry_texts(cls: type, package: _Package) -> None:
    """Have pickles of a class of modules hold its package, since no other process can import that by its name.

    A subclass is pickled as its own text says.
    """
    from torch import nn

    def reduce(module: nn.Module, protocol: SupportsIndex) -> object:
        usual = object.__reduce_ex__(module, max(2, protocol.__index__()))
        if type(module) is not cls or isinstance(usual, str):
            return usual
        return (_remade, (package, cls.__module__.rpartition(".")[2], cls.__qualname__), *usual[2:])

    if issubclass(cls, nn.Module):
        cls.__reduce_ex__ = reduce  # type: ignore[method-assign, assignment]


def _remade(package: _Package, module: str, name: str) -> nn.Module:
    """A module without its state, of a package that is imported where need be."""
    package.imported()
    cls = getattr(sys.modules[f"{package.name}.{module}"], name)
    made: nn.Module = cls.__new__(cls)
    return made


def _not_compiled(folder: Path, missing: str) -> TfgError:
    help_ = ("write one with `fastgrad compile FILE -o DIR`",)
    return TfgError.of("FG419", f"{folder} is not a compiled model: it has no {missing}", *help_)
