"""`fastgrad report --serve`: a page on this machine that follows a file while it is edited.

Nothing can be changed through the page. The server listens on the loopback address alone, and answers only requests
that name it as their host: a page of a stranger whose name is made to lead here (DNS rebinding) names another.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import cast
from urllib.parse import urlsplit

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.frontend.modules import DISK, Reader
from fastgrad_compiler.pipeline import run
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands.failures import diagnostics, reason_of
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.report.watching import CONTENT_POLICY, watching_page
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.quote import json_text, terminal
from fastgrad_grammar.read import read_source
from fastgrad_grammar.render import render
from fastgrad_grammar.source import Source

LOOPBACK = "127.0.0.1"
PAUSE = 0.2  # seconds between looks at the file
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class ServeRequest:
    """The file, and how it is compiled."""

    file: Path
    params: Mapping[str, object]
    model: str | None
    include: Sequence[Path] = ()


@dataclass(frozen=True)
class State:
    """What the page shows. `report` is the page of the last sound text, made at `sound`; `errors` those of this one."""

    version: int = 0
    sound: int = 0
    report: str = ""
    errors: str = ""
    seconds: float = 0.0


@dataclass
class Watch:
    """A file with those that it uses, and what was found when they last changed."""

    request: ServeRequest
    state: State = field(default_factory=State)
    _seen: dict[Path, object] = field(default_factory=dict)

    def look(self) -> bool:
        """Compile anew if a file has changed; whether one had."""
        if self._seen and all(_mark(path) == mark for path, mark in self._seen.items()):
            return False
        started, version = time.perf_counter(), self.state.version + 1
        try:
            report = self._report()
        except Exception as error:
            self.state = replace(self.state, version=version, errors=_told(error))
        else:
            seconds = time.perf_counter() - started
            self.state = State(version, version, report, seconds=seconds)
        return True

    def _report(self) -> str:
        request = self.request
        # The folder too: a used file that is missing may come.
        self._seen = {path: _mark(path) for path in (request.file, request.file.parent)}

        def read(shown: str, path: Path) -> Source:
            self._seen[path] = _mark(path)
            return DISK.read(shown, path)

        source = read_source(request.file, include=request.include)
        program = elaborate(source, model=request.model, params=request.params, reader=Reader(read))
        stages = run(program, validate=False)  # nothing that runs is made of it
        return render_html(Compiled(source, "auto", stages, request.params, validate=False).report())


def _mark(path: Path) -> object:
    """What changes when a file does; of a file that is not there, None."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _told(error: Exception) -> str:
    found = diagnostics(error)
    if found:
        return render(found)
    traceback.print_exception(error)
    return "this is a bug in fastgrad: its traceback is on the terminal"


def check_alone(**given: object) -> None:
    """Refuse options of a report that is written or measured: FG416 names the first."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        help_ = "leave out one of the two"
        raise TfgError.of("FG416", f"--serve shows what is known without data: it takes no --{name}", help_)


def serve(request: ServeRequest, port: int) -> None:
    """Serve the page until Ctrl-C. Raises TfgError FG416 for a port that cannot be had, and what a first look finds.

    A text with errors is no reason to stop: the page shows them. A file that cannot be read at the start is.
    """
    read_source(request.file, include=request.include)
    watch = Watch(request)
    watch.look()
    server = open_server(watch, port)
    print(f"http://{LOOPBACK}:{server.server_port}/ follows {terminal(str(request.file))}; Ctrl-C stops")
    sys.stdout.flush()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        while True:
            time.sleep(PAUSE)
            watch.look()
    finally:
        server.shutdown()
        server.server_close()


def open_server(watch: Watch, port: int) -> ThreadingHTTPServer:
    """A server on the loopback address that answers from what was last found; port 0 takes any that is free."""
    try:
        return ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, watch))
    except OSError as error:
        help_ = "leave out --port for one that is free"
        raise TfgError.of("FG416", f"--port {port}: {reason_of(error)}", help_) from None


class _Handler(BaseHTTPRequestHandler):
    """Three things to get: the page, what it shows, and the report in it."""

    timeout = 10  # seconds for a request to come in
    server_version, sys_version = "fastgrad", ""

    def __init__(self, watch: Watch, *arguments: object) -> None:
        self.watch = watch
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer by path; 403 to a request for another host, 404 to any other path."""
        port = cast("ThreadingHTTPServer", self.server).server_port
        if self.headers.get_all("Host") not in ([f"{LOOPBACK}:{port}"], [f"localhost:{port}"]):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this server is for this machine alone\n")
            return
        state, path = self.watch.state, urlsplit(self.path).path
        if path == "/":
            page = watching_page(str(self.watch.request.file))
            self._send(HTTPStatus.OK, "text/html", page, CONTENT_POLICY)
        elif path == "/state":
            shown = {
                "version": state.version,
                "sound": state.sound,
                "errors": state.errors,
                "seconds": state.seconds,
            }
            self._send(HTTPStatus.OK, "application/json", json_text(shown))
        elif path == "/report" and state.report:
            self._send(HTTPStatus.OK, "text/html", state.report, "frame-ancestors 'self'")
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is nothing here\n")

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode("utf-8", errors="backslashreplace")
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the terminal is the user's."""
