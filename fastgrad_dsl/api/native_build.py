"""Building the C++ kernels of a compiled model ahead of its first call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from fastgrad_grammar.diagnostics import Diagnostic

AHEAD = "float32"  # the variant that is built; others are built when a model of their dtype first runs


def build_kernels(files: Mapping[str, str], tell: Callable[[str], None]) -> Diagnostic | None:
    """Build the kernels among generated files for this machine, as many at a time as it has processors.

    `tell` hears of each that is not in the cache yet, from any thread.

    A warning, FG422, where that cannot be done: the model runs all the same.
    """
    from fastgrad_compiler.runtime import native

    if not native.enabled():
        return Diagnostic("FG422", "native kernels are not built: FASTGRAD_NATIVE is 0", severity="warning")
    texts = {name.removesuffix(".cpp"): text for name, text in files.items() if name.endswith(".cpp")}
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        built = [workers.submit(native.build, name, text, AHEAD, tell) for name, text in texts.items()]
    for kernel in built:
        if isinstance(error := kernel.exception(), native.NativeError):
            message = f"native kernels cannot be built: {error}"
            help_ = ("the model still runs, as with --target torch",)
            return Diagnostic("FG422", message, help=help_, severity="warning")
        kernel.result()
    return None
