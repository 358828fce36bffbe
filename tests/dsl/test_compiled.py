"""Compiled examples compute what the interpreter does, at any length, and bear what PyTorch does to modules."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad_dsl as fg
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference.interpret import run
from fastgrad_dsl.api.loader import load_package
from tests.dsl.models import EXAMPLES, INPUTS, NAMES, SIZES, always_polynomial, disturbed, small, text
from tests.initial_weights import initial_weights


def interpreted(program: Program, name: str, model: nn.Module) -> Tensor:
    result = run(program, INPUTS[name], model.state_dict())
    assert isinstance(result, Tensor)
    return result


def stage(name: str, after: str) -> Program:
    return next(s.program for s in small(name).stages if s.name == after)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_interpreter(name: str) -> None:
    compiled = small(name)
    model = disturbed(compiled.module(dtype=torch.float64))
    polynomial = always_polynomial(compiled, model)
    expected = interpreted(compiled.program, name, model)
    torch.testing.assert_close(polynomial(*INPUTS[name]), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_exact_and_shares_weights(name: str) -> None:
    compiled = small(name)
    model = disturbed(compiled.module(dtype=torch.float64))
    reference = compiled.reference(model)
    assert list(reference.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(reference.parameters(), model.parameters(), strict=True))
    expected = interpreted(stage(name, "attention"), name, model)
    torch.testing.assert_close(reference(*INPUTS[name]), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_exact_below_break_even_in_both_passes(name: str) -> None:
    compiled = small(name)
    model = disturbed(compiled.module(dtype=torch.float64))
    results = []
    for each in (model, compiled.reference(model)):
        output = each(*INPUTS[name])
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        results.append((output, *gradients))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


def test_gradients_of_a_tight_polynomial_are_those_of_the_reference() -> None:
    source = (EXAMPLES / "bounded.tfg").read_text()
    for old, new in (('at "*" degree = 2', 'at "*" degree = 10'), ("qk_dim = 16", "qk_dim = 4")):
        assert old in source
        source = source.replace(old, new)
    compiled = fg.compile(source, params={**SIZES["bounded"], "depth": 1})
    model = disturbed(compiled.module(dtype=torch.float64))
    polynomial = always_polynomial(compiled, model)
    assert polynomial(*INPUTS["bounded"]).ne(model(*INPUTS["bounded"])).any(), "the kernel ran"
    gradients = []
    for each in (polynomial, compiled.reference(model)):
        loss = each(*INPUTS["bounded"]).square().sum()
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_those_of_the_interpreter(name: str) -> None:
    compiled = small(name)
    found = compiled.module(seed=3).state_dict()
    expected = initial_weights(compiled.program, 3)
    assert found.keys() == expected.keys()
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path
    other = compiled.module(seed=4).state_dict()
    assert any(not torch.equal(found[path], other[path]) for path in found)


def test_initial_weights_are_drawn_in_float32_whatever_the_default_dtype() -> None:
    expected = small("bounded").module(seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        found, asked = small("bounded").module(seed=3), small("bounded").module(seed=3, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for weight, wide, narrow in zip(
        expected.parameters(), found.parameters(), asked.parameters(), strict=True
    ):
        assert wide.dtype == torch.float64
        assert torch.equal(weight.double(), wide)
        assert torch.equal(weight, narrow)


def test_the_order_of_params_changes_no_file() -> None:
    source, sizes = EXAMPLES / "bounded.tfg", SIZES["bounded"]
    assert len(sizes) > 1
    files = fg.compile(source, params=sizes).files
    assert fg.compile(source, params=dict(reversed(sizes.items()))).files == files


def test_keys_are_paths() -> None:
    keys = list(small("bounded").module().state_dict())
    assert {"table", "layers.1.attention.wq", "layers.0.mlp_norm.w", "rms_norm.w"} <= set(keys)


def test_objective() -> None:
    compiled = small("bounded")
    logits, targets = torch.randn(2, 13, 11), INPUTS["bounded"][0]
    assert compiled.loss is not None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.equal(compiled.loss(logits, targets), expected)
    assert fg.compile(text("return x")).loss is None


# ---------------------------------------------------------------- what PyTorch does to modules


def kernels(name: str) -> nn.Module:
    return always_polynomial(small(name), disturbed(small(name).module()))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["bounded", "bert"])
def test_torch_compile_in_one_graph(name: str) -> None:
    """Of one layer: tracing takes seconds for each."""
    shallow = fg.compile(EXAMPLES / f"{name}.tfg", params={**SIZES[name], "depth": 1}, target="torch")
    model = always_polynomial(shallow, disturbed(shallow.module()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = model(*INPUTS[name])
    found = compiled(*INPUTS[name])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_export_with_a_dynamic_length() -> None:
    model = kernels("bounded").eval()
    length = torch.export.Dim("n", min=2, max=4096)
    exported = torch.export.export(model, tuple(INPUTS["bounded"]), dynamic_shapes=({1: length},))
    longer = torch.randint(11, (2, 29), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(exported.module()(longer), model(longer))


def test_deepcopy_and_state_dict() -> None:
    model = kernels("bounded")
    copied = copy.deepcopy(model)
    assert all(a is not b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(copied(*INPUTS["bounded"]), model(*INPUTS["bounded"]), rtol=0, atol=0)


def test_checkpointing_changes_nothing() -> None:
    model = kernels("bounded").double()
    plain = model(*INPUTS["bounded"])
    again = checkpoint(model, *INPUTS["bounded"], use_reentrant=False)
    gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (plain, again)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_autocast_and_bfloat16() -> None:
    model = kernels("bounded")
    expected = model(*INPUTS["bounded"])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*INPUTS["bounded"])
    mixed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    pure = copy.deepcopy(model).bfloat16()(*INPUTS["bounded"])
    for found in (mixed, pure):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.05 * expected.norm()  # 8 bits of mantissa, two layers


@pytest.mark.parametrize("name", NAMES)
def test_no_constant_raises_the_dtype(name: str) -> None:
    model = small(name).module(dtype=torch.bfloat16)
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in INPUTS[name]]
    assert model(*inputs).dtype == torch.bfloat16


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = kernels("bounded").double()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(*INPUTS["bounded"]).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    expected = torch.autograd.grad(model(*INPUTS["bounded"]).square().sum(), list(model.parameters()))
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- checks at run time, files


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = small("bounded").module()
    with pytest.raises(ValueError, match=r"tokens has shape \[13\], expected \[b, n\]"):
        model(INPUTS["bounded"][0][0])
    with pytest.raises(ValueError, match=r"tokens has shape \[2, 0\], but every size is at least 1"):
        model(INPUTS["bounded"][0][:, :0])
    declared = fg.compile(
        "dim b\ndim n <= 8 % 4\nmodel m(x: float[b, n], y: float[n]) -> float[b, n] { return x + y }\n"
    )
    module = declared.module()
    assert module(torch.ones(2, 8), torch.ones(8)).shape == (2, 8)
    with pytest.raises(ValueError, match="dim n is 12, but <text>:2 declares at most 8"):
        module(torch.ones(2, 12), torch.ones(12))
    with pytest.raises(ValueError, match="dim n is 6, but <text>:2 declares a multiple of 4"):
        module(torch.ones(2, 6), torch.ones(6))
    with pytest.raises(ValueError, match=r"y has shape \[4\], expected \[8\]"):
        module(torch.ones(2, 8), torch.ones(4))


STAND_ALONE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import gpt
assert not any(name.startswith("fastgrad") for name in sys.modules)
model = gpt.MODEL(seed=5)
tokens = torch.arange(13).remainder(11).expand(2, -1)
loss = gpt.loss(model(tokens), tokens)
loss.backward()
torch.save((loss.detach(), model.state_dict()), sys.argv[2])
"""


def test_written_folder_stands_alone(tmp_path: Path) -> None:
    compiled = small("bounded")
    compiled.write(tmp_path / "gpt")
    result = tmp_path / "result.pt"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", STAND_ALONE, str(tmp_path), str(result)],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    loss, weights = torch.load(result)
    loaded = fg.load(tmp_path / "gpt", seed=5)
    tokens = torch.arange(13).remainder(11).expand(2, -1)
    for path, weight in loaded.state_dict().items():
        assert torch.equal(weights[path], weight)
    assert compiled.loss is not None
    torch.testing.assert_close(compiled.loss(loaded(tokens), tokens), loss)


def test_writing_again_removes_only_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    small("bounded").write(folder)
    (folder / "attention_mine.py").write_text("mine = 1\n")
    old = {path.name for path in folder.glob("attention_*.py")}
    fg.compile(EXAMPLES / "bounded.tfg", params={**SIZES["bounded"], "near": 4}, out=folder)
    new = {path.name for path in folder.glob("attention_*.py")}
    assert {"attention_mine.py", "attention_op.py"} <= new
    assert old - new, "the kernel of the earlier compile is gone"
    assert load_package(folder).MODEL is not None


def test_loading_what_was_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(fg.TfgError, match="not a compiled model"):
        fg.load(tmp_path)


def test_labels_like_methods_of_modules() -> None:
    compiled = fg.compile(
        text(
            "x = half(x)\nrepeat i in 2 {\n  x = half(x) as to\n}\nreturn x",
            more="""block half(x: float[b, n, 4]) -> float[b, n, 4] {
                weight type: float[4] = ones()
                return x * type
            }""",
        )
    )
    model = disturbed(compiled.module())
    assert list(model.state_dict()) == ["half.type", "to.0.type", "to.1.type"]
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for other in (compiled.reference(model), copy.deepcopy(model), torch.compile(model, backend="eager")):
        torch.testing.assert_close(other(x), model(x))


def test_a_report_on_a_given_batch_names_its_dims() -> None:
    compiled = fg.compile(EXAMPLES / "bounded.tfg", params={"depth": 1, "d_model": 32, "heads": 2, "near": 8})
    tokens = torch.randint(256, (2, 720), generator=torch.Generator().manual_seed(0))
    report = compiled.report(compiled.module(seed=0), (tokens, tokens))
    assert report["batch"]["dims"] == {"b": 2, "n": 720}
    assert "length" not in {warning["kind"] for warning in report["warnings"]}
    short = compiled.report(compiled.module(seed=0), (tokens[:, :9], tokens[:, :9]))
    assert any("every attention runs exactly" in warning["text"] for warning in short["warnings"])
