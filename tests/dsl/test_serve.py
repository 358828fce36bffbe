"""`fastgrad report --serve`: the page follows the file, and answers nobody but this machine."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from fastgrad_dsl.commands import cli
from fastgrad_dsl.commands.serve import ServeRequest, Watch, open_server
from fastgrad_dsl.report.watching import CONTENT_POLICY, watching_page
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.browser import find_chromium, load_url
from tests.html_tags import Tags

SPEC = """use std

dim b
dim n <= 16384

model m(x: float[b, n, 32]) -> float[b, n, 32] {
    return std.attention(x; heads = 2, qk_dim = 16, causal = true, gain = 1.0) as attention
}

budget {
    output <= 0.1
    gradient <= 0.5
}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.tfg"
    path.write_text(SPEC, encoding="utf-8")
    return path


@pytest.fixture
def served(file: Path) -> Iterator[tuple[Watch, int]]:
    watch = Watch(ServeRequest(file, {}, None))
    watch.look()
    server = open_server(watch, 0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield watch, server.server_port
    server.shutdown()
    server.server_close()
    thread.join(10)


def get(
    port: int, path: str, host: str | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_report_follows_the_file(served: tuple[Watch, int], file: Path) -> None:
    watch, port = served
    assert not watch.look()
    first = json.loads(get(port, "/state")[2])
    assert (first["errors"], first["sound"]) == ("", first["version"])
    assert "of 0.1 (" in get(port, "/report")[2]
    change(file, "output <= 0.1", "output <= 0.002")
    assert watch.look()
    second = json.loads(get(port, "/state")[2])
    assert second["sound"] > first["sound"]
    assert "of 0.002 (" in get(port, "/report")[2]


def test_errors_are_shown_and_the_last_sound_report_is_kept(served: tuple[Watch, int], file: Path) -> None:
    watch, port = served
    report = get(port, "/report")[2]
    change(file, "gain = 1.0", "gian = 1.0")
    assert watch.look()
    state = json.loads(get(port, "/state")[2])
    assert "error[FG" in state["errors"]
    assert "gian" in state["errors"]
    assert state["version"] > state["sound"]
    assert get(port, "/report")[2] == report
    file.unlink()
    assert watch.look()
    assert "FG001" in json.loads(get(port, "/state")[2])["errors"]
    file.write_text(SPEC, encoding="utf-8")
    assert watch.look()
    assert json.loads(get(port, "/state")[2])["errors"] == ""


def test_a_used_file_is_followed_even_if_it_comes_later(file: Path) -> None:
    change(file, "use std\n", 'use std\nuse "part.tfg" as part\n')
    change(file, "return std", "x = part.twice(x)\n    return std")
    watch = Watch(ServeRequest(file, {}, None))
    watch.look()
    assert "part.tfg" in watch.state.errors
    part = file.with_name("part.tfg")
    part.write_text("block twice(x: float[b, n, d]) -> float[b, n, d] {\n    return x * 2.0\n}\n")
    assert watch.look()
    assert watch.state.errors == ""
    assert not watch.look()
    change(part, "x * 2.0", "x * y")
    assert watch.look()
    assert "error[FG" in watch.state.errors


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}.evil.example"],
)
def test_a_request_for_another_host_is_refused(served: tuple[Watch, int], host: str) -> None:
    """As a browser sends it whose DNS was made to lead a stranger's name here."""
    _, port = served
    for path in ("/", "/state", "/report"):
        status, headers, text = get(port, path, host.format(port=port) if host else "")
        assert status == 403
        assert "m.tfg" not in text
        assert "Access-Control-Allow-Origin" not in headers


def test_two_hosts_are_refused(served: tuple[Watch, int]) -> None:
    _, port = served
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            f"GET /state HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
        )
        assert b" 403 " in connection.recv(1000)


def test_nothing_else_is_answered(served: tuple[Watch, int]) -> None:
    _, port = served
    assert get(port, "/", f"localhost:{port}")[0] == 200
    for path in ("/m.tfg", "/../m.tfg", "/%2e%2e/m.tfg", "//etc/passwd", "/state/", "/report.html"):
        assert get(port, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert get(port, "/state", method=method)[0] == 501
    for path in ("/", "/state", "/report"):
        headers = get(port, path)[1]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Content-Security-Policy" in headers
        assert "Access-Control-Allow-Origin" not in headers
    assert "frame-ancestors 'none'" in CONTENT_POLICY
    assert "unsafe" not in CONTENT_POLICY


def test_only_the_loopback_address_listens(served: tuple[Watch, int]) -> None:
    _, port = served
    found = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    ]
    assert found == [f"0100007F:{port:04X}"]


def test_the_name_of_the_file_is_text() -> None:
    assert Tags(watching_page("</title><img src=x onerror=alert(1)>.tfg")).tags.isdisjoint({"img"})


def test_what_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(ServeRequest(file, {}, None))
    server = open_server(watch, 0)
    with pytest.raises(TfgError, match="FG416"):
        open_server(watch, server.server_port)
    server.server_close()
    for more, said in (
        (["--json", "a.json"], "it takes no --json"),
        (["--text", "a.txt"], "it takes no --text"),
        (["--port", "65536"], "65535"),
    ):
        monkeypatch.setattr(sys, "argv", ["fastgrad", "report", str(file), "--serve", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fastgrad", "report", "missing.tfg", "--serve"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "FG001" in capsys.readouterr().err


@pytest.fixture
def command(file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = subprocess.Popen(
        [sys.executable, "-m", "fastgrad_dsl", "report", str(file), "--serve"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line
    yield started, int(line.split("/")[2].split(":")[1])
    started.kill()
    started.wait(20)
    started.communicate()


def test_the_command_follows_and_stops(command: tuple[subprocess.Popen[str], int], file: Path) -> None:
    started, port = command
    before = json.loads(get(port, "/state")[2])["version"]
    change(file, "output <= 0.1", "output <= 0.05")
    until = time.monotonic() + 60
    while json.loads(get(port, "/state")[2])["version"] == before:
        assert time.monotonic() < until
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    assert started.stderr is not None
    assert "Traceback" not in started.stderr.read()


@pytest.mark.slow
@pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: CHROMIUM names none, and none is on the path"
)
def test_a_browser_shows_it(served: tuple[Watch, int], tmp_path: Path) -> None:
    """Scripts run under the policy, the report is in the frame, and nothing is written to the console."""
    _, port = served
    dumped = load_url(f"http://127.0.0.1:{port}/", tmp_path)
    assert 'id="said" role="status">planned in' in dumped
