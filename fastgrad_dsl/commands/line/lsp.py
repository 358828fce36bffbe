"""`fastgrad lsp`: the language server."""

from __future__ import annotations

from fastgrad_grammar.diagnostics import TfgError


def lsp() -> None:
    """Serve an editor that speaks the Language Server Protocol, on the standard input and output.

    Needs the extra `lsp`: pip install 'fastgrad-dsl[lsp]'.
    """
    try:
        from fastgrad_dsl.lsp.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("pygls", "lsprotocol"):
            raise
        help_ = "pip install 'fastgrad-dsl[lsp]'"
        raise TfgError.of("FG438", f"`fastgrad lsp` needs the library {error.name}", help_) from None
    serve()
