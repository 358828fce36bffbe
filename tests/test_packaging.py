"""The wheel: it holds every file of the three packages, nothing else, and works without the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "fastgrad_dsl": ROOT / "fastgrad_dsl",
    "fastgrad_compiler": ROOT / "compiler" / "fastgrad_compiler",
    "fastgrad_grammar": ROOT / "grammar" / "fastgrad_grammar",
}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr or result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("fastgrad_dsl-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel; its dependencies come from the running environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index")
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


@pytest.mark.medium
def test_the_wheel_holds_exactly_the_files_of_the_packages(wheel: Path) -> None:
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert held == expected
    assert {f"{name}/py.typed" for name in PACKAGES} <= held
    assert len(licences) == 1


@pytest.mark.medium
def test_the_installed_packages_do_not_need_the_checkout(site: Path, tmp_path: Path) -> None:
    program = "\n".join(f"import {name}; print({name}.__file__)" for name in PACKAGES)
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert [Path(line).parent for line in output.splitlines()] == [site / name for name in PACKAGES]


@pytest.mark.medium
def test_one_version_in_the_tree_the_wheel_and_the_command(wheel: Path, site: Path, tmp_path: Path) -> None:
    program = "import fastgrad_dsl as fg; print(fg.__version__)"
    source = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    command = "from fastgrad_dsl.commands.cli import main; main()"
    found = [
        run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=source).strip(),
        run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site)).strip(),
        run(sys.executable, "-c", command, "--version", cwd=tmp_path, PYTHONPATH=source).split()[-1],
        wheel.name.split("-")[1],
    ]
    assert len(set(found)) == 1, found
    assert re.fullmatch(r"\d+\.\d+\.\d+", found[0])


def test_the_version_of_a_tree_that_is_not_installed(tmp_path: Path) -> None:
    """Without the metadata of an installation; `-S` leaves out what is installed."""
    program = "import sys, fastgrad_dsl as fg; print(fg.__version__)"
    output = run(sys.executable, "-S", "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert re.fullmatch(r"\d+\.\d+\.\d+", output.strip())
