"""The plug-in for Transformers: its own classes with "fastgrad" against the same with SDPA."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrad_compiler.runtime.guard import BudgetViolation
from fastgrad_dsl.integrations import transformers as plugin
from fastgrad_dsl.integrations.transformers import Form, Settings, attention
from fastgrad_dsl.integrations.transformers.attention import attention_forward
from fastgrad_dsl.integrations.transformers.sight import Description, Seen
from tests.checkpoints.comparison import relative, transformers

VOCAB = 61
TIGHT = Settings(output=1e-3, gradient=1e-2, exact_below=0, target="torch")
LOOSE = Settings(output=0.01, exact_below=0, target="torch")
SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"intermediate_size": 37, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**SHARED, **WIDE, "num_key_value_heads": 2},
    "Qwen3ForCausalLM": {**SHARED, **WIDE, "num_key_value_heads": 2, "head_dim": 8},
    "GPT2LMHeadModel": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                        "attn_pdrop": 0.0},
    "BertForMaskedLM": {**SHARED, **WIDE, "attention_probs_dropout_prob": 0.0},
    "RobertaForMaskedLM": {**SHARED, **WIDE, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    plugin.register(TIGHT)
    attention._SAID.clear()
    yield
    plugin.register()


def made(kind: str, implementation: str = "sdpa", **more: Any) -> Any:
    """A random model whose logits are of a size of about 1."""
    config = getattr(transformers, kind).config_class(**{**CONFIGS[kind], **more})
    torch.manual_seed(0)
    model = getattr(transformers, kind)._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if "q_norm" in name:  # of Qwen 3: longer queries would reach logits of 3
                parameter.mul_(0.1)
    return model


def ids(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def inputs(masked: str) -> dict[str, Any]:
    tokens, mask = ids(), torch.ones(2, 24, dtype=torch.long)
    if masked == "packed":
        places = torch.cat((torch.arange(9), torch.arange(15))).expand(2, -1)
        return {"input_ids": tokens, "position_ids": places, "use_cache": False}
    if masked == "right":
        mask[0, 17:] = 0
    if masked == "left":
        mask[0, :7] = 0
    return {"input_ids": tokens} if masked == "none" else {"input_ids": tokens, "attention_mask": mask}


def shown(given: dict[str, Any]) -> Tensor:
    return given.get("attention_mask", torch.ones(2, 24)).bool()


def twin(model: Any) -> Any:
    """The same model with our attention."""
    ours = copy.deepcopy(model)
    plugin.attach(ours)
    return ours


def served(model: Any) -> tuple[int, int]:
    """Heads that polynomials served, and heads that were exact."""
    rows = plugin.status(model).values()
    return sum(row["polynomial"] for row in rows), sum(row["exact"] for row in rows)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("masked", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients_of_models(kind: str, masked: str) -> None:
    encoder = kind in ("BertForMaskedLM", "RobertaForMaskedLM")
    if encoder and masked == "packed":
        pytest.skip("encoders take no packed sequences")
    theirs, given = made(kind), inputs(masked)
    ours, mask = twin(theirs), shown(given)
    wanted, found = (model(**given).logits for model in (theirs, ours))
    torch.manual_seed(1)
    cotangent = torch.randn_like(wanted) * mask.unsqueeze(-1)
    (wanted * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    polynomial, exact = served(ours)
    assert (polynomial, exact) == (8, 0)
    assert all(not row["refused"] for row in plugin.status(ours).values())
    # Certificates are 1e-3 of the range of values and 1e-2 of the gradients' sizes, and each of two layers adds.
    assert 1e-7 < relative(found[mask], wanted[mask]) < 2e-3
    of_theirs, of_ours = gradients(theirs), gradients(ours)
    assert of_theirs.keys() == of_ours.keys()
    largest = max(float(gradient.norm()) for gradient in of_theirs.values())
    assert max(relative(of_ours[name], of_theirs[name], largest / 100) for name in of_theirs) < 2e-2


def test_a_model_of_images() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, image_size=16, patch_size=4,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ViTModel._from_config(config, attn_implementation="sdpa").eval()
    ours, images = twin(theirs), torch.randn(2, 3, 16, 16)
    assert ours.config._attn_implementation == "fastgrad"
    assert relative(ours(images).last_hidden_state, theirs(images).last_hidden_state) < 2e-3
    assert served(ours) == (4, 0)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_from_pretrained(kind: str, tmp_path: Path) -> None:
    theirs, given = made(kind), inputs("right")
    theirs.save_pretrained(tmp_path)
    ours = getattr(transformers, kind).from_pretrained(tmp_path, attn_implementation="fastgrad").eval()
    mask = shown(given)
    assert relative(ours(**given).logits[mask], theirs(**given).logits[mask]) < 2e-3
    assert served(ours) == (8, 0)


def test_a_model_is_switched_back_and_forth() -> None:
    model, given = made("LlamaForCausalLM"), inputs("left")
    exact = model(**given).logits
    model.set_attn_implementation("fastgrad")
    assert not torch.equal(model(**given).logits, exact)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**given).logits, exact)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = twin(made("LlamaForCausalLM"))
    given = inputs("packed")
    whole = model(**given).logits
    parts = [
        model(given["input_ids"][:, part], use_cache=False).logits for part in (slice(0, 9), slice(9, 24))
    ]
    assert relative(whole, torch.cat(parts, 1)) < 2e-3
    assert served(model)[1] == 0


def test_no_mask_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Description) -> Tensor:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(Description, "dense", refuse)
    for masked in ("left", "packed"):
        model = twin(made("LlamaForCausalLM"))
        model(**inputs(masked))
        assert served(model) == (8, 0)


# ---------------------------------------------------------------- one attention


class Attention(nn.Module):
    """A module of attention, by what the function reads of one."""

    is_causal = False

    def __init__(self, settings: Settings, groups: int = 1) -> None:
        super().__init__()
        attention.attached(self).settings = settings
        if groups > 1:
            self.num_key_value_groups = groups


def tensors(heads: int = 4, key_heads: int = 4, n: int = 48, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, heads, n, d), (2, key_heads, n, d), (2, key_heads, n, d))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def exact_of(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


@pytest.mark.parametrize("limit", [0.1, 0.01, 1e-4])
@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_within_the_certificate(causal: bool, limit: float) -> None:
    q, k, v = tensors()
    q = q / q.norm(dim=-1, keepdim=True) * sqrt(8) ** 0.5
    k = k / k.norm(dim=-1, keepdim=True) * sqrt(8) ** 0.5
    module = Attention(Settings(output=limit, exact_below=0, target="torch"))
    found, _ = attention_forward(module, q, k, v, None, is_causal=causal)
    assert served_by(module) == (4, 0)
    spread = (v.amax(2) - v.amin(2)).unsqueeze(1)
    share = ((found - exact_of(q, k, v, causal)).abs() / spread).max()
    assert 0 < share <= limit


def served_by(module: nn.Module) -> tuple[int, int]:
    counts = attention.attached(module).counts
    return counts.polynomial, counts.exact


def test_heads_beyond_what_can_be_served_are_exact_and_no_others() -> None:
    q, k, v = tensors(heads=4, key_heads=2)
    sizes = torch.tensor([0.3, 0.3, 9.0, 0.3], dtype=torch.float64).view(1, 4, 1, 1)
    q = sizes * q / q.norm(dim=-1, keepdim=True)
    module = Attention(LOOSE, groups=2)
    found, _ = attention_forward(module, q, k, v, None, is_causal=True)
    assert served_by(module) == (2, 2)  # the two queries of a key head go together
    wanted = exact_of(q, k, v, True)
    assert torch.allclose(found[:, :, 2:], wanted[:, :, 2:], rtol=0, atol=1e-12)
    assert not torch.allclose(found[:, :, :2], wanted[:, :, :2], rtol=0, atol=1e-9)
    assert relative(found, wanted) < 0.01


@pytest.mark.parametrize("degree", [2, None])
def test_one_logit_beyond_a_bound_is_noticed_by_norms(degree: int | None) -> None:
    q, k, v = tensors()
    q, k = (0.5 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    bound = 0.25 / sqrt(8) * 1.01
    settings = Settings(bound=bound, degree=degree, centre=False, exact_below=0, target="torch")
    module = Attention(settings)
    attention_forward(module, q, k, v, None)
    assert served_by(module) == (4, 0)
    q[1, 2, 40] *= 30.0  # the logits stay within, but for one query of one head
    k[1, 2, 3] = q[1, 2, 40] / q[1, 2, 40].norm() * 0.5
    found, _ = attention_forward(module, q, k, v, None)
    assert served_by(module) == (7, 1)
    assert torch.allclose(found[:, :, 2], exact_of(q, k, v)[:, :, 2], rtol=0, atol=1e-12)


def test_a_mean_that_keys_share_is_taken_out() -> None:
    q, k, v = tensors()
    q, k = 0.3 * q, 0.3 * k + 5.0
    module, plain = Attention(LOOSE), Attention(Settings(exact_below=0, target="torch", centre=False))
    found, _ = attention_forward(module, q, k, v, None)
    attention_forward(plain, q, k, v, None)
    assert served_by(module) == (4, 0)
    assert served_by(plain) == (0, 4)
    assert relative(found, exact_of(q, k, v)) < 0.01


def test_what_padding_holds_decides_nothing() -> None:
    q, k, v = (0.3 * x for x in tensors())
    padding = torch.ones(2, 48, dtype=torch.bool)
    padding[1, 30:] = False
    k[1, :, 30:], v[1, :, 30:] = torch.nan, torch.inf
    wanted = exact_of(q[1:, :, :30], k[1:, :, :30], v[1:, :, :30])[0]
    least = torch.finfo(torch.float64).min
    added = torch.zeros(2, 1, 48, 48, dtype=torch.float64).masked_fill(~padding[:, None, None], least)
    for mask in (padding[:, None, None], added, added[:, :, :1]):
        module = Attention(LOOSE)
        found, _ = attention_forward(module, q, k, v, mask)
        assert served_by(module) == (4, 0)
        assert 0 < relative(found[1, :30], wanted) < 0.01
        assert found[0].isfinite().all()


def test_a_near_field_is_exact() -> None:
    q, k, v = (0.6 * x for x in tensors())
    wide = Attention(Settings(bound=8.0, degree=2, near=64, exact_below=0, target="torch"))
    found, _ = attention_forward(wide, q, k, v, None, is_causal=True)
    assert served_by(wide) == (4, 0)
    assert relative(found, exact_of(q, k, v, True)) < 1e-10  # one block holds all


@pytest.mark.parametrize("policy", ["warn", "clamp", "raise"])
def test_what_a_guard_does_beyond_a_bound(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors()
    settings = Settings(bound=0.5, degree=2, beyond=policy, exact_below=0, target="torch")  # type: ignore[arg-type]
    module = Attention(settings)
    if policy == "raise":
        with pytest.raises(BudgetViolation):
            attention_forward(module, q, k, v, None)
        return
    found, _ = attention_forward(module, q, k, v, None)
    assert served_by(module) == (4, 0)
    assert relative(found, exact_of(q, k, v)) > 0.02
    (guard,) = attention.attached(module).guards.values()
    assert guard.status()["violations"] == 1
    assert "beyond R" in caplog.text


def test_short_calls_are_exact_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = (0.3 * x for x in tensors())
    module = Attention(Settings(target="torch"))
    found, _ = attention_forward(module, q, k, v, None)
    assert torch.allclose(found, exact_of(q, k, v), rtol=0, atol=1e-12)
    assert served_by(module) == (0, 0)
    assert not caplog.records


def test_low_precision_counts_in_the_certificate() -> None:
    q, k, v = ((0.3 * x).bfloat16() for x in tensors())
    strict, loose = Attention(TIGHT), Attention(Settings(output=0.1, exact_below=0, target="torch"))
    attention_forward(strict, q, k, v, None)
    assert served_by(strict) == (0, 4)  # storing a result in bfloat16 alone takes more than the limit
    found, _ = attention_forward(loose, q, k, v, None)
    assert served_by(loose) == (4, 0)
    assert found.dtype == torch.bfloat16


# ---------------------------------------------------------------- what is not served


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "fastgrad.transformers"]


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache: str | None, caplog: pytest.LogCaptureFixture) -> None:
    theirs = made("LlamaForCausalLM")
    ours, prompt = twin(theirs), ids(12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))
    assert len(said(caplog)) == 1
    assert "after those of a cache" in said(caplog)[0]
    assert served(ours) == ((0, 0) if cache else (8, 0))  # the prompt, where the cache is no longer than it


def test_generation_with_padding_on_the_left() -> None:
    theirs = made("GPT2LMHeadModel")
    ours, given = twin(theirs), {k: v[:, :12] for k, v in inputs("left").items()}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))
    assert served(ours)[0] == 8


def test_a_window_is_exact_where_it_hides_something(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.MistralConfig(**CONFIGS["LlamaForCausalLM"], sliding_window=10)
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ours = twin(theirs)
    for masked in ("none", "left", "packed"):
        given = inputs(masked)
        assert torch.equal(ours(**given).logits, theirs(**given).logits)
    assert served(ours) == (0, 0)
    assert 1 <= len(said(caplog)) == len(set(said(caplog))) <= 2
    ours(ids(10))
    assert served(ours) == (8, 0)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_dropout_is_not_served(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name = "attention_probs_dropout_prob" if kind.startswith("Bert") else "attention_dropout"
    more: dict[str, Any] = {name: 0.5}
    model = twin(made(kind, **more)).train()
    model(ids())
    model(ids())
    assert served(model) == (0, 0)
    assert len(said(caplog)) == 1
    assert "dropout" in said(caplog)[0]


def test_cross_attention_and_decoders_of_bert_are_exact() -> None:
    more = {"is_decoder": True, "add_cross_attention": True}
    config = transformers.BertConfig(**CONFIGS["BertForMaskedLM"], **more)
    torch.manual_seed(0)
    theirs = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    ours, given = twin(theirs), {"input_ids": ids(), "encoder_hidden_states": torch.randn(2, 5, 32)}
    found, wanted = ours(**given).last_hidden_state, theirs(**given).last_hidden_state
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    assert served(ours) == (0, 0)


def test_a_mask_of_ones_own_is_exact() -> None:
    theirs = made("LlamaForCausalLM")
    ours = twin(theirs)
    mask = torch.zeros(2, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), torch.finfo().min)
    mask[..., 3] -= 1.0
    assert torch.equal(ours(ids(), attention_mask=mask).logits, theirs(ids(), attention_mask=mask).logits)
    assert served(ours) == (0, 0)


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM"])
@pytest.mark.parametrize("trust", ["calibrated", "certified"])
def test_calibration_keeps_its_limit_on_new_data(kind: str, trust: str) -> None:
    theirs = made(kind)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layers.1.self_attn.q_proj.weight" in name or "layer.1.attention.self.query.weight" in name:
                parameter[:16] *= 300.0  # two heads, of one key head, that no polynomial serves
    ours = copy.deepcopy(theirs)
    batches = [{"input_ids": torch.randint(3, VOCAB, (4, 24))} for _ in range(4)]
    settings = Settings(exact_below=0, target="torch")
    found = plugin.calibrate(ours, batches[:3], output=0.02, trust=trust, settings=settings)
    assert 0 < found.error <= 0.02
    forms = [[head.form.degree for head in heads] for heads in found.heads.values()]
    assert None not in forms[0]
    assert None in forms[1]
    assert set(forms[1]) != {None}
    assert f"{found.error:.3g} measured" in str(found)
    with torch.no_grad():
        error = relative(ours(**batches[3]).logits, theirs(**batches[3]).logits)
    assert 0 < error <= 0.02
    if trust == "certified":
        assert all(settings.check == "norms" for settings in found.settings.values())


def test_calibration_that_finds_nothing_leaves_the_model_exact() -> None:
    theirs = made("LlamaForCausalLM")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "q_proj" in name:
                parameter *= 200.0
    ours = copy.deepcopy(theirs)
    batch = {"input_ids": ids()}
    found = plugin.calibrate(ours, [batch], output=1e-3, settings=TIGHT)
    assert found.served == 0
    assert found.error == 0
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_settings_that_cannot_be_meant() -> None:
    wrong: list[dict[str, Any]] = [
        {"output": 0.0}, {"output": float("nan")}, {"bound": -1.0}, {"degree": 2}, {"bound": 1.0, "degree": 0},
        {"family": "cubic"}, {"near": 0}, {"beyond": "ignore"}, {"check": "maybe"}, {"beyond": "clamp"},
        {"exact_below": -1}, {"gradient": -1.0}, {"heads": (Form(2, bound=1.0),), "beyond": "warn"},
    ]  # fmt: skip
    for each in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 (each has words of its own)
            Settings(**each)
    with pytest.raises(ValueError, match="reach"):
        Form(2, bound=2.0, reach=1.0)
    with pytest.raises(ValueError, match=r"no module 'layers\.9'"):
        plugin.attach(made("LlamaForCausalLM"), {"layers.9": LOOSE})
    with pytest.raises(ValueError, match="a batch at least"):
        plugin.calibrate(made("LlamaForCausalLM"), [])
    heads = Settings(heads=(Form(2, bound=1.0),), exact_below=0)
    with pytest.raises(ValueError, match="1 key heads, and the call has 4"):
        attention_forward(Attention(heads), *tensors(), None)


def test_seen_says_who_sees_what() -> None:
    assert Seen().everyone_alike
    assert not Seen(causal=True).everyone_alike


# ---------------------------------------------------------------- training


@pytest.mark.medium
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate (the extra dev has it)")
    model = made("LlamaForCausalLM", "fastgrad")
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids(24, 8)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    assert served(model)[0] > 0
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert relative(model.eval()(ids()).logits, again(ids()).logits) < 1e-3
