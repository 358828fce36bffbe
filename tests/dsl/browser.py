"""A page in headless Chromium: what a script finds in it, without a driver."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
HARNESS = """<!DOCTYPE html><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:2000px" {page}></iframe>
<pre id="result"></pre>
<script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => setTimeout(() => {{
  const find = (window, document) => {{ {script} }};
  document.getElementById("result").textContent = JSON.stringify(find(frame.contentWindow, frame.contentDocument));
}}, {wait}));
</script>
</body>"""


MANY = """<!DOCTYPE html><body style="margin:0">{frames}
<pre id="result"></pre>
<script>
window.addEventListener("load", () => setTimeout(() => {{
  const find = (window, document) => {{ {script} }};
  const found = [...document.querySelectorAll("iframe")].map(each => find(each.contentWindow, each.contentDocument));
  document.getElementById("result").textContent = JSON.stringify(found);
}}, 1000));
</script>
</body>"""


def find_chromium() -> str | None:
    """The command of a Chromium: that of CHROMIUM, else the first on the path."""
    names = (os.environ["CHROMIUM"],) if os.environ.get("CHROMIUM") else NAMES
    return next((found for name in names if (found := shutil.which(name))), None)


def evaluate(page: str, script: str, folder: Path, *, width: int = 1200, dark: bool = False) -> Any:
    """What the body of a function of `window` and `document` returns in a page of this width, through JSON.

    Raises AssertionError where the browser fails, or anything is written to the console: errors of scripts and requests
    that the page's own policy refuses are.
    """
    found, console = load(page, script, folder, width=width, dark=dark)
    assert not console, console
    return found


def load(
    page: str, script: str, folder: Path, *, width: int = 1200, dark: bool = False
) -> tuple[Any, list[str]]:
    """What `evaluate` returns, and what was written to the console; AssertionError where the browser fails."""
    return _load(f'srcdoc="{html.escape(page)}"', script, folder, width, dark)


def load_file(
    page: Path, script: str, folder: Path, *, width: int = 1200, dark: bool = False, query: str = ""
) -> Any:
    """As `evaluate`, of a page that lies beside what it loads; the browser resolves no name of a host."""
    found, console = _load(
        f'src="{html.escape(page.as_uri() + query)}"', script, folder, width, dark, wait=1000
    )
    assert not console, console
    return found


def load_files(pages: list[Path], script: str, folder: Path, *, width: int = 1200) -> list[Any]:
    """As `load_file`, of many pages in one browser."""
    frame = '<iframe style="border:0;width:{}px;height:2000px" src="{}"></iframe>'
    frames = "".join(frame.format(width, html.escape(page.as_uri())) for page in pages)
    file = folder / "harness.html"
    file.write_text(MANY.format(frames=frames, script=script), encoding="utf-8")
    text, console = _browse(file.as_uri(), folder, dark=False)
    assert not console, console
    found = re.search(r'<pre id="result">(.+?)</pre>', text, re.DOTALL)
    assert found is not None, "the pages were not loaded"
    return list(json.loads(html.unescape(found[1])))


def load_url(address: str, folder: Path) -> str:
    """The page of a server of this machine after its scripts ran, as text; AssertionError as of `evaluate`."""
    text, console = _browse(address, folder, dark=False)
    assert not console, console
    return text


def _load(
    source: str, script: str, folder: Path, width: int, dark: bool, wait: int = 0
) -> tuple[Any, list[str]]:
    file = folder / "harness.html"
    file.write_text(HARNESS.format(width=width, page=source, script=script, wait=wait), encoding="utf-8")
    text, console = _browse(file.as_uri(), folder, dark)
    found = re.search(r'<pre id="result">(.*?)</pre>', text, re.DOTALL)
    assert found is not None, text[:1000]
    assert found[1], "the page was not loaded"
    return json.loads(html.unescape(found[1])), console


def _browse(address: str, folder: Path, dark: bool) -> tuple[str, list[str]]:
    """The text of a page once it is settled, and the lines of the console."""
    chromium = find_chromium()
    assert chromium is not None
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,2000", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000", "--dump-dom",
        address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
