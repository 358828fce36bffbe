"""A session of a real editor with the language server: Neovim, without a screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pygls", reason="the extra `lsp` is not installed")

SCRIPT = """
local found = {}
vim.cmd("edit model.tfg")
local server = vim.fn.json_decode(vim.env.SERVER)
local client = vim.lsp.start_client({ name = "fastgrad", cmd = server, root_dir = vim.fn.getcwd() })
vim.lsp.buf_attach_client(0, client)
vim.wait(60000, function() return #vim.diagnostic.get(0) > 0 end, 50)
found.codes = vim.tbl_map(function(each) return each.code end, vim.diagnostic.get(0))
vim.api.nvim_buf_set_lines(0, 5, 6, false, { "    return   relu( x )" })
vim.wait(60000, function() return #vim.diagnostic.get(0) == 0 end, 50)
found.left = #vim.diagnostic.get(0)
local place = { textDocument = vim.lsp.util.make_text_document_params(), position = { line = 5, character = 14 } }
local hover = vim.lsp.buf_request_sync(0, "textDocument/hover", place, 60000)
found.hover = hover[client].result.contents.value
local options = { textDocument = place.textDocument, options = { tabSize = 4, insertSpaces = true } }
local edits = vim.lsp.buf_request_sync(0, "textDocument/formatting", options, 60000)
vim.lsp.util.apply_text_edits(edits[client].result, 0, "utf-16")
found.line = vim.api.nvim_buf_get_lines(0, 5, 6, false)[1]
vim.fn.writefile({ vim.fn.json_encode(found) }, "found.json")
vim.lsp.stop_client(client)
vim.wait(10000, function() return vim.lsp.client_is_stopped(client) end, 50)
vim.cmd("qall!")
"""
MODEL = """dim b
dim n <= 64

model m(x: float[b, n, 8]) -> float[b, n, 8] {
    # the next line calls what is not there
    return rellu(x)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvim") is None, reason="no Neovim: apt-get install neovim brings one")
def test_a_session(tmp_path: Path) -> None:
    """Errors come, go when they are mended, and types and the format are those of the command line."""
    (tmp_path / "model.tfg").write_text(MODEL, encoding="utf-8")
    (tmp_path / "session.lua").write_text(SCRIPT, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "SERVER": json.dumps([sys.executable, "-m", "fastgrad_dsl", "lsp"]),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = ["nvim", "--headless", "-u", "NONE", "-i", "NONE", "-c", "luafile session.lua"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (tmp_path / "found.json").is_file(), done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["codes"] == ["FG201"]
    assert found["left"] == 0
    assert "float[b, n, 8]" in found["hover"]
    assert found["line"] == "    return relu(x)"
