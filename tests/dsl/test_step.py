"""Generated models in steps: equal to the whole, and a state that PyTorch's own tools take."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree

import fastgrad_dsl as fg
from fastgrad_compiler.reference import interpret
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.state_file import load_state, save_state
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.models import EXAMPLES, INPUTS, SIZES

CAUSAL = tuple(name for name in SIZES if name not in ("bert", "vit"))
N = 13
SPLITS = ([1] * N, [N], [4, 1, 1, 7])


@cache
def compiled(name: str, **more: Any) -> Compiled:
    return fg.compile(EXAMPLES / f"{name}.tfg", params={**SIZES[name], **more}, target="torch")


def parts(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs that are tokens, and those that are the same in every call."""
    *fixed, tokens = INPUTS[name]
    return [tokens], fixed


def in_steps(model: Any, tokens: list[Tensor], fixed: list[Tensor], split: list[int]) -> Tensor:
    """The results of calls on so many tokens each."""
    state, found, first = model.start(*fixed) if fixed else model.start(tokens[0].shape[0]), [], 0
    for count in split:
        out, state = model.step(*(x[:, first : first + count] for x in tokens), state)
        found.append(out)
        first += count
    assert int(state.position) == first
    return torch.cat(found, 1)


def difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / (1.0 + expected.abs().max()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_in_steps_is_the_whole(name: str) -> None:
    """Polynomials and exact attention, float64: what the text means, whatever break-even lengths say."""
    spec = compiled(name)
    model = spec.module(dtype=torch.float64)
    tokens, fixed = parts(name)
    exact = spec.reference(model)
    with torch.no_grad():
        wanted = exact(*fixed, *tokens)
    meant = interpret.run(spec.program, INPUTS[name], model.state_dict(), dtype=torch.float64)
    assert isinstance(meant, Tensor)
    for split in SPLITS:
        assert difference(in_steps(exact, tokens, fixed, split), wanted) < 1e-12
        found = in_steps(model, tokens, fixed, split)
        # the encoder's keys are fewer than its break-even length: exact where the interpreter takes the polynomial
        assert difference(found, meant) < (1e-3 if name == "encoder_decoder" else 1e-12)


@pytest.mark.parametrize("scores", ["alibi(s)", "near_far(2.0 * s, s; 3)"])
def test_a_window_has_slopes_and_a_near_field(scores: str) -> None:
    text = f"""
dim b
dim n
model m(x: float[b, n, 6]) -> float[b, n, 6] {{
    weight w: float[6, 6] = xavier()
    q = split_heads(x @ w, 2)
    s = q @ q.T
    return merge_heads(softmax(window(causal({scores}); 5)) @ q)
}}
"""
    model: Any = fg.compile(text, target="torch").module(dtype=torch.float64)
    x = torch.randn(2, N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for split in SPLITS:
        assert difference(in_steps(model, [x], [], split), model(x)) < 1e-12


STD_MODELS = {
    "gpt": "std.gpt(tokens; vocab = 17, context = 64, width = 16, heads = 2, depth = 2)",
    "llama": "std.llama(tokens; vocab = 17, width = 16, heads = 2, depth = 2)",
}


@pytest.mark.parametrize("name", STD_MODELS)
def test_what_is_returned_is_computed_before_the_call_ends(name: str) -> None:
    """A model that is a single call, whose step reads the position, in its `return`."""
    text = f"""
use std
dim b
dim n <= 64
model small(tokens: int[b, n]) -> float[b, n, 17] {{
    return {STD_MODELS[name]}
}}
"""
    model: Any = fg.compile(text, target="torch").module(dtype=torch.float64)
    tokens = torch.arange(2 * N).reshape(2, N) % 17
    for split in SPLITS:
        assert difference(in_steps(model, [tokens], [], split), model(tokens)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    spec = compiled("gpt")
    model = spec.module(dtype=torch.float64)
    tokens, _ = parts("gpt")
    wanted = model(*tokens)
    found = in_steps(model.to(dtype), tokens, [], SPLITS[2])
    assert found.dtype == dtype
    assert difference(found, wanted) < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


def test_what_is_given_in_every_call_is_read_by_the_first_alone() -> None:
    model: Any = compiled("encoder_decoder").module()
    source, mask, target = INPUTS["encoder_decoder"]
    state = model.start(source, mask)
    source.fill_(0)
    first, _ = model.step(target[:, :3], state)
    assert difference(first, in_steps(model, [target[:, :3]], [_tokens_again(), mask], [3])) == 0.0
    with pytest.raises(TypeError, match="start takes source, mask"):
        model.start(2)


def _tokens_again() -> Tensor:
    source = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(9))
    INPUTS["encoder_decoder"][0].copy_(source)
    return source


# ---------------------------------------------------------------- the state


@pytest.fixture(scope="module")
def gpt() -> Any:
    return compiled("gpt").module()


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, n), generator=torch.Generator().manual_seed(n))


def test_a_state_ends_without_the_garbage_collector(gpt: Any) -> None:
    """What a call has made, and gradients hang on in pieces, is held by no circle of references."""
    gc.disable()
    try:
        state = gpt.start(1)
        gpt.step(torch.zeros(1, 3, dtype=torch.long), state)
        gone = weakref.ref(state)
        del state
        assert gone() is None
    finally:
        gc.enable()


def test_a_clone_goes_its_own_way(gpt: Any) -> None:
    _, state = gpt.step(tokens(5), gpt.start(2))
    other = state.clone()
    first, _ = gpt.step(tokens(3), state)
    gpt.step(tokens(7), other)
    assert int(other.position) == 12
    again, _ = gpt.step(tokens(1), other.clone())
    twice, _ = gpt.step(tokens(1), copy.deepcopy(other))
    assert torch.equal(again, twice)
    assert first.shape[1] == 3


def test_sequences_are_taken_out_and_repeated(gpt: Any) -> None:
    given = tokens(6, 3)
    _, state = gpt.step(given, gpt.start(3))
    next_, _ = gpt.step(tokens(2, 3), state.clone())
    for chosen in (slice(1, 2), torch.tensor([1]), torch.tensor([False, True, False])):
        one, _ = gpt.step(tokens(2, 3)[1:2], state[chosen])
        assert difference(one, next_[1:2]) < 1e-6
    doubled, _ = gpt.step(tokens(2, 3).repeat(2, 1), state.repeat(2))
    assert difference(doubled, next_.repeat(2, 1, 1)) < 1e-6
    others: tuple[Any, ...] = (
        1,
        -1,
        True,
        [1],
        None,
        ...,
        (slice(1), 0),
        torch.tensor(1),
        torch.ones(3, 3) > 0,
    )
    for other in others:
        with pytest.raises(TypeError, match="sequences of a state are a slice"):
            state[other]


@pytest.mark.parametrize("count", [0, -1])
def test_a_batch_has_at_least_one_sequence(gpt: Any, count: int) -> None:
    for start in (lambda: gpt.start(count), lambda: gpt.start(batch_size=count)):
        with pytest.raises(ValueError, match=f"batch_size {count}: expected at least 1"):
            start()
    with pytest.raises(ValueError, match=f"times {count}: expected at least 1"):
        gpt.start(1).repeat(count)


def test_it_is_a_pytree_that_moves(gpt: Any) -> None:
    _, state = gpt.step(tokens(5), gpt.start(2))
    leaves, spec = _pytree.tree_flatten(state)
    assert sum(x.numel() * x.element_size() for x in leaves) == state.nbytes
    again = _pytree.tree_unflatten([x.clone() for x in leaves], spec)
    one, _ = gpt.step(tokens(1), again)
    two, _ = gpt.step(tokens(1), state.clone())
    assert torch.equal(one, two)
    moved = state.to(dtype=torch.float64)
    kinds = {path.rpartition(".")[2]: x.dtype for path, x in moved.tensors.items()}
    assert kinds["k"] == kinds["sums"] == torch.float64
    narrow = {path.rpartition(".")[2]: x.dtype for path, x in state.to(dtype=torch.bfloat16).tensors.items()}
    assert narrow["sums"] == narrow["log_gate"] == torch.float64
    assert narrow["k"] == torch.bfloat16


def test_memory_does_not_grow_with_tokens(gpt: Any) -> None:
    state = gpt.start(1)
    sizes = set()
    for _ in range(5):
        _, state = gpt.step(tokens(40, 1), state)
        sizes.add(state.nbytes)
    assert len(sizes) == 1


def test_no_graph_is_kept(gpt: Any) -> None:
    out, state = gpt.step(tokens(2), gpt.start(2))
    assert not out.requires_grad
    assert not any(x.requires_grad for x in state.tensors.values())


def test_wrong_states_are_refused(gpt: Any) -> None:
    other: Any = compiled("gpt", depth=1).module()
    with pytest.raises(ValueError, match="another model"):
        other.step(tokens(1), gpt.start(2))
    with pytest.raises(ValueError, match="of 2 sequences, and the inputs are of 3"):
        gpt.step(tokens(1, 3), gpt.start(2))
    short: Any = fg.compile("use std\ndim b\ndim n <= 4\nmodel m(x: float[b, n, 2]) -> float[b, n, 2] {\n"
                            "    return x + shift(x)\n}\n").module()  # fmt: skip
    _, state = short.step(torch.ones(1, 4, 2), short.start(1))
    with pytest.raises(ValueError, match="5 tokens, but the model is declared for at most 4"):
        short.step(torch.ones(1, 1, 2), state)


def test_a_state_is_saved_with_its_model(gpt: Any, tmp_path: Path) -> None:
    _, state = gpt.step(tokens(5), gpt.start(2))
    save_state(state, tmp_path / "state.safetensors", gpt)
    again = load_state(tmp_path / "state.safetensors", gpt)
    one, _ = gpt.step(tokens(3), again)
    two, _ = gpt.step(tokens(3), state)
    assert torch.equal(one, two)
    other: Any = compiled("gpt").module(seed=1)
    with pytest.raises(ValueError, match="another model, or of other weights"):
        load_state(tmp_path / "state.safetensors", other)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "state.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a state"):
        load_state(damaged, gpt)
    save_file(load_file(tmp_path / "state.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="another model"):
        load_state(tmp_path / "bare.safetensors", gpt)


# ---------------------------------------------------------------- PyTorch's tools


class Step(nn.Module):
    """A step as a module of its own, which torch.export takes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor, state: Any) -> Any:
        return self.model.step(given, state)


@pytest.mark.medium
@pytest.mark.parametrize("exact", [False, True])
def test_torch_compile(exact: bool) -> None:
    spec = compiled("based")
    model: Any = spec.reference(spec.module()) if exact else spec.module()
    given = tokens(9)
    wanted, _ = model.step(given, model.start(2))
    step = torch.compile(model.step, fullgraph=True, backend="eager", dynamic=False)
    state, found = model.start(2, capacity=16), []
    for place in range(9):
        out, state = step(given[:, place : place + 1], state)
        found.append(out)
    assert difference(torch.cat(found, 1), wanted) < 1e-5


@pytest.mark.medium
def test_torch_export() -> None:
    model: Any = compiled("gpt").module()
    state = model.start(2)
    exported = torch.export.export(Step(model), (tokens(1), state.clone()), strict=False).module()
    given, found, other = tokens(9), [], state.clone()
    wanted, _ = model.step(given, state)
    for place in range(9):
        out, other = exported(given[:, place : place + 1], other)
        found.append(out)
    assert difference(torch.cat(found, 1), wanted) < 1e-5


@pytest.mark.medium
def test_generated_files_need_torch_alone(tmp_path: Path) -> None:
    compiled("gpt").write(tmp_path / "build")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import build\n"
        "model = build.MODEL()\n"
        "out, state = model.step(torch.zeros(1, 3, dtype=torch.long), model.start(1))\n"
        "print(tuple(out.shape), int(state.position), 'fastgrad_dsl' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 3, 11) 3 False"


GUARDED = """use std
dim b
dim n
model m(x: float[b, n, 16]) -> float[b, n, 16] {
    h = split_heads(x, 2)
    return merge_heads(softmax(causal(assume_bound(h @ h.T; bound = 2.0))) @ h)
}
budget { output <= 0.1
  at "*" degree = 4
  on_violation = POLICY }
"""


@pytest.mark.parametrize("policy", ["warn", "raise", "exact", "clamp"])
def test_guards_watch_steps(policy: str) -> None:
    model: Any = fg.compile(GUARDED.replace("POLICY", policy), target="torch").module()
    x = 0.1 * torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    state = model.start(2)
    for place in range(12):
        _, state = model.step(x[:, place : place + 1], state)
    (status,) = model.budget_status()
    assert (status["calls"], status["proved"], status["violations"]) == (12, 12, 0)
    large = 30.0 * x[:, :1]
    if policy in ("raise", "exact"):
        before = state.clone()
        with pytest.raises(RuntimeError, match=f"on_violation = {policy}"):
            model.step(large, state)
        with pytest.raises(RuntimeError, match="failed half way"):
            model.step(x[:, :1], state)
        assert model.step(x[:, :1], before)[0].isfinite().all()
        return
    out, _ = model.step(large, state)
    assert model.budget_status()[0]["violations"] == 1
    assert out.isfinite().all()


def test_why_there_is_no_step_form() -> None:
    with pytest.raises(TfgError, match=r"FG501.*it sees later tokens"):
        compiled("bert").stepped("n")
    assert not hasattr(compiled("bert").module(), "start")
    assert compiled("gpt").stepped().along == "n"


def test_texts_of_steps_are_read_like_those_of_the_whole() -> None:
    text = compiled("gpt").modules["model.py"]
    assert len(re.findall(r"def step\(self", text)) == 5  # the model, its layer, and what looks back in it
    assert text.count("state.advance(n)") == 1
