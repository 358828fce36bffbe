"""Conversion of softmax attention to attention in linear time: a changed spec, attention transfer, tuning.

    from fastgrad_dsl.conversion import Form, Request, convert
    from fastgrad_dsl.training import Options

    request = Request(fg.compile("model.tfg"), weights, text, folder, Options(steps=200), Options(steps=200))
    report = convert(request)

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrad_dsl.conversion.document import Conversion as Conversion
    from fastgrad_dsl.conversion.run import Request as Request
    from fastgrad_dsl.conversion.run import convert as convert
    from fastgrad_dsl.conversion.spec import Form as Form

_HOMES = {
    "Conversion": "fastgrad_dsl.conversion.document",
    "Form": "fastgrad_dsl.conversion.spec",
    "Request": "fastgrad_dsl.conversion.run",
    "convert": "fastgrad_dsl.conversion.run",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
