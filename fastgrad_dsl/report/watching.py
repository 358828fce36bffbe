"""The page around a report that follows a file: errors of the present text, and the report of the last sound one."""

from __future__ import annotations

from markupsafe import Markup

from fastgrad_dsl.plots.svg import element
from fastgrad_dsl.report.page import source_hash

STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; font: 14px system-ui, sans-serif; }
header { padding: 0.5em 1em; border-bottom: 1px solid #868e96; overflow-wrap: anywhere; }
pre { margin: 0; padding: 1em; max-height: 40vh; overflow: auto; border-bottom: 3px solid #e8590c; }
iframe { flex: 1; border: 0; width: 100%; }
iframe.old { opacity: 0.5; }
[hidden] { display: none; }
"""
SCRIPT = """
const [said, errors, frame] = ["said", "errors", "frame"].map(name => document.getElementById(name));
let version = -1, sound = 0;
frame.addEventListener("load", () => frame.contentWindow.scrollTo(0, Number(frame.dataset.scroll || 0)));
function show(state) {
  errors.textContent = state.errors;
  errors.hidden = !state.errors;
  frame.classList.toggle("old", Boolean(state.errors));
  said.textContent = state.errors ? "this text has errors; below, the last one without" :
    `planned in ${Math.round(1000 * state.seconds)} ms`;
  if (state.sound !== sound) {
    sound = state.sound;
    frame.dataset.scroll = frame.contentWindow.scrollY;
    frame.contentWindow.location.replace(`/report?of=${sound}`);
  }
}
async function look() {
  try {
    const state = await (await fetch("/state")).json();
    if (state.version !== version) show(state);
    version = state.version;
  } catch {
    said.textContent = "the server has stopped";
    version = -1;
  }
  setTimeout(look, 300);
}
look();
"""


CONTENT_POLICY = (
    f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {source_hash(SCRIPT)}; "
    "connect-src 'self'; frame-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def watching_page(file: str) -> str:
    """The page for a file of this name."""
    return element(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        "<title>{0}</title><style>{1}</style></head><body>"
        '<header><strong>{0}</strong> <span id="said" role="status">looking</span></header>'
        '<pre id="errors" role="alert" hidden></pre><iframe id="frame" title="The report"></iframe>'
        "<script>{2}</script></body></html>\n",
        file,
        Markup(STYLE),
        Markup(SCRIPT),
    )
