"""What benchmarks/gpu.py compares: polynomial kernels, PyTorch's SDPA, flash-linear-attention's Based and retention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrad_dsl.bench.contenders import Attention, Contender, exact
from fastgrad_dsl.bench.machine import package_version

LIBRARY = "fla-core"
LARGEST_BASED_D = 16  # of its fused kernel


@dataclass(frozen=True)
class Case:
    """Widths, and of a polynomial its degree and near field; degree None: softmax, or another library's function."""

    d: int
    dv: int
    degree: int | None
    near: int | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        return Contender(1, self.d, self.dv, self.degree, self.near).name

    def sizes(self) -> dict[str, int | None]:
        """For the JSON."""
        return {"d": self.d, "dv": self.dv, "degree": self.degree, "near": self.near}


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    contender: its row in the JSON begins like that of the CPU benchmark; softmax: it stands for softmax attention, so
    that its error against that means something; quadratic: in n; counted: its flops are those of docs/mathematics.md;
    missing: why it is not there, None where it is.
    """

    name: str
    setting: str
    package: str
    case: Case
    contender: Contender
    run: Attention
    softmax: bool = True
    quadratic: bool = False
    counted: bool = True
    missing: str | None = None

    def entry(self) -> dict[str, object]:
        """What names it in the JSON."""
        names = {"name": self.name, "setting": self.setting, "package": self.package}
        return {**self.case.sizes(), **names, "version": _version(self.package)}


@cache
def _version(package: str) -> str | None:
    return package_version(package)


def contestants(heads: int, cases: Sequence[Case], dtype: torch.dtype, target: str) -> list[Contestant]:
    """The polynomials of these cases, which have the same widths, and everyone else at those widths."""
    widths = Case(cases[0].d, cases[0].dv, None)
    own = []
    for case in cases:
        contender = Contender(heads, case.d, case.dv, case.degree, case.near, target)
        own.append(
            Contestant(case.name, f"target {target}", "fastgrad-dsl", case, contender, contender.function())
        )
    return [*own, _sdpa(heads, widths, dtype), *_library(heads, widths)]


def _sdpa(heads: int, widths: Case, dtype: torch.dtype) -> Contestant:
    """On its fastest kernel: FlashAttention, or for float32 the memory-efficient one, else plain products."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    setting = "memory-efficient or math"
    if dtype != torch.float32:
        backends, setting = [SDPBackend.FLASH_ATTENTION], "flash, q and k padded to one width"

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return exact(q, k, v)

    contender = Contender(heads, widths.d, widths.dv)
    return Contestant("SDPA", setting, "torch", widths, contender, attention, quadratic=True)


def _library(heads: int, widths: Case) -> Iterator[Contestant]:
    """Based has 1 + s + s^2 / 2 for exp(s), with the same logits; retention weighs by s and a decay instead."""
    contender = Contender(heads, widths.d, widths.dv)
    make = partial(Contestant, package=LIBRARY, case=widths, contender=contender, counted=False)
    yield _found(
        make(name="Based, degree 2", setting="fused_chunk_based", run=_absent),
        "fla.ops.based",
        None if widths.d <= LARGEST_BASED_D else f"it takes d up to {LARGEST_BASED_D}",
    )
    yield _found(
        make(name="Based, degree 2, quadratic", setting="parallel_based", run=_absent, quadratic=True),
        "fla.ops.based",
    )
    yield _found(
        make(name="retention", setting="chunk_retention", run=_absent, softmax=False), "fla.ops.retention"
    )


def _found(contestant: Contestant, module: str, reason: str | None = None) -> Contestant:
    """With the library's function, or with the reason why not."""
    try:
        function = getattr(importlib.import_module(module), contestant.setting)
    except Exception as error:  # whatever a library raises where its own needs are not met
        words = (str(error).splitlines() or [""])[0]
        return replace(contestant, missing=f"{type(error).__name__}: {words}"[:200])
    return replace(contestant, run=partial(_token_major, function), missing=reason)


def _token_major(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The library's tensors are [batch, tokens, heads, width]; retention also returns a state."""
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _absent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("the library is not there")
