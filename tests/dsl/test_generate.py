"""Generation from Python: prompts of every form, samples, readings, and the text of tokens while they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.generation import reading
from fastgrad_dsl.generation.continuation import Continuation
from fastgrad_dsl.generation.generate import Prompt
from fastgrad_dsl.generation.rerun import rerun
from fastgrad_dsl.models.tokenizer import ByteTokenizer
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.step_models import Rerun
from tests.dsl.tokenizers_of_tests import write_tokenizer

VOCABULARY = 300
SPEC = """use std
param own = true
dim b
dim n <= 64
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 8] = normal(std = 1.0)
    x = embedding(table, tokens)
    if own {
        x = x + std.mixer(x; heads = 2, near = 4)
    } else {
        x = x + std.attention(x; heads = 2, causal = true, rope = 10000.0)
    }
    return x @ table.T
}
"""


class Tail(nn.Module):
    """Logits of the next token from the mean of all tokens so far, and the last one."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(vocabulary, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.dropout(rows + rows.cumsum(1) / counts) @ self.table.weight.T


def ids(prompt: Prompt, tokens: int = 10, model: nn.Module | None = None, **more: object) -> list[list[int]]:
    """What is written, a list for each sequence."""
    drawn = list(fg.generate(model or Rerun(Tail()), prompt, tokens=tokens, **more))  # type: ignore[arg-type]
    assert all(each.dtype == torch.int64 for each in drawn)
    return torch.stack(drawn, 1).tolist()


def by_hand(prompt: Sequence[int], tokens: int, size: int) -> list[int]:
    """The most likely tokens, the whole text run again for each."""
    model, text = Tail().eval(), list(prompt)
    for _ in range(tokens):
        text.append(int(model(torch.tensor([text]))[0, -1, :size].argmax()))
    return text[len(prompt) :]


GREEDY = fg.Sampling(temperature=0)


def test_prompts_of_every_form() -> None:
    wanted = by_hand(b"abc", 10, VOCABULARY)
    for prompt in (
        [97, 98, 99],
        (97, 98, 99),
        list(torch.tensor([97, 98, 99])),
        list(np.array([97, 98, 99])),
        torch.tensor([[97, 98, 99]]),
        torch.tensor([[97, 98, 99]]).short(),
    ):
        assert ids(prompt, sampling=GREEDY) == [wanted]
    for text in ("abc", b"abc"):  # only bytes are drawn after a text
        assert ids(text, sampling=GREEDY) == [by_hand(b"abc", 10, 256)]
    assert ids("\N{SNOWMAN}\udcff", sampling=GREEDY) == [by_hand(b"\xe2\x98\x83\xff", 10, 256)]


@pytest.mark.parametrize("own", ["true", "false"])
def test_a_compiled_model_writes_what_it_writes_by_running_the_whole_text_again(own: str) -> None:
    model = fg.compile(SPEC, params={"own": own}, target="torch", validate=False).module(dtype=torch.float64)
    sampling = fg.Sampling(seed=3, top_p=0.9, repetition_penalty=1.2)
    wanted = rerun(model, b"abcde", 16, sampling, window=64, size=256)
    assert ids("abcde", 16, model, sampling=sampling) == [wanted]
    found = ids(torch.tensor([list(b"abcde"), list(b"vwxyz")]), 16, model, samples=2, sampling=sampling)
    assert found[0] == wanted
    other = fg.Sampling(seed=6, top_p=0.9, repetition_penalty=1.2)
    assert found[3] == rerun(model, b"vwxyz", 16, other, window=64, size=256)
    with pytest.raises(ValueError, match="declared for at most 64"):
        ids("abcde", 61, model)


def test_a_model_with_other_inputs_is_refused() -> None:
    text = SPEC.replace("tokens: int[b, n]", "tokens: int[b, n], more: float[b, n, 8]").replace(
        "tokens)\n", "tokens) + more\n"
    )
    model = fg.compile(text, target="torch", validate=False).module()
    with pytest.raises(TfgError, match=r"\[FG434\] Tiny cannot be run token by token: it takes other inputs"):
        ids("abc", model=model)


def test_a_batch_is_its_rows() -> None:
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = ids(prompts, sampling=fg.Sampling(seed=7))
    assert found[0] == ids(prompts[:1], sampling=fg.Sampling(seed=7))[0]
    assert found[1] == ids(prompts[1:], sampling=fg.Sampling(seed=8))[0]


def test_samples_of_a_batch_come_one_batch_after_the_other() -> None:
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = ids(prompts, samples=2, sampling=fg.Sampling(seed=7))
    for row, seed in enumerate((7, 8, 9, 10)):
        assert found[row] == ids(prompts[row % 2 :][:1], sampling=fg.Sampling(seed=seed))[0]


def test_a_prompt_is_read_once_and_the_last_token_not_at_all() -> None:
    model = Rerun(Tail())
    ids("abcdef", 5, model, samples=3)
    assert model.calls == [6, 1, 1, 1, 1]


def test_a_long_prompt_is_read_in_parts_if_its_logits_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one token that tells how many logits there are; 300 for each of 2 rows."""
    prompts = torch.arange(20).reshape(2, 10)
    wanted = ids(prompts)
    monkeypatch.setattr(reading, "SHORT_CALL", 3)
    for largest, calls in ((2400, [1, 4, 4, 2]), (10, [1, 3, 3, 3, 1]), (6000, [1, 10])):
        monkeypatch.setattr(reading, "LARGEST_LOGITS", largest)
        assert ids(prompts, model=(model := Rerun(Tail()))) == wanted
        assert model.calls == [*calls, *[1] * 9]


def test_what_was_read_serves_many_times() -> None:
    model = Rerun(Tail())
    read = fg.read_prompt(model, "abc")
    for _ in range(2):
        assert ids("def", model=model, after=read) == ids("abcdef")
        assert ids("", model=model, after=read) == ids("abc")
    assert int(read.state.position) == 3
    both = fg.read_prompt(model, "def", after=read)
    assert ids(b"", model=model, after=both) == ids("abcdef")


def test_the_penalty_counts_prompt_and_text() -> None:
    sampling = fg.Sampling(temperature=0, repetition_penalty=1e9)
    (found,) = ids([5, 6], 20, sampling=sampling)
    assert len({5, 6, *found}) == 22


def test_the_model_is_left_as_it_was() -> None:
    """In evaluation while it is asked, so that dropout drops nothing; without gradients, which callers keep."""
    model = Rerun(Tail()).train()
    drawn = fg.generate(model, "abc", tokens=3, sampling=GREEDY)
    assert model.training
    found = []
    for token in drawn:
        assert model.training
        assert torch.is_grad_enabled()
        found.append(int(token))
    assert found == by_hand(b"abc", 3, 256)


def test_a_tokenizer_splits_the_prompt_and_limits_what_is_drawn(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = fg.load_tokenizer(tmp_path / "tokenizer.json")
    prompt = tokenizer.encode(b"the ca", "it").tolist()
    assert len(prompt) == 3
    assert ids("the ca", tokenizer=tokenizer, sampling=GREEDY) == [by_hand(prompt, 10, size)]
    assert ids(prompt, tokenizer=tokenizer, sampling=GREEDY) == [by_hand(prompt, 10, size)]
    with pytest.raises(TfgError, match=r"\[FG436\] the tokenizer has 261 tokens, and model Rerun 200"):
        ids([1], tokenizer=tokenizer, model=Rerun(Tail(200)))


def test_what_is_refused() -> None:
    nothing: tuple[Prompt, ...] = ("", b"", [], torch.empty(1, 0, dtype=torch.int64))
    for empty in nothing:
        with pytest.raises(TfgError, match=r"\[FG437\] the prompt has no tokens"):
            ids(empty)
    for wrong in ([1, 300], [-1]):
        with pytest.raises(TfgError, match=r"\[FG437\] the prompt has ids from .*, some of which"):
            ids(wrong)
    with pytest.raises(TfgError, match=r"\[FG434\] Tail cannot be run token by token: "):
        ids("abc", model=Tail())
    for tensor in (torch.tensor([1, 2]), torch.tensor([[1.0]]), torch.empty(0, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="a prompt is a text, ids, or an int tensor"):
            ids(tensor)
    others: tuple[tuple[Any, str], ...] = (
        ([1.5], "a sequence with float 1.5"),
        ([1, True], "a sequence with bool True"),
        (["a"], "a sequence with str a"),
        ([[1, 2]], "a sequence with list "),
        (np.array([[1, 2]]), "a sequence with ndarray "),
        ([torch.tensor(True)], "a sequence with Tensor "),
        ([torch.tensor([1])], "a sequence with Tensor "),
        (torch.ones(1, 2, dtype=torch.bool), r"a tensor \[1, 2\] of bool"),
        (None, "NoneType"),
        (3, "int"),
    )
    for wrong_kind, said in others:
        with pytest.raises(
            ValueError, match=rf"a prompt is a text, ids, or an int tensor \[b, c\], not {said}"
        ):
            ids(wrong_kind)
    for large in (2**70, -(2**70)):
        with pytest.raises(TfgError, match=rf"\[FG437\] the prompt has the id {large}"):
            ids([1, large])
    with pytest.raises(ValueError, match="tokens -1, samples 1"):
        ids("abc", -1)
    with pytest.raises(ValueError, match="tokens 10, samples 0"):
        ids("abc", samples=0)
    with pytest.raises(ValueError, match="a batch of 2, and what was read before one of 1"):
        ids(torch.ones(2, 3).long(), model=(model := Rerun(Tail())), after=fg.read_prompt(model, "abc"))


def test_samples_larger_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad_dsl.models.batches.memory_bytes", lambda: 1000)
    with pytest.raises(
        TfgError, match=r"\[FG426\] not enough memory: the state of 42 samples takes 1,344 bytes"
    ):
        ids("abc", samples=42)


# ---------------------------------------------------------------- the text


def pieces(text: str, *stops: str) -> tuple[list[str], Continuation]:
    """What is said after each byte of a text, and at its end."""
    said = Continuation(ByteTokenizer(), stops)
    found = [said.push(byte) for byte in text.encode()]
    return [*found, said.finish("tokens")], said


def test_characters_are_shown_when_they_are_complete() -> None:
    found, said = pieces("a\N{SNOWMAN}b")
    assert found == ["a", "", "", "\N{SNOWMAN}", "b", ""]
    assert (said.text, said.tokens, said.ended) == ("a\N{SNOWMAN}b", 5, "tokens")


def test_a_character_that_is_never_complete_is_replaced() -> None:
    said = Continuation(ByteTokenizer(), ())
    found = [said.push(byte) for byte in (255, 97, 0xE2, 0x98)]
    assert [*found, said.finish("interrupt")] == ["\ufffd", "a", "", "", "\ufffd"]
    assert said.ended == "interrupt"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    found, said = pieces("xababyabac", "abac")
    assert "".join(found) == said.text == "xababy"
    assert found[:6] == ["x", "", "", "", "ab", "aby"]
    assert (said.tokens, said.ended) == (10, "stop")
    assert said.push(97) == said.finish("tokens") == ""
    assert said.tokens == 10


def test_what_only_began_a_stop_string_is_shown_at_the_end() -> None:
    found, said = pieces("xaba", "abac")
    assert found == ["x", "", "", "", "aba"]
    assert said.ended == "tokens"


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    assert pieces("one. two\n", "\n", ". ")[1].text == "one"
    assert pieces("aab", "ab", "aab")[1].text == ""
    assert pieces("\N{SNOWMAN}x", "\N{SNOWMAN}")[1].text == ""
