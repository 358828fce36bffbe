"""The tables of families: documented, complete, and specs that are formatted and elaborate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attack.checkpoints import tensors_of, write_folder
from fastgrad_compiler.frontend import elaborate
from fastgrad_dsl.checkpoints.families.rope import Rope, rope_of
from fastgrad_dsl.checkpoints.families.table import FAMILIES
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_dsl.checkpoints.mapping import expanded
from fastgrad_dsl.checkpoints.model import recognise
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import format_source
from fastgrad_grammar.read import read_source

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
CASES = [(family.name, each) for family in FAMILIES.values() for each in family.architectures]
SMALL = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 9, "image_size": 6, "patch_size": 3,
    "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_names_each_field(name: str) -> None:
    words = set(re.findall(r"`([\w-]+)`", PAGE))
    assert {name, *(field.name for field in FAMILIES[name].fields)} <= words


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_fields_has_the_familys_defaults(name: str) -> None:
    spec = recognise({"config.json": {"model_type": name}}).spec
    assert format_source(spec) == spec


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_each_weight_of_a_spec_has_one_place(name: str, architecture: str, tmp_path: Path) -> None:
    config = {**SMALL, "model_type": name, "architectures": [architecture]}
    model = recognise({"config.json": config})
    rules = expanded(model.family.rules(model.config), model.family.layers(model.config), "")
    groups = {rule.paths for rule in rules.values()}
    paths = [path for group in groups for path in group]
    assert sorted(paths) == sorted(model.shapes)
    spec = tmp_path / "model.tfg"
    import_checkpoint(write_folder(tmp_path / "in", config, tensors_of(config)), spec)
    assert elaborate(read_source(spec)).name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, 'rope_type is "longrope"'),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}}, "rope_scaling has extra"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, 'factor is "2"'),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"'),
        ({"rope_parameters": "linear"}, 'rope_parameters is "linear"'),
        (
            {"rope_theta": 10000, "rope_scaling": {**LINEAR, "rope_theta": 7}},
            "rope_theta is 10000, and 7 beside the scaling",
        ),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7}}, "rope_theta is 10000.0, and 7 beside the scaling"),
        ({"rope_theta": 10, "rope_parameters": {"rope_theta": 7}}, "rope_theta is 10, and 7"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4.0}},
            "rope_scaling and rope_parameters disagree",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 7}}, "and 7 beside"),
        (
            {"rope_scaling": {**LINEAR, "type": "dynamic"}},
            'rope_type is "linear", and type beside it "dynamic"',
        ),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 1e999}, "rope_theta"),
        ({"mlp_bias": True}, "mlp_bias is true, expected false"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 3}, "the width of a head is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"architectures": ["LlamaModel"]}, "expected one of LlamaForCausalLM"),
        ({"model_type": "qwen2", "architectures": None, "layer_types": ["x", "y"]}, 'layer_types has "x"'),
        *(
            (
                {
                    "model_type": name,
                    "architectures": None,
                    "layer_types": ["full_attention", "sliding_attention"],
                },
                "layer_types is [",
            )
            for name in ("llama", "gemma", "olmo2")
        ),
        ({"layer_types": "full_attention"}, "null, or full_attention alone"),
        (
            {
                "model_type": "gemma",
                "architectures": None,
                "hidden_act": "gelu",
                "hidden_activation": "gelu_pytorch_tanh",
            },
            'hidden_act is "gelu", and hidden_activation "gelu_pytorch_tanh"',
        ),
        (
            {"model_type": "qwen2", "architectures": None, "layer_types": ["full_attention"]},
            "expected a list of 2",
        ),
        (
            {"model_type": "gemma2", "architectures": None, "sliding_window": None},
            "sliding_window is null",
        ),
    ],
)
def test_what_would_change_the_computation_is_refused_by_name(change: dict[str, object], said: str) -> None:
    config = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **change}
    with pytest.raises(TfgError) as caught:
        _ = recognise({"config.json": config}).spec
    (found,) = caught.value.diagnostics
    assert found.code == "FG602"
    assert said in found.message


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 7, "rope_scaling": LINEAR},
        {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 3, "rope_theta": 7.0}},
        {"rope_parameters": {**LINEAR, "rope_theta": 7}},
        {"rope_theta": 7, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 7}},
        {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": LINEAR},
    ],
)
def test_rotary_positions_that_are_said_twice_alike(change: dict[str, object]) -> None:
    config = {**SMALL, "model_type": "llama", **change}
    found = recognise({"config.json": config})
    assert rope_of(found.config) == Rope(7.0, "(3.0,)")


@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2"])
def test_layer_types_that_say_full_attention_change_nothing(name: str) -> None:
    config = {**SMALL, "model_type": name}
    said = {**config, "layer_types": ["full_attention"] * 2}
    assert recognise({"config.json": said}).spec == recognise({"config.json": config}).spec
