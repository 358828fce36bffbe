"""The C++ kernel of a whole step, against the step form in PyTorch's operations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.cpp.step_kernel import emit_step
from fastgrad_dsl.api.compiled import Compiled
from tests.conftest import Golden
from tests.dsl.models import EXAMPLES, SIZES, disturbed
from tests.grids import wide
from tests.kernels.test_golden import GOLDEN
from tests.native.compilers import NEEDS_COMPILER
from tests.native.steps import counted, differ, steps

pytestmark = [NEEDS_COMPILER, pytest.mark.usefixtures("alone"), pytest.mark.medium]

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


def served_in_each_way(module: Any, given: list[Tensor]) -> Iterator[tuple[bool, list[Tensor], Any]]:
    """From the first token, after a prompt, and by turns: whether it is the first of these, results, and state."""
    for split, turns in (
        ([1] * N, None),
        ([7, *[1] * 13], None),
        ([1] * N, itertools.cycle([True, False])),
    ):
        with counted(module, turns) as served:
            found, kept = steps(module, given, split)
        assert sum(served) == (N // 2 if turns is not None else split.count(1))
        yield turns is None and split == [1] * N, found, kept


@pytest.mark.parametrize(
    ("name", "dtype"),
    wide(
        [
            ("gpt", torch.float32),
            ("bounded", torch.float64),
            ("odd", torch.float64),
            ("based", torch.float32),
            ("llama", torch.float64),
        ],
        few=[("gpt", torch.float32), ("odd", torch.float64), ("llama", torch.float64)],
    ),
)
def test_steps_by_the_kernel_are_those_of_pytorch(name: str, dtype: torch.dtype) -> None:
    """From the first token, after a prompt, and by turns; the states too."""
    module, tolerance = model(name, dtype), 200 * torch.finfo(dtype).eps
    for batch, threads in ((1, 1), (3, 2), (16, 3)):
        given = inputs(name, batch, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        wanted, state = steps(module, given, [1] * N)
        for plain, found, kept in served_in_each_way(module, given):
            assert differ(found, wanted) < tolerance
            if plain:
                assert kept.tensors.keys() == state.tensors.keys()
                # native kernels add a block of the ring to the sums, PyTorch's operations a token
                paths = [path for path in kept.tensors if not path.endswith(("sums", "summed.shared"))]
                assert differ([kept.tensors[p] for p in paths], [state.tensors[p] for p in paths]) < tolerance
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", wide(("gpt", "odd", "llama"), few=["odd"]))
def test_bfloat16(name: str) -> None:
    """Weights and states are bfloat16; sums, and what stands between operations, are float32."""
    module: Any = compiled(name).module(dtype=torch.bfloat16).eval()
    exact: Any = compiled(name).module(dtype=torch.float64).eval()
    exact.load_state_dict(module.state_dict())
    for batch in (1, 3):
        given = inputs(name, batch, torch.bfloat16)
        wanted, _ = steps(exact, [x.double() if x.is_floating_point() else x for x in given], [1] * N)
        _, state = steps(module, given, [1] * N)
        for _, found, kept in served_in_each_way(module, given):
            assert [x.dtype for x in found] == [torch.bfloat16] * len(found)
            assert differ(found, wanted) < 4 * torch.finfo(torch.bfloat16).eps
            assert {p: x.dtype for p, x in kept.tensors.items()} == {
                p: x.dtype for p, x in state.tensors.items()
            }


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
    layers = module.layers
    layers[0], layers[2] = layers[2], layers[0]  # blocks of the model, of other classes
    assert not served()
    layers[0], layers[2] = layers[2], layers[0]
    everywhere = register_module_forward_hook(lambda *each: seen.append(each))
    assert not served()
    everywhere.remove()
    state = module.start(2)
    layers[1].parts[0].step = mock.Mock(wraps=layers[1].parts[0].step)
    with counted(module) as found:
        steps(module, inputs("odd", 2, torch.float64), [1], state)
    assert layers[1].parts[0].step.called
    assert found == [False]
    del layers[1].parts[0].step
    assert served()
    other = module.layers[2]
    module.layers[2] = Other(other)
    assert not served()
    module.layers[2] = other
    assert served()
    assert not served(compiled("odd").module(dtype=torch.float16).eval())


RECENT = """
dim b
dim n
model m(x: float[b, n, 38], ids: int[b, n]) -> (float[b, n, 38], float[b, n, 38], float[b, n, 38]) {
    weight w: float[4, 38] = normal(std = 0.5)
    return (depthwise(x, w, ids), shift(x, ids; by = 3), merge_heads(shift(split_heads(x, 2), ids; by = 1)))
}
"""


def test_what_is_recent_in_documents() -> None:
    module: Any = disturbed(fg.compile(RECENT, target="cpp").module(dtype=torch.float64)).eval()
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        x = torch.randn(batch, N, 38, generator=generator, dtype=torch.float64)
        ids = (torch.rand(batch, N, generator=generator) < 0.3).cumsum(1)
        given = [
            x.masked_fill((ids == 1).unsqueeze(-1), torch.nan),
            ids,
        ]  # another document, whatever it holds
        wanted, state = steps(module, given, [1] * N)
        with counted(module) as served:
            found, kept = steps(module, given, [2, 1, 5, *[1] * (N - 8)])
        assert served.count(True) == N - 7
        assert all(map(torch.equal, map(torch.isnan, found), map(torch.isnan, wanted)))
        assert differ(list(map(torch.nan_to_num, found)), list(map(torch.nan_to_num, wanted))) < 1e-13
        assert all(
            torch.equal(kept.tensors[path].nan_to_num(), x.nan_to_num()) for path, x in state.tensors.items()
        )


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


def test_blocks_without_weights_are_looked_at() -> None:
    spec = ODD.replace("y = std.layer_norm(x) as norm", "y = std.layer_norm(half(x) as half) as norm")
    spec = spec.replace(
        "block mix", "block half(x: float[b, n, d]) -> float[b, n, d] {\n return 0.5 * x\n}\n\nblock mix"
    )
    module: Any = disturbed(fg.compile(spec, target="cpp").module(dtype=torch.float64)).eval()
    given = inputs("odd", 2, torch.float64)
    with counted(module) as served:
        steps(module, given, [1])
    assert served[-1]
    module.layers[0].half = nn.Identity()
    wanted, _ = steps(module, given, [1] * 3)
    with counted(module) as served:
        found, _ = steps(module, given, [1] * 3)
    assert differ(found, wanted) == 0.0
    assert not any(served)


def test_weights_that_a_block_holds_anew_are_read() -> None:
    module, given = (
        fg.compile(ODD, target="cpp").module(dtype=torch.float64).eval(),
        inputs("odd", 2, torch.float64),
    )
    with counted(module) as served:
        steps(module, given, [1])
        for block in module.modules():
            block._parameters = {
                name: nn.Parameter(1.5 * x.detach()) for name, x in block.named_parameters(recurse=False)
            }
        found, _ = steps(module, given, [1] * 3)
    wanted, _ = steps(module, given, [1] * 3)
    assert served[-3:] == [True] * 3
    assert differ(found, wanted) < 1e-13


def test_no_memory_is_touched_that_is_not_there() -> None:
    """A state before its first token, weights whose memory was given back, and graphs that keep addresses."""
    module: Any = fg.compile(ODD, target="cpp").module(dtype=torch.float64).eval().requires_grad_(False)
    tokens, more = (x[:, :1] for x in inputs("odd", 2, torch.float64))
    with counted(module) as served:
        state = module.start(2)
        state.position.fill_(-1)
        with pytest.raises(ValueError, match="position is -1"):
            module.step(tokens, more, state)

        fresh = module.start(2)

        def step(tokens: Tensor) -> Tensor:
            found: Tensor = module.step(tokens, more, fresh.clone())[0]
            return found

        traced = torch.jit.trace(step, (tokens,), check_trace=False)
        torch.testing.assert_close(traced(tokens.flip(0)), step(tokens.flip(0)))
        assert served == [False, False, False, True]
        state = module.start(2)
        module.table.untyped_storage().resize_(0)
        kernel: Any = type(module).KERNEL
        state.enter(module.STEP, 1, batch=2)
        with torch.no_grad():
            assert kernel(module, state, 1, tokens, more) is None


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


def test_a_model_without_weights() -> None:
    spec = "dim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n return x - shift(x; by = 1)\n}"
    module: Any = fg.compile(spec, target="cpp").module()
    for dtype in (torch.float32, torch.float64):  # that of the state, and another one
        x = torch.randn(2, 5, 8, dtype=dtype)
        with counted(module) as served:
            found, _ = steps(module, [x], [1] * 5)
        assert served == [False, *[dtype == torch.float32] * 5]
        assert differ(found, [x - torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]]) < 1e-6


def test_ids_are_looked_at_where_a_block_reads_its_table() -> None:
    module = model("llama", torch.float64)
    with counted(module) as served:
        for bad in (11, -1):
            with pytest.raises(IndexError, match="index out of range"):
                module.step(torch.full((1, 1), bad), module.start(1))
        assert not any(served)


REPEATED = """
dim b
dim n
block f(x: float[b, n, 8], ids: int[b, n]) -> float[b, n, 8] {
    weight table: float[11, 8] = normal(std = 0.5)
    return shift(x; by = 1) + embedding(table, ids)
}
model m(x: float[b, n, 8], ids: int[b, n]) -> float[b, n, 8] {
    repeat i in 2 {
        x = f(x, ids) as layers
    }
    return x
}
"""


def test_tables_of_repeated_blocks_are_left_to_pytorch() -> None:
    program = fg.compile(REPEATED, target="cpp").program
    assert program.step is not None
    assert emit_step(program, False, ()) is None


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


@pytest.mark.parametrize("name", ["spelled_out", "encoder_decoder"])
def test_models_with_other_operations_have_none(name: str) -> None:
    assert emit_step(compiled(name).program, False, ()) is None
    assert "KERNEL" not in compiled(name).modules["model.py"]


def test_only_targets_with_cpp_have_one() -> None:
    assert "KERNEL" not in compiled("gpt", "torch").modules["model.py"]
    assert not any(file.startswith("step_kernel") for file in compiled("gpt", "torch").modules)


NAMES = """
use std

dim b
dim n

block f1(x: float[b, n, 8]) -> float[b, n, 8] {
    weight out: float[8] = ones()
    return unit(x * out)
}

block f(x: float[b, n, 8]) -> (float[b, n, 8], float[b, n, 8]) {
    weight w: float[8] = ones()
    return (unit(x * w), unit(x))
}

model m(out: float[b, n, 8]) -> float[b, n, 8] {
    x1 = std.kernel_attention(out; heads = 2, qk_dim = 4, causal = true) as attention
    f1_1 = unit(f1(x1) as one + out)
    (x2, x) = f(f1_1) as two
    f2 = unit(x2 + f1_1)
    x2_0 = unit(f2 + x)
    x1 = unit(x2_0 + x2 * x1)
    x = unit(x1 * f2)
    x1 = unit(x + x2_0)
    x = unit(x1 * x)
    x1 = unit(x - f2)
    x = unit(x1 * x)
    (next_x, x_0) = f(x1 + x) as three
    repeat i in 2 {
        x = f1(x + next_x) as four
        x1 = f1(x1 + x_0) as five
    }
    return x * x1
}
"""
OUTPUTS = """
use std

dim b
dim n

block part(x: float[b, n, 8]) -> (float[b, n, 8], {type}) {{
    weight w: float[12, 8] = normal(std = 0.5)
    return (x * sum(w; axis = 0), {given})
}}

model m(tokens: int[b, n]) -> (float[b, n, 12], {also}) {{
    weight table: float[11, 8] = normal(std = 0.5)
    weight last: float[8, 12] = normal(std = 0.5)
    x = embedding(table, tokens)
    (x, y) = part(std.kernel_attention(x; heads = 2, qk_dim = 4, causal = true) as attention) as parts
    return ({result})
}}
"""


def test_names_of_a_spec_do_not_meet() -> None:
    module = disturbed(fg.compile(NAMES, target="cpp").module(dtype=torch.float64)).eval()
    given = [torch.randn(2, 4, 8, dtype=torch.float64)]
    wanted, _ = steps(module, given, [1] * 4)
    with counted(module) as served:
        found, _ = steps(module, given, [1] * 4)
    assert sum(served) == 4
    assert differ(found, wanted) < 1e-13


@pytest.mark.parametrize(
    ("type", "given", "also", "result"),
    [
        ("float[8, 12]", "w.T", "float[b, n, 12]", "x @ y, x @ last"),  # in memory it is the other way round
        ("float[]", "0.5", "float[b, n, 8]", "x @ last * y, x"),  # it is not in memory
        ("float[12, 8]", "w", "int[b, n]", "x @ (last + y.T), tokens"),
    ],
    ids=["transpose", "constant", "integers"],
)
def test_results_that_no_kernel_writes(type: str, given: str, also: str, result: str) -> None:
    spec = OUTPUTS.format(type=type, given=given, also=also, result=result)
    assert emit_step(fg.compile(spec, target="cpp").program, False, ()) is None


def test_long_expressions() -> None:
    spec = "use std\ndim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n"
    spec += "x = std.kernel_attention(x; heads = 2, qk_dim = 4, causal = true) as attention\n"
    spec += "x = x * 0.99 + x\n" * 550 + "return x\n}"
    kernel = emit_step(fg.compile(spec, target="cpp", validate=False).program, False, ())
    assert kernel is not None
    assert max(map(len, kernel.text.splitlines())) < 3000


def test_golden(golden: Golden) -> None:
    """From the functions of the model on; what stands before is the text of headers."""
    kernel = emit_step(compiled("gpt").program, False, ())
    assert kernel is not None
    _, found, text = kernel.text.rpartition("namespace step {")
    golden(GOLDEN / "step.cpp.txt", found + text)
    assert (
        len(re.findall(r"^inline void \w+\(Call", text, re.MULTILINE)) == 10
    )  # however many layers there are
