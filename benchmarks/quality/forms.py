"""The models that are compared: one text of a `.tfg` file for each form of attention, alike in everything else."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

BYTES = 4  # of a number in a state or a cache

SPEC = """use std

dim b
dim n <= {longest}

model mixer(tokens: int[b, n]) -> float[b, n, {vocabulary}] {{
    weight table: float[{vocabulary}, {width}] = normal(std = {std})
    x = embedding(table, tokens)
{layers}
    return std.rms_norm(x) @ table.T
}}

objective loss(logits: float[b, n, {vocabulary}], targets: int[b, n]) = cross_entropy(logits, targets)
{budget}"""
LAYER = """    x = x + {mixer} as mixers_{i}
    x = x + std.swiglu(std.rms_norm(x); hidden = {hidden})"""


@dataclass(frozen=True)
class Attention:
    """One form: `call` is its text, with {heads} and {near}.

    d, degree: of a polynomial, 0 where there is none; window: tokens.
    """

    call: str
    d: int = 0
    degree: int = 0
    window: int = 0

    def state_bytes(self, n: int, heads: int, width: int, near: int) -> int:
        """What a layer keeps of n tokens to go on, in float32: states, and keys and values of what is near.

        near: tokens in a block of the near field, where there is one.
        """
        each = width // heads
        if self.window:
            return BYTES * heads * min(n, self.window) * 2 * each
        if not self.degree:
            return BYTES * heads * n * 2 * each
        state = comb(self.d + self.degree, self.degree) * (each + 1)
        near = near if "near" in self.call else 0
        return BYTES * heads * (state + min(n, 2 * near) * (self.d + each))


NORMED = "std.rms_norm(x)"
CONVOLVED = "std.short_conv(std.rms_norm(x))"  # sees the last tokens too


def _softmax(options: str = "", source: str = NORMED) -> str:
    return f"std.attention({source}; heads = {{heads}}, causal = true, rope = 10000.0{options})"


def _bounded(d: int, gain: float, options: str = "", source: str = CONVOLVED) -> str:
    options = f", qk_dim = {d}, gain = {gain}, near = {{near}}{options}"
    return f"std.attention({source}; heads = {{heads}}, causal = true{options})"


def _own(d: int, coefficients: str, options: str = "", source: str = CONVOLVED) -> str:
    options = f", qk_dim = {d}, coefficients = {coefficients}{options}"
    return f"std.kernel_attention({source}; heads = {{heads}}, causal = true{options})"


TAYLOR, SQUARE, FOURTH = "(1.0, 1.0, 0.5)", "(0.0, 0.0, 1.0)", "(0.0, 0.0, 0.0, 0.0, 1.0)"
ROTARY, NEAR = ", rope = 10000.0", ", near = {near}"
MIXER = f"std.mixer({NORMED}; heads = {{heads}}{NEAR}"

FORMS: dict[str, Attention] = {
    "softmax": Attention(_softmax()),
    "softmax, short convolution": Attention(_softmax(source=CONVOLVED)),
    "softmax, short convolution, forget": Attention(_softmax(", forget = true", CONVOLVED)),
    "window of 32, short convolution": Attention(_softmax(", window = 32", CONVOLVED), window=32),
    "bounded, gain 1, near, rotary": Attention(_bounded(16, 1.0, ROTARY, NORMED), 16, 2),
    "bounded, gain 1, near, rotary, exact": Attention(_bounded(16, 1.0, ROTARY, NORMED)),
    "bounded, gain 1, near, rotary, degree 1": Attention(_bounded(16, 1.0, ROTARY, NORMED), 16, 1),
    "bounded, gain 1, near, rotary, degree 3": Attention(_bounded(16, 1.0, ROTARY, NORMED), 16, 3),
    "bounded, gain 1, near, short convolution": Attention(_bounded(16, 1.0), 16, 2),
    "bounded, gain 2, d 8, near, short convolution": Attention(_bounded(8, 2.0), 8, 4),
    "1 + s + s^2/2, near": Attention(_own(16, TAYLOR, NEAR, NORMED), 16, 2),
    "1 + s + s^2/2, short convolution": Attention(_own(16, TAYLOR), 16, 2),
    "mixer": Attention(f"{MIXER})", 16, 2),
    "mixer without gates": Attention(f"{MIXER}, forget = false)", 16, 2),
    "mixer without gates or positions": Attention(f"{MIXER}, forget = false, rope = none)", 16, 2),
    "mixer without gates, rotary throughout": Attention(_own(16, TAYLOR, NEAR + ROTARY), 16, 2),
    "mixer without gates, of s^2": Attention(f"{MIXER}, forget = false, coefficients = {SQUARE})", 16, 2),
    "mixer of s^2": Attention(f"{MIXER}, coefficients = {SQUARE})", 16, 2),
    "mixer of s^4, d 8": Attention(f"{MIXER}, qk_dim = 8, coefficients = {FOURTH})", 8, 4),
}
HYBRIDS = {  # layers in turn, from the first on
    "window of 32 and mixer in turn": ("window of 32, short convolution", "mixer"),
    "mixer, every second layer softmax": ("mixer", "softmax, short convolution"),
    "mixer, every fourth layer softmax": (*["mixer"] * 3, "softmax, short convolution"),
}
NAMES = (*FORMS, *HYBRIDS)


def layers(form: str, count: int) -> tuple[Attention, ...]:
    """The attention of each layer of a model."""
    names = HYBRIDS.get(form, (form,))
    return tuple(FORMS[names[i % len(names)]] for i in range(count))


def text(
    forms: tuple[Attention, ...],
    *,
    vocabulary: int,
    width: int,
    heads: int,
    near: int,
    longest: int,
    hidden: int = 0,
) -> str:
    """The file of a model with one layer for each of `forms`."""
    layers = [
        LAYER.format(mixer=form.call.format(heads=heads, near=near), i=i, hidden=hidden or 2 * width)
        for i, form in enumerate(forms)
    ]
    planned = [
        f'    at "mixers_{i}" {f"degree = {f.degree}" if f.degree else "exact"}'
        for i, f in enumerate(forms)
        if "gain" in f.call
    ]
    budget = "\n".join(["", "budget {", *planned, "}", ""]) if planned else ""
    return SPEC.format(
        longest=longest,
        vocabulary=vocabulary,
        width=width,
        std=width**-0.5,
        layers="\n".join(layers),
        budget=budget,
    )
