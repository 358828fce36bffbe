"""The folders of all examples run where PyTorch is and neither this project nor what it depends on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgrad_dsl as fg
from tests.dsl.models import EXAMPLES, INPUTS, NAMES, SIZES

SCRIPT = """
import sys
from importlib import import_module

FOREIGN = ("fastgrad", "lark", "scipy", "rich", "typer", "safetensors", "platformdirs")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(FOREIGN):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
import torch

sys.path.insert(0, sys.argv[1])
inputs = torch.load("inputs.pt")
outputs = {}
for name in sys.argv[2:]:
    package = import_module(name)
    model = package.MODEL(seed=5)
    outputs[name] = model(*(x.float() if x.is_floating_point() else x for x in inputs[name]))
    outputs[name].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
assert "torch._dynamo" not in sys.modules, "it takes seconds to load"
torch.save(outputs, "outputs.pt")
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_generated_files_import_torch_and_each_other(name: str) -> None:
    texts = fg.compile(EXAMPLES / f"{name}.tfg", params=SIZES[name]).modules
    for file, text in texts.items():
        if file.endswith(".cpp"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                roots = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = [str(node.module).partition(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                roots = []
                siblings = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{name}.py" in texts for name in siblings), f"{file}: {siblings}"
            else:
                continue
            known = {"torch", *sys.stdlib_module_names} | ({"triton"} if "triton" in file else set())
            assert {*roots} <= known, f"{file}: {roots}"


FEW = ("gpt", "encoder_decoder")  # the step forms of all, and attention across


@pytest.mark.medium
@pytest.mark.parametrize("names", [FEW, pytest.param(NAMES, marks=pytest.mark.slow)], ids=len)
def test_folders_need_torch_alone(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        fg.compile(EXAMPLES / f"{name}.tfg", params=SIZES[name], out=tmp_path / name)
    torch.save(INPUTS, tmp_path / "inputs.pt")
    run = [sys.executable, "-I", "-c", SCRIPT, str(tmp_path), *names]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    for name in names:
        model = fg.load(tmp_path / name, seed=5)
        inputs = [x.float() if x.is_floating_point() else x for x in INPUTS[name]]
        torch.testing.assert_close(outputs[name], model(*inputs))
