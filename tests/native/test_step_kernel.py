"""The C++ kernel of a whole step, against the step form in PyTorch's operations."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.cpp.step_kernel import emit_step
from fastgrad_dsl.api.compiled import Compiled
from tests.conftest import Golden
from tests.dsl.models import EXAMPLES, SIZES, disturbed
from tests.kernels.test_golden import GOLDEN
from tests.native.compilers import NEEDS_COMPILER

pytestmark = [NEEDS_COMPILER, pytest.mark.usefixtures("alone")]

ODD = """
use std

dim b
dim n <= 40

block part(x: float[b, n, d]) -> (float[b, n, d], float[b, n, 1]) {
    return (x - shift(x; by = 2), 0.5 * mean(x * x; axis = -1, keepdim = true))
}

block mix(x: float[b, n, d]; factor: float) -> float[b, n, d] {
    y = std.layer_norm(x) as norm
    y = std.kernel_attention(
        y;
        heads = 4,
        kv_heads = 2,
        qk_dim = 4,
        causal = true,
        near = 3,
        forget = true,
        near_rope = 100.0,
    ) as attention
    repeat j in 2 {
        weight g: float[d] = ones()
        (y, s) = part(y) as parts
        y = y * g + tanh(s)
    }
    weight up: float[d, 531] = xavier()
    weight down: float[d, 531] = xavier()
    return x + factor * gelu(unit(y) @ up) @ down.T
}

model odd(tokens: int[b, n], more: float[b, n, 36]) -> (float[b, n, 11], float[b, n, 36]) {
    weight table: float[11, 36] = normal(std = 0.5)
    weight places: float[40, 36] = normal(std = 0.5)
    x = embedding(table, tokens) + places[:n] + dropout(more; p = 0.5)
    repeat i in 3 {
        x = mix(x; factor = 1.0 if i < 2 else 0.5) as layers
    }
    return (x @ table.T, softplus(x) / (1.0 + relu(x)))
}
"""
N = 20


@pytest.fixture
def alone(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel but that of a step, within `counted`: nothing else is built."""
    monkeypatch.setenv("FASTGRAD_NATIVE", "0")


@cache
def compiled(name: str, target: str = "cpp") -> Compiled:
    if name == "odd":
        return fg.compile(ODD, target=target)
    return fg.compile(EXAMPLES / f"{name}.tfg", params=SIZES[name], target=target)


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return disturbed(compiled(name).module(dtype=dtype)).eval()


def inputs(name: str, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(11, (batch, N), generator=generator)
    more = torch.randn(batch, N, 36, generator=generator).to(dtype)
    return [tokens, more] if name == "odd" else [tokens]


@contextmanager
def counted(module: Any, turns: Iterator[bool] | None = None, native: str = "1") -> Iterator[list[bool]]:
    """Whether the kernel served each step; turns: those in which it is asked, all by default."""
    served: list[bool] = []

    def kernel(*given: Any) -> Any:
        asked = turns is None or next(turns)
        with mock.patch.dict(os.environ, FASTGRAD_NATIVE=native):
            found = type_kernel(*given) if asked else None
        served.append(found is not None)
        return found

    type_kernel = type(module).KERNEL
    with mock.patch.object(type(module), "KERNEL", staticmethod(kernel)):
        yield served


def steps(module: Any, given: list[Tensor], split: list[int], state: Any = None) -> tuple[list[Tensor], Any]:
    """The results of calls on so many tokens each, and the state after them."""
    state = module.start(given[0].shape[0]) if state is None else state
    first, found = int(state.position), []
    for count in split:
        *results, state = module.step(*(x[:, first : first + count] for x in given), state)
        found.append(results)
        first += count
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)], state


def differ(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max() / (1 + b.double().abs().max()))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt", torch.float32), ("bounded", torch.float64), ("odd", torch.float64)]
)
def test_steps_by_the_kernel_are_those_of_pytorch(name: str, dtype: torch.dtype) -> None:
    """From the first token, after a prompt, and by turns; the states too."""
    module, tolerance = model(name, dtype), 200 * torch.finfo(dtype).eps
    for batch, threads in ((1, 1), (3, 2), (16, 3)):
        given = inputs(name, batch, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        wanted, state = steps(module, given, [1] * N)
        for split, turns in (
            ([1] * N, None),
            ([7, *[1] * 13], None),
            ([1] * N, itertools.cycle([True, False])),
        ):
            with counted(module, turns) as served:
                found, kept = steps(module, given, split)
            assert sum(served) == (N // 2 if turns is not None else split.count(1))
            assert differ(found, wanted) < tolerance
            if split == [1] * N and turns is None:
                assert kept.tensors.keys() == state.tensors.keys()
                # native kernels add a block of the ring to the sums, PyTorch's operations a token
                paths = [path for path in kept.tensors if not path.endswith(("sums", "summed.shared"))]
                assert differ([kept.tensors[p] for p in paths], [state.tensors[p] for p in paths]) < tolerance
        torch.set_num_threads(before)


class Other(nn.Module):
    """A block of the user's with the weights of one of the model's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(block.__dict__)
        self.step = type(block).step.__get__(block)  # type: ignore[attr-defined]


def test_what_is_not_served() -> None:
    """All is as without a kernel: several tokens, many sequences, other dtypes, what must see the operations."""
    module: Any = compiled("odd").module(dtype=torch.float64).eval()

    def served(with_: Any = module, batch: int = 2, tokens: int = 1, native: str = "1") -> bool:
        dtype = next(with_.parameters()).dtype
        state = with_.start(batch)
        with counted(with_, native=native) as found:
            steps(with_, inputs("odd", batch, dtype), [tokens], state)
        return found[-1]

    assert served()
    assert not served(batch=17)
    assert not served(tokens=2)
    assert not served(native="0")
    module.train()
    assert not served()  # dropout
    module.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not served()
    with FlopCounterMode(display=False) as flops:
        assert not served()
    assert flops.get_total_flops() > 0
    with forward_ad.dual_level():
        assert not served()
    seen: list[Any] = []
    hook = module.layers[1].attention.register_forward_pre_hook(lambda *each: seen.append(each))
    assert not served()
    hook.remove()
    table = module.table
    module.table = nn.Parameter(table.detach().T.contiguous().T)  # as it does not lie in memory
    assert not served()
    module.table = table
    assert served()
    other = module.layers[2]
    module.layers[2] = Other(other)
    assert not served()
    module.layers[2] = other
    assert served()
    assert not served(compiled("odd").module(dtype=torch.bfloat16).eval())


def test_weights_are_read_in_every_call() -> None:
    module: Any = compiled("gpt").module()
    given = inputs("gpt", 1)
    first, _ = steps(module, given, [1] * N)
    module.load_state_dict(compiled("gpt").module(seed=1).state_dict())
    module.layers[0].mixer.attention.wq = nn.Parameter(module.layers[0].mixer.attention.wq.detach() * 2)
    with counted(module) as served:
        found, _ = steps(module, given, [1] * N)
    wanted, _ = steps(module, given, [1] * N)
    assert all(served[1:])  # the first is that of `start`
    assert differ(found, wanted) < 1e-5 < differ(found, first)


def test_states_branch_and_are_taken_apart() -> None:
    module, given = model("gpt"), inputs("gpt", 3)
    whole, _ = steps(module, given, [1] * N)
    _, state = steps(module, given, [6])
    one, two = state.clone(), state[1:2]
    with counted(module) as served:
        rest, _ = steps(module, given, [1] * (N - 6), state)
        again, _ = steps(module, given, [1] * (N - 6), one)
        alone, _ = steps(module, [x[1:2] for x in given], [1] * (N - 6), two)
    assert all(served)
    assert torch.equal(rest[0], again[0])
    assert differ(rest, [whole[0][:, 6:]]) < 1e-5
    assert differ(alone, [whole[0][1:2, 6:]]) < 1e-5


def test_what_pytorch_refuses_is_refused_in_its_words() -> None:
    module = model("odd", torch.float64)
    tokens, more = (torch.cat((x, x, x[:, :1]), 1) for x in inputs("odd", 1, torch.float64))
    with counted(module) as served:
        for bad in (11, -1):
            with pytest.raises(IndexError, match="index out of range"):
                module.step(torch.full((1, 1), bad), more[:, :1], module.start(1))
        assert not any(served)
        _, state = steps(module, [tokens, more], [38, 1, 1])
        assert served[-2:] == [True, True]
        with pytest.raises(ValueError, match="41 tokens"):
            steps(module, [tokens, more], [1], state)


def test_generated_text_is_the_same() -> None:
    module = model("gpt")

    def written() -> list[int]:
        sampling = fg.Sampling(temperature=0.0)
        return [int(token) for token in fg.generate(module, [1, 2, 3], tokens=40, sampling=sampling)]

    with counted(module) as served:
        found = written()
    assert served == [False, False, *[True] * 39]  # `start`, and the prompt
    assert written() == found


def test_graphs_have_the_step_as_it_is_written() -> None:
    module, given = model("gpt"), inputs("gpt", 2)
    _, state = steps(module, given, [5])
    compiled_step = torch.compile(module.step, backend="eager", fullgraph=True)
    found, _ = compiled_step(given[0][:, 5:6], state.clone())
    wanted, _ = module.step(given[0][:, 5:6], state)
    assert differ([found], [wanted]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "spelled_out", "based", "encoder_decoder"])
def test_models_with_other_operations_have_none(name: str) -> None:
    assert emit_step(compiled(name).program, False, ()) is None
    assert "KERNEL" not in compiled(name).modules["model.py"]


def test_only_targets_with_cpp_have_one() -> None:
    assert "KERNEL" not in compiled("gpt", "torch").modules["model.py"]
    assert not any(file.startswith("step_kernel") for file in compiled("gpt", "torch").modules)


def test_golden(golden: Golden) -> None:
    """From the functions of the model on; what stands before is the text of headers."""
    kernel = emit_step(compiled("gpt").program, False, ())
    assert kernel is not None
    _, found, text = kernel.text.rpartition("namespace step {")
    golden(GOLDEN / "step.cpp.txt", found + text)
    assert (
        len(re.findall(r"^inline void \w+\(Call", text, re.MULTILINE)) == 10
    )  # however many layers there are
