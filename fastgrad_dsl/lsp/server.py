"""The wiring: which request is answered by what. Of a defect, the editor gets a line in its log and no answer."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer

from fastgrad_dsl import __version__
from fastgrad_dsl.lsp.analysis import Analysis
from fastgrad_dsl.lsp.completion import complete
from fastgrad_dsl.lsp.fixes import fixes
from fastgrad_dsl.lsp.hints import hints
from fastgrad_dsl.lsp.hover import hover
from fastgrad_dsl.lsp.layout import folding, formatting
from fastgrad_dsl.lsp.lenses import lenses
from fastgrad_dsl.lsp.navigation import definition, highlights, references
from fastgrad_dsl.lsp.outline import outline
from fastgrad_dsl.lsp.positions import path_of
from fastgrad_dsl.lsp.problems import Problems, problems_of
from fastgrad_dsl.lsp.rename import Refused, prepare, rename
from fastgrad_dsl.lsp.signature_help import signature_help
from fastgrad_dsl.lsp.tokens import LEGEND, semantic_tokens
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.workspace import Workspace

DELAY = 0.03
"""Seconds after a keystroke before a check starts: those of one word are one check."""
REQUEST_FAILED = types.LSPErrorCodes.RequestFailed.value
_STACK = 256 << 20  # bytes of address space for the thread that checks: deep programs recurse

logger = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


class Server(LanguageServer):
    """The language server of one editor."""

    def __init__(self) -> None:
        super().__init__("fastgrad", __version__)
        self.known = Workspace()
        self.problems = Problems()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        before = threading.stack_size(_STACK)
        self._checker = ThreadPoolExecutor(1, "check")
        self._checker.submit(lambda: None).result()  # the thread is made now, with that stack
        threading.stack_size(before)

    def report_server_error(self, error: Exception, source: object) -> None:
        """Errors of the protocol are for the log; what is refused was answered."""
        if not isinstance(error, JsonRpcException) or error.code != REQUEST_FAILED:
            logger.error("%s: %s", type(error).__name__, error)

    # ------------------------------------------------------------ checking

    def changed(self, path: str) -> None:
        """Check a document soon, and the documents that use it."""
        for each in self.known.affected(path) or [path]:
            timer = self._timers.pop(each, None)
            if timer is not None:
                timer.cancel()
            self._timers[each] = asyncio.get_running_loop().call_later(DELAY, self._start, each)

    def _start(self, path: str) -> None:
        self._timers.pop(path, None)
        task = asyncio.get_running_loop().create_task(self._check(path))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, path: str) -> None:
        if path not in self.known.documents:
            return
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._checker, self.known.analyse, path)
        except Exception as error:
            _log(error)
            return
        if self.known.settle(path, found):
            self._show(found)

    def _show(self, found: Analysis) -> None:
        shown = problems_of(found, self.known.uri, self.known.encoding)
        self.publish(self.problems.replace(found.source.path, shown))
        asked = self.client_capabilities.workspace
        if asked is not None and asked.inlay_hint is not None and asked.inlay_hint.refresh_support:
            self.workspace_inlay_hint_refresh(None)
        if asked is not None and asked.code_lens is not None and asked.code_lens.refresh_support:
            self.workspace_code_lens_refresh(None)

    def publish(self, paths: list[str]) -> None:
        """Show what is wrong in files."""
        for path in paths:
            document = self.known.documents.get(path)
            self.text_document_publish_diagnostics(
                types.PublishDiagnosticsParams(
                    self.known.uri(path), self.problems.of(path), document.version if document else None
                )
            )

    # ------------------------------------------------------------ answering

    def answer(self, uri: str, ask: Callable[[View], _Answer]) -> _Answer | None:
        """The answer of a feature about a document; None where it is not open, or where the feature has a defect."""
        try:
            view = self.known.view(path_of(uri)) if path_of(uri) in self.known.documents else None
            return ask(view) if view is not None else None
        except Refused as reason:
            raise JsonRpcException(str(reason), REQUEST_FAILED) from None
        except Exception as error:
            _log(error)
            return None


def _log(error: Exception) -> None:
    """A defect of the server in one line, with where it arose: editors show the log to users."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    logger.error(
        "this is a bug in fastgrad, please report it: %s at %s: %s", type(error).__name__, place, error
    )


def make_server() -> Server:
    """A server with all its features."""
    server = Server()
    _documents(server)
    _repairs(server)
    _navigation(server)
    _writing(server)
    _showing(server)
    return server


def serve() -> None:
    """Serve an editor on the standard input and output, until it says that it is done."""
    logging.basicConfig(level=logging.WARNING, format="fastgrad lsp: %(message)s")
    logging.getLogger("pygls").setLevel(logging.CRITICAL)  # it logs what is refused with a traceback
    with open(
        os.dup(sys.stdout.fileno()), "wb"
    ) as output:  # which the server closes; the command's own stays open
        make_server().start_io(stdout=output)


def _documents(server: Server) -> None:
    @server.feature(types.INITIALIZED)
    def initialized(params: types.InitializedParams) -> None:
        encoding = server.workspace.position_encoding
        server.known.encoding = str(getattr(encoding, "value", encoding) or "utf-16")
        folders = [folder.uri for folder in server.workspace.folders.values()]
        roots = folders or [uri for uri in (server.workspace.root_uri,) if uri]
        server.known.roots = tuple(map(path_of, roots))

    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    def opened(params: types.DidOpenTextDocumentParams) -> None:
        _take(server, params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    def changed(params: types.DidChangeTextDocumentParams) -> None:
        _take(server, params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_SAVE)
    def saved(params: types.DidSaveTextDocumentParams) -> None:
        server.changed(path_of(params.text_document.uri))

    @server.feature(types.WORKSPACE_DID_CHANGE_WATCHED_FILES)
    def watched(params: types.DidChangeWatchedFilesParams) -> None:
        for change in params.changes:
            for path in server.known.affected(path_of(change.uri)):
                server.changed(path)

    @server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
    def closed(params: types.DidCloseTextDocumentParams) -> None:
        users = server.known.affected(path_of(params.text_document.uri))[1:]
        path = server.known.close(params.text_document.uri)
        server.publish(server.problems.replace(path, {}))
        for each in users:
            server.changed(each)


def _take(server: Server, uri: str) -> None:
    document = server.workspace.get_text_document(uri)
    taken = server.known.put(uri, document.version or 0, document.source)
    server.changed(taken.path)


def _repairs(server: Server) -> None:
    @server.feature(types.TEXT_DOCUMENT_CODE_ACTION, types.CodeActionOptions([types.CodeActionKind.QuickFix]))
    def actions(params: types.CodeActionParams) -> list[types.CodeAction] | None:
        uri = params.text_document.uri
        return server.answer(uri, lambda view: fixes(view, uri, params.context.diagnostics))


def _navigation(server: Server) -> None:
    known = server.known

    @server.feature(types.TEXT_DOCUMENT_HOVER)
    def on_hover(params: types.HoverParams) -> types.Hover | None:
        return server.answer(params.text_document.uri, lambda view: hover(view, params.position, known.view))

    @server.feature(types.TEXT_DOCUMENT_DEFINITION)
    def on_definition(params: types.DefinitionParams) -> types.Location | None:
        return server.answer(params.text_document.uri, lambda view: definition(known, view, params.position))

    @server.feature(types.TEXT_DOCUMENT_REFERENCES)
    def on_references(params: types.ReferenceParams) -> list[types.Location] | None:
        declaration = params.context.include_declaration
        return server.answer(
            params.text_document.uri,
            lambda view: references(known, view, params.position, declaration=declaration),
        )

    @server.feature(types.TEXT_DOCUMENT_DOCUMENT_HIGHLIGHT)
    def on_highlight(params: types.DocumentHighlightParams) -> list[types.DocumentHighlight] | None:
        return server.answer(params.text_document.uri, lambda view: highlights(view, params.position))

    @server.feature(types.TEXT_DOCUMENT_PREPARE_RENAME)
    def on_prepare(params: types.PrepareRenameParams) -> types.Range | None:
        return server.answer(params.text_document.uri, lambda view: prepare(known, view, params.position))

    @server.feature(types.TEXT_DOCUMENT_RENAME, types.RenameOptions(prepare_provider=True))
    def on_rename(params: types.RenameParams) -> types.WorkspaceEdit | None:
        return server.answer(
            params.text_document.uri, lambda view: rename(known, view, params.position, params.new_name)
        )


def _writing(server: Server) -> None:
    views = server.known.view

    @server.feature(
        types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=[".", '"', "(", ";", " "])
    )
    def on_completion(params: types.CompletionParams) -> list[types.CompletionItem] | None:
        return server.answer(params.text_document.uri, lambda view: complete(view, params.position, views))

    @server.feature(
        types.TEXT_DOCUMENT_SIGNATURE_HELP, types.SignatureHelpOptions(trigger_characters=["(", ",", ";"])
    )
    def on_signature(params: types.SignatureHelpParams) -> types.SignatureHelp | None:
        return server.answer(
            params.text_document.uri, lambda view: signature_help(view, params.position, views)
        )

    @server.feature(types.TEXT_DOCUMENT_FORMATTING)
    def on_formatting(params: types.DocumentFormattingParams) -> list[types.TextEdit] | None:
        return server.answer(params.text_document.uri, formatting)


def _showing(server: Server) -> None:
    @server.feature(types.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
    def on_symbols(params: types.DocumentSymbolParams) -> list[types.DocumentSymbol] | None:
        return server.answer(params.text_document.uri, outline)

    @server.feature(types.TEXT_DOCUMENT_FOLDING_RANGE)
    def on_folding(params: types.FoldingRangeParams) -> list[types.FoldingRange] | None:
        return server.answer(params.text_document.uri, folding)

    @server.feature(types.TEXT_DOCUMENT_SEMANTIC_TOKENS_FULL, LEGEND)
    def on_tokens(params: types.SemanticTokensParams) -> types.SemanticTokens | None:
        return server.answer(params.text_document.uri, semantic_tokens)

    @server.feature(types.TEXT_DOCUMENT_INLAY_HINT)
    def on_hints(params: types.InlayHintParams) -> list[types.InlayHint] | None:
        return server.answer(params.text_document.uri, lambda view: hints(view, params.range))

    @server.feature(types.TEXT_DOCUMENT_CODE_LENS)
    def on_lenses(params: types.CodeLensParams) -> list[types.CodeLens] | None:
        return server.answer(params.text_document.uri, lenses)
