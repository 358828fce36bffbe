"""What a range from weights rests on and says of it: sources, heads, what the program proves, centres of keys."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isinf

import pytest
import torch

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.analysis.weights.ranges import weight_ranges
from fastgrad_compiler.analysis.weights.rows import spectral_norm
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.planning.decision import Decision
from fastgrad_compiler.planning.plan import plan_attention
from tests.compiler.attention_variants import VARIANTS, Variant
from tests.compiler.weight_specs import ascended, only, program_of, spec_program, weights_of, with_attention


def test_without_a_norm_nothing_is_proved() -> None:
    program = spec_program("return std.attention(x; heads = 4)")
    found = only(program, weights_of(program, 1.0))
    assert found == LogitRange("weights", (inf,) * 4, ("nothing limits the rows of x (spec.tfg:5)",))


def test_a_residual_stream_of_unknown_size_is_lost_and_a_norm_finds_it_again() -> None:
    program = spec_program(
        "x = x + std.rms_norm(x)\n    y = std.attention(x; heads = 2) as lost\n"
        "    return std.attention(std.rms_norm(x + y); heads = 2) as found"
    )
    lost, found = weight_ranges(program, weights_of(program, 1.0)).values()
    assert isinf(lost.bound)
    assert not isinf(found.bound)


def test_embeddings_are_bounded_by_their_longest_row() -> None:
    program = spec_program(
        "weight table: float[9, 16] = normal()\n    weight places: float[50, 16] = normal()\n"
        "    x = embedding(table, ids) + embedding(places, positions(n)) + sinusoid(n, 16)\n"
        "    return std.attention(x; heads = 1)",
        "ids: int[b, n]",
    )
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    longest = [weights[name].norm(dim=-1).max() for name in ("table", "places")]
    product = spectral_norm(weights["attention.wq"] @ weights["attention.wk"].T)
    expected = (longest[0] + longest[1] + 8**0.5) ** 2 * product / 4
    assert found.bound == pytest.approx(expected.item(), rel=2e-6)
    assert "row norm at most" in found.reasons[0]
    assert "the longest row of `table`" in found.reasons[0]


def test_the_reasons_name_weights_and_numbers() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    row = 4 * weights["rms_norm.w"].abs().max().item()
    head = max(range(4), key=found.heads.__getitem__)
    assert found.reasons[0] == (
        f"row norm at most {row:.4g} through the rms norm `rms_norm.w` (sqrt(d) max|gamma|)"
    )
    assert found.reasons[1].startswith(
        f"head {head}, the widest: sigma(W_q W_k^T) of `attention.wq`, `attention.wk`"
    )
    assert found.reasons[1].endswith(f"|s| is at most {found.bound:.4g}")
    assert found.reasons[2] == f"R of the other heads goes down to {min(found.heads):.4g}"


def test_the_form_of_a_head_is_the_norm_of_its_product_and_at_most_that_of_the_factors() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    gamma, wq, wk = (weights[name] for name in ("rms_norm.w", "attention.wq", "attention.wk"))
    for head, found in enumerate(only(program, weights).heads):
        columns = slice(4 * head, 4 * head + 4)
        left, right = gamma[:, None] * wq[:, columns], gamma[:, None] * wk[:, columns]
        assert found == pytest.approx(16 / 2 * torch.linalg.matrix_norm(left @ right.T, 2).item(), rel=2e-6)
        assert found < 0.999 * 16 / 2 * (spectral_norm(left) * spectral_norm(right)).item()


def test_a_key_head_serves_its_own_query_heads() -> None:
    program = program_of("grouped")
    weights = weights_of(program, 1.0)
    before = only(program, weights).heads
    weights["attention.wk"][:, 4:] *= 2
    after = only(program, weights).heads
    assert after == pytest.approx((before[0], before[1], 2 * before[2], 2 * before[3]), rel=1e-9)


def test_what_the_program_proves_stays_where_weights_say_no_less() -> None:
    program = program_of("gain")
    found = only(program, weights_of(program, 1.0))
    (entry,) = attention_table(program)
    assert (found.source, found.heads, found.reasons) == ("program", (1.5,) * 4, entry.node["proof"])


def test_no_head_exceeds_what_the_program_proves() -> None:
    """One head of small weights, under a clamp of the logits that the others would leave."""
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    weights["attention.wq"][:, :4] *= 1e-3
    clamped = with_attention(program, bound=2.0, proof=("a clamp",))
    found = only(clamped, weights)
    assert found.source == "weights"
    assert found.heads[1:] == (2.0,) * 3
    assert found.heads[0] < 0.1
    assert found.reasons[-1] == "no head exceeds 2, which the program proves"


@pytest.mark.parametrize("foreign", [{"asserted": True}, {"source": "data"}, {"source": "weights"}])
def test_a_bound_that_the_program_does_not_prove_is_not_used(foreign: dict[str, bool | str]) -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    assert only(with_attention(program, bound=0.01, **foreign), weights) == only(program, weights)


def test_assumed_rows_prove_nothing() -> None:
    program = spec_program("return std.attention(assume_bound(x; 1.0); heads = 1)")
    assert isinf(only(program, weights_of(program, 1.0)).bound)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_form_of_attention_has_a_range(variant: Variant) -> None:
    found = only(parse_program(variant.text), {})
    assert set(found.heads) == {inf}
    assert found.reasons


def test_slopes_are_no_part_of_a_range() -> None:
    program = spec_program(
        "h = std.rms_norm(x)\n    q = split_heads(h, 2)\n    return merge_heads(softmax(alibi(q @ q.T)) @ q)"
    )
    found = only(program, weights_of(program, 1.0))
    assert isinf(found.bound)
    assert found.reasons == ("the slopes of alibi grow with the distance of a pair",)


def test_weights_of_any_precision_are_read_as_they_are() -> None:
    program = program_of("biases")
    weights = {path: w.bfloat16().requires_grad_() for path, w in weights_of(program, 1.0).items()}
    doubled = {path: w.detach().double() for path, w in weights.items()}
    assert weight_ranges(program, weights) == weight_ranges(program, doubled)


def test_weights_of_another_model_are_refused() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    with pytest.raises(ValueError, match=r"there is no weight attention\.wq"):
        weight_ranges(program, {"rms_norm.w": weights["rms_norm.w"]})
    with pytest.raises(ValueError, match=r"weight rms_norm.w is float\[16\], not of shape \(3,\)"):
        weight_ranges(program, weights | {"rms_norm.w": torch.ones(3)})


@pytest.mark.parametrize("broken", [float("nan"), inf, 1e300])
@pytest.mark.parametrize("name", ["rms norm", "rotary", "biases", "gain"])
def test_diverged_weights_prove_nothing(name: str, broken: float) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0)
    weights["attention.wq"][0] = broken
    found = only(program, weights)
    assert found.bound == (1.5 if name == "gain" else inf)
    assert name == "gain" or "hold entries that are not finite, or too large" in found.reasons[-1]


# ---------------------------------------------------------------- centres


@pytest.mark.parametrize("name", ["biases", "biases behind a layer norm", "grouped with biases"])
def test_keys_are_centred_where_that_narrows_the_range(name: str) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0)
    plain, centred = (only(program, weights, centring=centring) for centring in (False, True))
    assert plain.centre is None
    assert centred.bound < 0.99 * plain.bound
    assert centred.reasons[-1] == (
        "subtracting from the keys of a head what they share, which softmax ignores, narrows R from "
        f"{plain.bound:.4g} to {centred.bound:.4g}"
    )
    groups = 1 if "grouped" in name else 4
    shared = weights["attention.bk"]
    if "layer" in name:
        shared = shared + weights["layer_norm.b"] @ weights["attention.wk"]
    expected = shared.reshape(groups, -1)
    torch.testing.assert_close(torch.tensor(centred.centre, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ["rms norm", "rotary", "rotary with biases", "gain"])
def test_keys_that_share_nothing_are_not_centred(name: str) -> None:
    program = program_of(name)
    assert only(program, weights_of(program, 1.0)).centre is None


def test_centred_keys_can_beat_what_the_program_proves() -> None:
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    weights["attention.bk"] *= 10
    plain, centred = (only(program, weights, centring=centring) for centring in (False, True))
    proved = (min(plain.heads) + centred.bound) / 2
    found = only(with_attention(program, bound=proved, proof=("a clamp",)), weights)
    assert found.heads == centred.heads
    assert found.reasons[-1].endswith(f"from {proved:.4g} to {centred.bound:.4g}")


def test_a_small_gain_is_said_and_not_taken() -> None:
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    weights["attention.bk"] *= 1e-3
    found = only(program, weights)
    assert found.centre is None
    assert found.reasons[-1].startswith("centred keys would narrow R from")


@pytest.mark.parametrize("off", [0.0, 0.7])
def test_the_range_is_that_of_the_centre_of_the_plan(off: float) -> None:
    """A plan takes its centre from the keys; also where the weights have moved on since."""
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    centre = tuple(tuple(entry + off for entry in row) for row in found.centre or ())
    (entry,) = attention_table(program)
    decision = Decision("chosen", fit("balanced", 4, 2.0), range=replace(found, centre=centre))
    planned = plan_attention(program, assignment={entry.full_path: (decision,)})
    (again,) = weight_ranges(planned, weights, centring=False).values()
    if off == 0:
        assert again.heads == pytest.approx(
            found.heads, rel=1e-5
        )  # a centre is written with six digits or more
    best = ascended(planned, weights, {entry.full_path: again})
    assert best.min() > 0.8
    assert best.max() <= 1.0
