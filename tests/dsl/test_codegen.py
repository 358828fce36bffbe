"""The text of generated modules, and that every construct of the language computes the same as a module."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.expressions import DECLINED, STRUCTURE, TORCH
from fastgrad_compiler.codegen.names import HELPERS, MODULE_ATTRIBUTES
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.reference.interpret import run
from fastgrad_compiler.runtime import functions
from fastgrad_dsl.api.compiled import Compiled
from tests.conftest import Golden
from tests.dsl.models import EXAMPLES, NAMES, always_polynomial, disturbed, small, text

GOLDEN = Path(__file__).parents[1] / "golden" / "modules"


def test_the_table_covers_every_operation() -> None:
    groups = [set(TORCH), set(STRUCTURE), set(DECLINED)]
    assert set.union(*groups) == set(OPS)
    assert sum(map(len, groups)) == len(OPS), "an operation is emitted in one way"


def test_helpers_are_reserved_names() -> None:
    public = {
        name
        for name, value in vars(functions).items()
        if getattr(value, "__module__", "") == functions.__name__
    }
    of_others = {"depthwise", "linear_cross_entropy", "shift"}
    assert {name for name in public if not name.startswith("_")} | of_others == HELPERS


@pytest.mark.medium
def test_names_of_modules_are_known_without_torch() -> None:
    """Asked of a new process: libraries that other tests import add names to nn.Module."""
    script = "import torch; print(*(name for name in dir(torch.nn.Module()) if not name.startswith('__')))"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(asked.stdout.split()) <= MODULE_ATTRIBUTES


@pytest.mark.parametrize("name", ["bounded", "spelled_out"])
def test_golden_modules(name: str, golden: Golden) -> None:
    """Except for hashes: those in the names of kernels change with any file of `runtime`."""
    compiled = fg.compile(EXAMPLES / f"{name}.tfg", target="torch")
    text = re.sub(r"(attention|step)_[0-9a-f]{12}", rf"\1_{'0' * 12}", compiled.modules["model.py"])
    golden(GOLDEN / f"{name}.py.txt", text)


def formatted(texts: dict[str, str], folder: Path) -> str:
    """What `ruff format` would change."""
    for name, content in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--isolated",
        "--line-length",
        "110",
        "--diff",
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_ruff_leaves_generated_files_unchanged(tmp_path: Path) -> None:
    texts = {f"{name}/{file}": t for name in NAMES for file, t in small(name).modules.items()}
    texts |= {f"case_{i}/model.py": compile_case(case).modules["model.py"] for i, case in enumerate(CASES)}
    assert formatted(texts, tmp_path) == ""


def test_ruff_finds_nothing_unused_or_unsorted(tmp_path: Path) -> None:
    names = ("headless, polynomial", "a result that nothing reads", "an only bool input")
    for i, name in enumerate(names):
        compile_case(name).write(tmp_path / f"case_{i}")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,I,RUF022", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_objective_may_be_named_like_an_export() -> None:
    compiled = fg.compile(text("return x") + "objective MODEL(y: float[b, n, 4]) = sum(y)\n")
    assert compiled.loss is not None
    assert compiled.loss(torch.ones(2, 3, 4)) == 24


def test_depth_changes_only_constants() -> None:
    shallow, deep = (
        fg.compile(EXAMPLES / "bounded.tfg", params={"depth": depth}).modules["model.py"] for depth in (1, 96)
    )
    assert "range(96)" in deep
    texts = {re.sub(r"range\(\d+\)|step_\w{12}", "N", text) for text in (shallow, deep)}
    assert len(texts) == 1


@pytest.mark.slow  # test_same_files.py compares processes with different seeds
def test_files_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "import fastgrad_dsl as fg, hashlib; files = fg.compile('llama.tfg').files; "
        "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=EXAMPLES,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(result.stdout)
    assert len(digests) == 1


# ---------------------------------------------------------------- constructs, each against the interpreter

CASES: dict[str, str] = {
    "rebinding and names of Python": text(
        "lambda = x + 1.0\nF = lambda * x\nself = F - lambda\nreturn self / 2"
    ),
    "variables named like helpers": text(
        """masked_softmax = x * 2
        polynomial_attention = masked_softmax + x
        range = 2 * polynomial_attention
        like = x
        repeat i in 2 {
            range = rotary(range, 100.0)
        }
        return range + softmax(padding(like @ range.T, mask)) @ exp(x) @ x.T @ x""",
        signature="x: float[b, n, 4], mask: bool[b, n]",
    ),
    "ints as floats": text(
        "return where(ids < 2, 1.0, 0.5) * (ids / 2 + 0.25 * positions(n)) + 3 / (ids + 1)",
        signature="ids: int[b, n]",
        result="float[b, n]",
    ),
    "an only bool input": text(
        "return where(mask, 2.0, 1.0) + fill(2.5, b, n) if false else where(mask, 2.0, 1.0)",
        signature="mask: bool[b, n]",
        result="float[b, n]",
    ),
    "weights of some iterations only, in nested repeats": text(
        """y = float(x) / 2
        repeat i in 3 {
            if i != 1 {
                repeat j in 2 {
                    weight lambda: float[4] = normal(std = 1.0)
                    y = y * lambda + zeros(b, n, 4)
                }
            }
        }
        return y + 1.5""",
        signature="x: int[b, n, 4]",
    ),
    "a result that nothing reads": text(
        "(y, _rest) = two(x)\nreturn y",
        more="block two(x: float[b, n, 4]) -> (float[b, n, 4], float[b, n, 4]) { return (x + 1, 2 * x) }",
    ),
    "weights named like methods": text(
        "weight half: float[4] = ones()\nweight type: float[4] = normal()\nweight lambda: float[4] = ones()\n"
        "buffer train: float[4] = ones()\nreturn x * half + type * lambda - train"
    ),
    "carried pair": text("y = x * 2\nrepeat i in 3 {\n  z = x\n  x = y + 1.0\n  y = z\n}\nreturn x + 3 * y"),
    "value needed after the loop": text("y = x\nrepeat i in 2 {\n  y = y * x\n}\nreturn y + x"),
    "weights in a repeat": text(
        """repeat i in 3 {
            weight w: float[4, 4] = xavier()
            buffer c: float[4] = ones()
            x = tanh(x @ w) + c
        }
        return x"""
    ),
    "nested repeats": text(
        """repeat i in 2 {
            repeat j in 3 {
                weight w: float[4, 4] = xavier()
                x = f(x @ w) as f
            }
        }
        return x""",
        more="block f(x: float[b, n, 4]) -> float[b, n, 4] {\n weight s: float[4] = ones()\n return x * s }",
    ),
    "bodies that differ": text(
        """repeat i in 5 {
            if i % 2 == 0 {
                weight w: float[4] = ones()
                x = x * w
            } else {
                x = f(x; i) as g
            }
        }
        return x""",
        more="""block f(x: float[b, n, 4]; k: int) -> float[b, n, 4] {
            weight s: float[4] = ones()
            return x * s + k
        }""",
    ),
    "several results": text(
        "(y, z) = f(x)\nreturn (y - z, z)",
        result="(float[b, n, 4], float[b, n, 4])",
        more="block f(x: float[b, n, 4]) -> (float[b, n, 4], float[b, n, 4]) { return (exp(x), x) }",
    ),
    "dims that no input of a block shows": text(
        "return x + f(; n)", more="block f(; m: int) -> float[m, 4] { return sinusoid(m, 4) }"
    ),
    "ints become floats": text(
        "return x / float(positions(n) + 1)[.., 0:1]", signature="x: float[b, n]", result="float[b, n]"
    ),
    "slices and shapes": text(
        """y = concat(x[.., 2:4], x[.., 0:2], axis = -1)
        z = stack(y[.., 1], y[.., 0], axis = -1)
        return reshape(z, (b, 2 * n))""",
        result="float[b, 2 * n]",
    ),
    "choices": text("return where(x > 0.5, clamp(x, 0.0, 0.7), max(x, -0.25)) + where(x < 0, 1.0, 0.0)"),
    "reductions": text(
        "return x - mean(x, axis = -1, keepdim = true) + sum(x * x, axis = (-2, -1), keepdim = true)"
    ),
    "grouped, windowed attention": text(
        """weight w: float[4, 8] = normal()
        q = split_heads(x @ w, 4)
        k = split_heads(x, 2)
        s = window(causal(q @ repeat_heads(k, 2).T), 3)
        return merge_heads(softmax(s) @ repeat_heads(k, 2))""",
        result="float[b, n, 8]",
    ),
    "two stretches of layers": text(
        """repeat i in 5 {
            x = x + f(x; 1.0 if i < 2 else 2.0)
        }
        return x"""
    )
    + "block f(x: float[b, n, 4]; k: float) -> float[b, n, 4] { return tanh(x) * k }\n",
    "alibi": text("q = split_heads(x, 2)\nreturn merge_heads(softmax(causal(alibi(q @ q.T))) @ q)"),
    "documents and padding": text(
        "q = split_heads(x, 2)\nreturn merge_heads(softmax(padding(documents(q @ q.T, ids), ids < 2)) @ q)",
        signature="x: float[b, n, 4], ids: int[b, n]",
    ),
    "near and far in a window and documents": text(
        """q = split_heads(x, 2)
        s = near_far(q @ q.T, 0.5 * unit(q) @ unit(q).T; 2)
        return merge_heads(softmax(window(documents(s, ids); 3)) @ q)""",
        signature="x: float[b, n, 4], ids: int[b, n]",
    ),
    "near and far with alibi, which is no attention": text(
        """q = split_heads(x, 2)
        return merge_heads(softmax(alibi(near_far(q @ q.T, unit(q) @ unit(q).T; 2))) @ q)"""
    ),
    "documents without heads in a window": text(
        "return softmax(window(causal(documents(x @ x.T, ids)); 3)) @ x",
        signature="x: float[b, n, 4], ids: int[b, n]",
    ),
    "documents and alibi": text(
        "q = split_heads(x, 2)\nreturn merge_heads(softmax(causal(documents(alibi(q @ q.T), ids))) @ q)",
        signature="x: float[b, n, 4], ids: int[b, n]",
    ),
    "documents, polynomial": text(
        """q = split_heads(x, 2)
        s = near_far(q @ q.T, 0.5 * unit(q) @ unit(q).T; 2)
        return merge_heads(softmax(padding(documents(s, ids), mask)) @ q)""",
        signature="x: float[b, n, 4], ids: int[b, n], mask: bool[b, n]",
    )
    + 'budget { at "*" degree = 3 }\n',
    "prefix, polynomial": text(
        """q = split_heads(x, 2)
        s = near_far(q @ q.T, 0.5 * unit(q) @ unit(q).T; 2)
        return merge_heads(softmax(padding(documents(prefix(s, length), ids), mask)) @ q)""",
        signature="x: float[b, n, 4], ids: int[b, n], mask: bool[b, n], length: int[b]",
    )
    + 'budget { at "*" degree = 3 }\n',
    "prefix in a window": text(
        "return softmax(window(prefix(x @ x.T, length); 3)) @ x",
        signature="x: float[b, n, 4], length: int[b]",
    ),
    "prefix of scores that are no attention's": text(
        "return softmax(prefix(x @ x.T, length) + 1.0) @ x",
        signature="x: float[b, n, 4], length: int[b]",
    ),
    "headless documents, polynomial": text(
        "return softmax(causal(documents(unit(x) @ unit(x).T, ids))) @ x",
        signature="x: float[b, n, 4], ids: int[b, n]",
    )
    + 'budget { at "*" degree = 3 }\n',
    "attention without heads": text(
        "return softmax(padding(x @ x.T, mask)) @ x", signature="x: float[b, n, 4], mask: bool[b, n]"
    ),
    "wider queries than values": text(
        "return softmax(causal(x @ x.T)) @ x[.., 0:2]", result="float[b, n, 2]"
    ),
    "narrower queries than values": text("y = x[.., 0:2]\nreturn softmax(causal(y @ y.T)) @ x"),
    "masked scores that are no attention": text(
        "s = padding(x @ x.T, mask)\nreturn softmax(s) @ exp(softmax(s)) @ x",
        signature="x: float[b, n, 4], mask: bool[b, n]",
    ),
    "near and far, polynomial": text(
        "q = split_heads(x, 2)\nreturn merge_heads(softmax(causal(near_far(q @ q.T, unit(q) @ unit(q).T; 2))) @ q)",
    )
    + 'budget { at "*" degree = 4 }\n',
    "padded, polynomial": text(
        "q = split_heads(x, 2)\nreturn merge_heads(softmax(padding(0.5 * unit(q) @ unit(q).T, mask)) @ q)",
        signature="x: float[b, n, 4], mask: bool[b, n]",
    )
    + 'budget { at "*" degree = 3 }\n',
    "headless, polynomial": text("return softmax(causal(unit(x) @ unit(x).T)) @ x")
    + 'budget { at "*" degree = 2 }\n',
}


@cache
def compile_case(name: str) -> Compiled:
    return fg.compile(CASES[name])


def arguments(compiled: Compiled) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in compiled.program[compiled.program.main].inputs:
        shape = [dim.evaluate({"b": 2, "n": 7}) for dim in node.tensor.shape]
        if node.tensor.dtype == "float":
            found.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        elif node.tensor.dtype == "int":
            found.append(torch.randint(3, shape, generator=generator))
        else:
            found.append(torch.arange(shape[-1]) < torch.tensor([shape[-1], 2])[:, None])
    return found


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", CASES)
def test_construct(name: str) -> None:
    compiled = compile_case(name)
    model = compiled.module(dtype=torch.float64)
    disturbed(model)
    inputs = arguments(compiled)
    stages = {stage.name: stage.program for stage in compiled.stages}
    weights = model.state_dict()
    floats = [x for x in (*inputs, *weights.values()) if x.is_floating_point()]
    dtype = (
        torch.float64 if floats else torch.get_default_dtype()
    )  # what a model without a float tensor follows
    expected = run(stages["elaborate"], inputs, weights, dtype=dtype)
    torch.testing.assert_close(compiled.reference(model)(*inputs), expected)
    torch.testing.assert_close(model(*inputs), expected)  # below the break-even length where there is one
    if "no attention" in name:
        assert not compiled.plan
    if name.endswith("polynomial"):
        assert {entry.node.op for entry in compiled.plan} == {"poly_attention"}
        approximated = run(compiled.program, inputs, weights, dtype=torch.float64)
        torch.testing.assert_close(always_polynomial(compiled, model)(*inputs), approximated)


def test_a_slice_up_to_a_run_time_dim_is_never_cut_short() -> None:
    spec = """
dim n

model places(x: float[n]) -> float[n] {
    weight table: float[16] = ones()
    return x + table[0:n]
}
"""
    model = fg.compile(spec).module()
    assert torch.equal(model(torch.zeros(16)), torch.ones(16))
    with pytest.raises(RuntimeError, match="exceeds"):
        model(torch.zeros(17))


@pytest.mark.parametrize("scale", ["(-0.5)", "0.0"])
def test_causal_attention_without_a_positive_scale_is_no_nan(scale: str) -> None:
    """PyTorch's fused kernel on a CPU gives NaN there."""
    compiled = fg.compile(text(f"    return softmax(causal(x @ x.T * {scale})) @ x"))
    x = torch.randn(1, 9, 4)
    scores = float(scale.strip("()")) * x @ x.mT
    hidden = torch.ones(9, 9).triu(1).bool()
    wanted = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ x
    torch.testing.assert_close(compiled.module()(x), wanted)
