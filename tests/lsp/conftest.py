"""An editor with a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lsp.editor import Editor


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return Editor(tmp_path)
