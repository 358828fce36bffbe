"""The changed text: what a person reads, what stays as it is, and what cannot be converted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.conversion.spec import ConvertedSpec, Form, convert_spec
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import format_source
from tests.conversion.models import DECODER


def converted(spec: str, patterns: Sequence[str] = ()) -> ConvertedSpec:
    compiled = fg.compile(spec, target="torch", validate=False)
    return convert_spec(compiled, Form(near=8, far_dim=4), patterns)


def model(body: str, head: str = "", signature: str = "x: float[b, n, 16]") -> str:
    return f"use std\ndim b\ndim n <= 64\n{head}\nmodel m({signature}) -> float[b, n, 16] {{\n{body}\n}}\n"


def decisions(spec: ConvertedSpec) -> dict[str, str]:
    return {entry.path: entry.decision for entry in spec.compiled.plan_document.attentions}


def changed_lines(before: str, after: str) -> list[str]:
    return [line.strip() for line in after.splitlines() if line not in before.splitlines()]


def test_one_call_changes_and_the_rest_of_the_text_stays() -> None:
    spec = converted(DECODER)
    text = spec.compiled.source.text
    assert changed_lines(DECODER, text) == [
        "x = x + std.attention(",
        "std.rms_norm(x);",
        "heads,",
        "causal = true,",
        "rope = 100.0,",
        "near = 8,",
        "far_dim = 4,",
        ")  # who heeds whom",
    ]
    assert text == format_source(text)
    assert set(decisions(spec).values()) == {"polynomial"}
    assert [entry.path for entry in spec.converted] == [
        "layers.0.attention.attend",
        "layers.1.attention.attend",
    ]


def test_weights_keep_their_paths_and_shapes() -> None:
    before = fg.compile(DECODER, target="torch", validate=False).module(seed=0).state_dict()
    after = converted(DECODER).compiled.module(seed=0).state_dict()
    assert {name: value.shape for name, value in before.items()}.items() <= {
        name: value.shape for name, value in after.items()
    }.items()
    own = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert own == {"map_q", "map_k", "bias_q", "bias_k", "shift"}


def test_some_turns_of_a_repeat() -> None:
    spec = converted(DECODER, ["layers.1"])
    assert decisions(spec) == {
        "layers.0.attention.attend": "exact",
        "layers.1.attention.attend": "polynomial",
    }
    text = spec.compiled.source.text
    assert "block layer(x: float[b, n, d]; heads: int, linear: bool)" in text
    assert "x = layer(x; heads = 2, linear = i >= 1) as layers" in text
    assert "far_dim = 4 if linear else none" in text
    assert [left.reason for left in spec.left] == ["no --at names it"]


@pytest.mark.parametrize(
    ("patterns", "condition"),
    [(["layers.0"], "i < 1"), (["layers.1", "layers.3"], "i == 1 or i == 3"), (["layers.[23]"], "i >= 2")],
)
def test_turns_are_said_in_the_call_itself(patterns: list[str], condition: str) -> None:
    body = "repeat i in 4 {\n x = std.transformer_layer(x; heads = 2, hidden = 8) as layers\n}\nreturn x"
    spec = converted(model(body), patterns)
    assert f"far_dim = 4 if {condition} else none" in spec.compiled.source.text
    told = [decision == "polynomial" for decision in decisions(spec).values()]
    assert [eval(condition, {"i": i}) for i in range(4)] == told


def test_a_text_that_was_not_formatted_keeps_its_form() -> None:
    text = model("return std.attention(x;heads=2)")
    found = converted(text).compiled.source.text
    assert "std.attention(x;heads=2, near = 8, far_dim = 4)" in found
    assert found.replace(", near = 8, far_dim = 4", "") == text


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "call",
    [
        "std.attention(x; 2, bias = true, kv_heads = 1)",
        "std.attention_padded(x, mask; 2, causal = true)",
        "std.cross_attention(x, x; 2)",
        "std.cross_attention_padded(x, x, mask; 2)",
        "std.transformer_layer(x; 2, 8, pre_norm = false)",
        "std.transformer_layer_padded(x, mask; 2, 8)",
        "std.llama_layer(x; 2, hidden = 8)",
        "std.decoder_layer(x, x, mask; 2, 8)",
        "std.attend(split_heads(x, 2), split_heads(x, 2), split_heads(x, 2))",
    ],
)
def test_each_block_of_the_library_that_has_softmax(call: str) -> None:
    spec = converted(model(f"y = {call}\nreturn y", signature="x: float[b, n, 16], mask: bool[b, n]"))
    assert set(decisions(spec).values()) == {"polynomial"}
    assert not spec.left


def test_what_is_linear_already_is_left_with_the_reason() -> None:
    body = """x = std.kernel_attention(x; heads = 2) as own
x = std.attention(x; heads = 2, window = 4) as narrow
x = std.attention(x; heads = 2, gain = 1.0) as limited
x = std.attention(x; heads = 2, forget = true) as gated
x = merge_heads(softmax(split_heads(x, 2) @ split_heads(x, 2).T) @ split_heads(x, 2))
return std.attention(x; heads = 2) as last"""
    spec = converted(model(body))
    assert [entry.path for entry in spec.converted] == ["last.attend"]
    reasons = {left.path.split(".")[0]: left.reason for left in spec.left}
    assert "polynomial of the model's own" in reasons["own"]
    assert "window" in reasons["narrow"]
    assert "limited" in reasons["limited"]
    assert "forget" in reasons["gated"]
    assert any("call std.attend there" in left.reason for left in spec.left)


def refusal(spec: str, patterns: Sequence[str] = ()) -> TfgError:
    with pytest.raises(TfgError) as raised:
        converted(spec, patterns)
    return raised.value


def test_refusals() -> None:
    body = "return std.decoder_layer(x, x, mask; 2, 8) as one"
    spec = model(body, signature="x: float[b, n, 16], mask: bool[b, n]")
    error = refusal(spec, ["*cross*"])
    assert error.diagnostics[0].code == "FG606"
    assert "the text makes them by one call" in error.diagnostics[0].message
    assert refusal(DECODER, ["nothing.*"]).diagnostics[0].code == "FG302"
    own = refusal(model("return std.kernel_attention(x; heads = 2)"))
    assert own.diagnostics[0].code == "FG606"
    assert "own" in own.diagnostics[0].help[0]


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    spec = DECODER.replace("heads: int", "linear: int").replace("heads, causal", "heads = linear, causal")
    text = converted(spec.replace("heads = 2)", "linear = 2)"), ["layers.0"]).compiled.source.text
    assert "linear_2 = i < 1" in text
    assert "if linear_2 else none" in text
