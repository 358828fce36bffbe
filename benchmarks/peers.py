"""Polynomial attention beside what others offer for a CPU: error against float64 softmax, and time.

All take the same inputs: unit rows of q and k and a scale of 1, so that logits lie within [-1, 1], 8 heads, d = 16,
dv = 64, causal, float32. A library that scales by 1 / sqrt(d) gets its queries times sqrt(d). Each library runs at
several settings; of those that compute the same function the fastest stands for it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import relative_errors
from benchmarks.linear_attention import elu_attention
from benchmarks.settings import Settings, heading, say
from fastgrad_compiler.approximation.polynomial import Family
from fastgrad_dsl.bench.contenders import Attention, Contender, exact, make_inputs, results
from fastgrad_dsl.bench.machine import package_version
from fastgrad_dsl.bench.timing import Timing, time_together

HEADS, D, DV = 8, 16, 64
N, QUICK_N = 16_384, 128
CHUNKS = (64, 128, 256, 512)
FEATURES = (44, 128)  # of Performer at d = 16: d log d, which is its default, and more
POLYNOMIALS: tuple[tuple[int, int | None, Family], ...] = (
    (2, None, "balanced"), (2, None, "taylor"), (3, None, "balanced"), (4, None, "balanced"), (2, 64, "balanced"),
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """One implementation at one setting. `name` says the function that it computes; `build` may raise what an import
    or a first use raises, and is told the length."""

    name: str
    setting: str
    package: str
    build: Callable[[int], Attention]


def measure(settings: Settings, n: int | None = None) -> dict[str, object]:
    """The section `peers` of the JSON."""
    n = n or (QUICK_N if settings.quick else N)
    inputs = make_inputs(n, HEADS, D, DV)
    say(f"peers: float64 softmax at n = {n:,}")
    expected = results(exact, make_inputs(n, HEADS, D, DV, dtype=torch.float64))
    built: dict[str, tuple[Peer, Attention, tuple[float, float]]] = {}
    missing: list[dict[str, object]] = []
    for peer in peers(settings.target):
        say(f"peers: {peer.name} ({peer.setting})")
        try:
            attention = peer.build(n)
            errors = _errors(results(attention, inputs), expected)
        except Exception as error:
            missing.append({**_entry(peer), "reason": _reason(error)})
            continue
        built[f"{peer.name} / {peer.setting}"] = (peer, attention, errors)
    attentions = {key: attention for key, (_, attention, _) in built.items()}
    times = time_together(attentions, inputs, settings.repeats, settings.less)
    measured = [_measured(peer, errors, times[key]) for key, (peer, _, errors) in built.items()]
    return {
        **heading(settings),
        "shape": {"batch": 1, "heads": HEADS, "d": D, "dv": DV, "n": n, "dtype": "float32", "causal": True},
        "largest_logit": 1.0,
        "measured": measured,
        "not_available": missing,
    }


def peers(target: str) -> list[Peer]:
    """Everything that is compared."""
    own = [Contender(HEADS, D, DV, degree, near, target, family) for degree, near, family in POLYNOMIALS]
    found = [Peer(c.name, f"target {target}", "fastgrad-dsl", lambda n, c=c: c.ready()) for c in own]  # type: ignore[misc]
    found.append(Peer("SDPA", "q and k padded to one width", "torch", lambda n: exact))
    for features in FEATURES:
        name = f"Performer, {features} features"
        # its chunks of plain PyTorch keep a state for each token
        for chunk in (None, 256, 64) if features == FEATURES[0] else (None,):
            setting = "compiled causal product" if chunk is None else f"{chunk} tokens a chunk"
            found.append(Peer(name, setting, "performer-pytorch", partial(_performer, features, chunk)))
    name, package = "Taylor series, degree 2", "taylor-series-linear-attention"
    for setting, symmetric in (("symmetric features", True), ("all products as features", False)):
        found.append(Peer(name, setting, package, partial(_taylor, symmetric)))
    found += [Peer("Based, degree 2", f"chunks of {c}", "fla-core", partial(_based, c)) for c in CHUNKS]
    name = "linear attention, elu features"
    found += [Peer(name, f"chunks of {c}", "plain PyTorch", partial(_elu, c)) for c in CHUNKS]
    found.append(Peer(name, "compiled causal product", "pytorch-fast-transformers", _elu_library))
    return found


def _performer(features: int, chunk: int | None, n: int) -> Attention:
    """chunk: tokens of one step of its plain PyTorch code; None: the compiled product of pytorch-fast-transformers."""
    library = _import("performer_pytorch.performer_pytorch")
    if chunk is None:
        _import("fast_transformers.causal_product")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that there is no CUDA code
        module = library.FastAttention(D, nb_features=features, causal=True)
    product = library.causal_linear_attention if chunk is None else library.causal_linear_attention_noncuda
    steps = {} if chunk is None else {"chunk_size": max(1, n // chunk)}  # which is how many chunks it makes
    module.causal_linear_fn = partial(product, **steps)
    root = math.sqrt(math.sqrt(D))  # it divides q and k each by this

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(root * q, root * k, v)
        return out

    return attention


class _Given(nn.Module):
    """In place of a projection: what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: object = None

    def forward(self, x: Tensor) -> object:
        return self.value


def _taylor(symmetric: bool, n: int) -> Attention:
    """The layer of the library with its projections replaced by the inputs."""
    _import("fast_transformers.causal_product")
    library = _import("taylor_series_linear_attention")
    layer: Any = library.TaylorSeriesLinearAttn(
        D, dim_head=D, heads=HEADS, causal=True, combine_heads=False, remove_even_power_dups=symmetric
    )
    layer.to_q, layer.to_kv, layer.merge_heads = _Given(), _Given(), nn.Identity()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.to_q.value, layer.to_kv.value = math.sqrt(D) * q, (k, v)
        out: Tensor = layer(q[:, 0])
        return out

    return attention


def _based(chunk: int, n: int) -> Attention:
    library = _import("fla.ops.based.naive")
    root, size = math.sqrt(D), min(chunk, n)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = library.naive_chunk_based(root * q, k, v, chunk_size=size)
        return out

    return attention


def _elu(chunk: int, n: int) -> Attention:
    return partial(elu_attention, chunk=min(chunk, n))


def _elu_library(n: int) -> Attention:
    product = _import("fast_transformers.causal_product").causal_dot_product

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        total = (q * k.cumsum(2)).sum(-1, keepdim=True)
        out: Tensor = product(q, k, v) / total
        return out

    return attention


def _import(name: str) -> ModuleType:
    with contextlib.suppress(ImportError):
        importlib.import_module("setuptools")  # brings distutils, which Performer imports, to Python 3.12
    return importlib.import_module(name)


def _errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    errors = relative_errors(found, expected)
    if not all(map(math.isfinite, errors)):
        raise ArithmeticError("its results are not finite")
    return errors


def _entry(peer: Peer) -> dict[str, object]:
    return {
        "name": peer.name,
        "setting": peer.setting,
        "package": peer.package,
        "version": package_version(peer.package),
    }


def _measured(peer: Peer, errors: tuple[float, float], timing: Timing) -> dict[str, object]:
    return {**_entry(peer), **timing.entry(), "output_error": errors[0], "gradient_error": errors[1]}


def _reason(error: Exception) -> str:
    """One line."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:200]
