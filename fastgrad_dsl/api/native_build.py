"""Building the C++ kernels of a compiled model ahead of its first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastgrad_grammar.diagnostics import Diagnostic

AHEAD = "float32"  # the variant that is built; others are built when a model of their dtype first runs


def build_kernels(files: Mapping[str, str], tell: Callable[[str], None]) -> Diagnostic | None:
    """Build the kernels among generated files for this machine; `tell` hears of each that is not in the cache yet.

    A warning, FG422, where that cannot be done: the model runs all the same.
    """
    from fastgrad_compiler.runtime import native

    if not native.enabled():
        return Diagnostic("FG422", "native kernels are not built: FASTGRAD_NATIVE is 0", severity="warning")
    for file, text in files.items():
        name, _, suffix = file.rpartition(".")
        if suffix != "cpp":
            continue
        try:
            native.build(name, text, AHEAD, tell)
        except native.NativeError as error:
            message = f"native kernels cannot be built: {error}"
            help_ = ("the model runs all the same, as with --target torch",)
            return Diagnostic("FG422", message, help=help_, severity="warning")
    return None
