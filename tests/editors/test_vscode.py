"""The extension for VS Code: its types, the colours of a file, and the package. Its own runner needs a download."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from fastgrad_dsl import __version__

FOLDER = Path(__file__).parents[2] / "editors/vscode"
KEPT = ("src", "syntaxes", "test", "package.json", "package-lock.json", "tsconfig.json", "README.md")
MORE = ("language-configuration.json", ".npmrc", ".vscodeignore")


def test_the_extension_has_the_version_and_the_command_of_the_project() -> None:
    manifest = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))
    assert manifest["version"] == __version__
    setting = manifest["contributes"]["configuration"]["properties"]["fastgrad.command"]
    assert setting["default"] == ["fastgrad", "lsp"]
    assert setting["scope"] == "machine"  # a workspace from a stranger cannot say what is run
    for path in (manifest["contributes"]["grammars"][0]["path"], "language-configuration.json"):
        assert (FOLDER / path).is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
def test_types_colours_and_the_package(tmp_path: Path) -> None:
    for name in (*KEPT, *MORE):
        copy = shutil.copytree if (FOLDER / name).is_dir() else shutil.copy
        copy(FOLDER / name, tmp_path / name)
    installed = npm(tmp_path, "ci", "--prefer-offline")
    if re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN", installed.stderr):
        pytest.skip("npm reaches no registry")
    assert installed.returncode == 0, installed.stderr
    for command in (("test",), ("run", "package")):
        done = npm(tmp_path, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(tmp_path / "fastgrad.vsix") as archive:
        held = {
            name.removeprefix("extension/") for name in archive.namelist() if name.startswith("extension/")
        }
    assert held == {
        "package.json", "readme.md", "language-configuration.json", "syntaxes/tfg.tmLanguage.json", "dist/extension.js",
    }  # fmt: skip


def npm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["npm", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=500
    )
