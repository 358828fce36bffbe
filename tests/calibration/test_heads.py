"""What each head of a model could be, and plans that serve the heads of one attention apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastgrad_dsl as fg
from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.approximation.polynomial import Polynomial, fit
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.planning.decision import Decision
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.head_picture import head_picture
from fastgrad_dsl.calibration.heads import WHOLE, HeadForm, HeadFound, find_heads
from fastgrad_dsl.commands.cli import app

TEXT = """
use std
param heads = 4
dim b
dim n

block attention(x: float[b, n, 16]) -> float[b, n, 16] {
    q = split_heads(std.linear(x; 16, bias = false) as query, heads)
    k = split_heads(std.linear(x; 16, bias = false) as key, heads)
    v = split_heads(std.linear(x; 16, bias = false) as value, heads)
    return std.attend(q, k, v)
}

model mixed(x: float[b, n, 16]) -> float[b, n, 16] {
    return attention(x) as attention
}
"""
SIZES = (0.2, 0.8, 12.0, 0.2)  # of the queries of each head


def made(tmp_path: Path) -> tuple[Compiled, nn.Module]:
    """A model whose heads have small, middling and large logits."""
    path = tmp_path / "mixed.tfg"
    path.write_text(TEXT.lstrip())
    compiled = fg.compile(path, target="torch")
    model = compiled.module(seed=0, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) / 4)
            if "query" in name:
                weight.mul_(torch.tensor(SIZES).repeat_interleave(4))
    return compiled, model


def batch() -> list[torch.Tensor]:
    return [torch.randn(2, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]


def test_heads_of_different_logits(tmp_path: Path) -> None:
    compiled, model = made(tmp_path)
    found = find_heads(compiled, model, [batch()], 0.02, lambda what: None)
    assert [head.head for head in found.heads] == [0, 1, 2, 3]
    diffuse, middling, sharp, again = found.heads
    assert diffuse.entropy > 0.95 > middling.entropy > sharp.entropy
    assert sharp.largest > 5 > diffuse.largest
    (low, high), (least, most) = ((h.least, h.largest) for h in (diffuse, sharp))
    assert least < low < 0 < high < most
    needed = [head.needed(0.02) for head in found.heads]
    degrees = [None if form is None else form.size for form in needed]
    assert degrees[0] == degrees[3] == 2
    assert degrees[1] in (4, 6)
    assert degrees[2] is None
    assert again.best(0.02, "polynomial").error <= 0.02
    groups = dict(found.groups)[found.paths[0]]
    assert sorted(head for _, heads in groups for head in heads) == [0, 1, 2, 3]
    by_head = {head: words for words, heads in groups for head in heads}
    assert by_head[2] == "exact"
    assert by_head[0].split(" on ")[0].endswith("2")
    assert len(groups) >= 3
    assert 0 < found.output < 0.03


def test_the_plan_with_heads_apart_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """Three groups, one of them exact, each head equal to what serves it alone."""
    compiled, model = made(tmp_path)
    (path,) = [entry.full_path for entry in attention_table(compiled.recognised)]
    two, four = fit("balanced", 2, 1.0), fit("balanced", 4, 2.0)

    def planned(*decisions: Decision) -> torch.Tensor:
        apart = compiled.with_decisions({path: decisions})
        served = apart.module(seed=0, dtype=torch.float64)
        served.load_state_dict(model.state_dict())
        found: torch.Tensor = served(*batch())
        return found

    def serving(polynomial: Polynomial, *heads: int) -> Decision:
        known = LogitRange("data", (20.0,) * len(heads), ("measured",))
        return Decision("", polynomial, break_even=1, range=known, heads=heads if len(heads) < 4 else None)

    groups = planned(
        serving(two, 0, 3),
        serving(four, 1),
        Decision("", heads=(2,)),
    )
    wholes = [planned(serving(two, *range(4))), planned(serving(four, *range(4))), planned(Decision(""))]
    for heads, whole in zip(((0, 3), (1,), (2,)), wholes, strict=True):
        for head in heads:
            part = slice(4 * head, 4 * head + 4)
            assert torch.allclose(groups[..., part], whole[..., part], rtol=0, atol=1e-12)
    assert not torch.allclose(groups, wholes[2], rtol=0, atol=1e-6)


def test_the_cheapest_form_is_affordable_and_within_the_limit() -> None:
    window, cheap = HeadForm("window", 8, 0.3, 0.1), HeadForm("polynomial", 2, 0.04, 0.5, rank=500)
    huge = HeadForm("polynomial", 6, 0.001, 0.2, rank=2_760_681)
    head = HeadFound("a", 0, -1.0, 1.0, 0.5, (window, cheap, huge, WHOLE))
    assert head.best(0.5) == window
    assert head.best(0.05) == cheap
    assert head.best(0.01) == WHOLE
    assert head.needed(0.01) == huge
    assert not huge.affordable
    assert head.best(0.05, "window") == WHOLE
    dear = replace(cheap, time=2.0)
    assert HeadFound("a", 0, -1.0, 1.0, 0.5, (dear, WHOLE)).best(0.05) == WHOLE


def test_the_command_and_its_picture(tmp_path: Path) -> None:
    made(tmp_path)
    picture = tmp_path / "heads.svg"
    call = [
        "heads",
        str(tmp_path / "mixed.tfg"),
        "--data",
        "random",
        "--dim",
        "n=24",
        "--picture",
        str(picture),
    ]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "heads with a polynomial" in result.output
    text = picture.read_text()
    assert text.startswith("<svg")
    assert text.count("<rect") >= 4
    assert "head 3" in text


def test_names_in_the_picture_are_escaped(tmp_path: Path) -> None:
    compiled, model = made(tmp_path)
    found = find_heads(compiled, model, [batch()], 0.02, lambda what: None)
    heads = tuple(replace(head, path="<script>&") for head in found.heads)
    assert "<script>" not in head_picture(replace(found, heads=heads))


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_a_limit_that_is_none(limit: str, tmp_path: Path) -> None:
    made(tmp_path)
    result = CliRunner().invoke(
        app, ["heads", str(tmp_path / "mixed.tfg"), "--data", "random", "--limit", limit]
    )
    assert result.exit_code == 2
