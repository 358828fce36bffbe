"""The attention function that Transformers calls: polynomials for heads whose logits are within their range.

Each call is judged by itself, and each key head with its query heads apart: the norms of its queries and keys bound its
logits, |s| <= |scale| max ||q|| max ||k||, in O(n d). A head that this, or where settings say so a sample, does not put
within the range of its polynomial is exact, and so is whatever is not served at all, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.approximation.rounding import UNITS, Run
from fastgrad_compiler.codegen.kernel import load_kernel
from fastgrad_compiler.runtime.attention_op import compute_dtype
from fastgrad_compiler.runtime.guard import Guard
from fastgrad_compiler.runtime.logit_range import (
    Pairs,
    choose_sample,
    norm_bound,
    rows_of,
    sampled_range,
)
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.integrations.transformers.choice import Case, Limits, least, polynomial_of, step_above
from fastgrad_dsl.integrations.transformers.settings import Form, Settings
from fastgrad_dsl.integrations.transformers.sight import Description, Seen, seen_by

LOGGER = logging.getLogger("fastgrad.transformers")
_ATTACHED = "_fastgrad"
_DEFAULT = [Settings()]
_SAID: set[str] = set()


@dataclass
class Counts:
    """What was done in a module: calls that were served at all, heads of them by what served them."""

    calls: int = 0
    polynomial: int = 0
    exact: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@dataclass
class Attached:
    """What a module of attention has of ours: settings (None: the default ones), counts, and guards by range."""

    settings: Settings | None = None
    counts: Counts = field(default_factory=Counts)
    guards: dict[tuple[float, str], Guard] = field(default_factory=dict)
    path: str = ""


def attached(module: nn.Module) -> Attached:
    """What a module has of ours, made if it has nothing."""
    found: Attached = module.__dict__.setdefault(_ATTACHED, Attached())
    return found


def find_attached(module: nn.Module) -> Attached | None:
    """What a module has of ours; None if it has nothing."""
    found: Attached | None = module.__dict__.get(_ATTACHED)
    return found


def set_default(settings: Settings) -> None:
    """The settings of modules that have none of their own."""
    _DEFAULT[0] = settings


@dataclass(frozen=True)
class Call:
    """One attention that can be served: q [b, H, n, d], k [b, h, n, d], v [b, h, n, dv], scale of the logits."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    seen: Seen

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[1] // self.k.shape[1]

    def heads(self, keys: Sequence[int]) -> list[int]:
        """The query heads of some key heads."""
        return [head for key in keys for head in range(key * self.groups, (key + 1) * self.groups)]


class Recorder(Protocol):
    """Is shown every call that can be served, which is exact then."""

    def record(self, call: Call) -> None: ...


_RECORDER: ContextVar[Recorder | None] = ContextVar("fastgrad_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Calls are shown to a recorder and are exact."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Description | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers' `AttentionInterface` wants it: [b, heads, n, d] to [b, n, heads, dv], and no weights.

    What cannot be served is given to Transformers' own SDPA function, unchanged.
    """
    exactly = _Exactly(module, attention_mask, dropout, scaling, is_causal, others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen, reason = seen_by(attention_mask, query.shape[2], key.shape[2], causal)
    reason = _unserved(dropout, others, query, value) or reason
    found = attached(module)
    if reason:
        _say(reason)
        found.counts.refused[reason] = found.counts.refused.get(reason, 0) + 1
        return exactly(query, key, value).transpose(1, 2).contiguous(), None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = Call(module, query, key, value, scale, seen)
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.record(call)
        return exactly(query, key, value).transpose(1, 2).contiguous(), None
    out = _served(call, found.settings or _DEFAULT[0], found, exactly)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Exactly:
    """Transformers' SDPA attention with the arguments of a call, for some of its heads."""

    module: nn.Module
    mask: Tensor | Description | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    others: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, heads, n, dv]."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        described = isinstance(self.mask, Description)
        mask = self.mask.dense() if isinstance(self.mask, Description) else self.mask
        is_causal = None if described and mask is None else self.is_causal
        out, _ = sdpa_attention_forward(
            self.module, q, k, v, mask, self.dropout, self.scaling, is_causal, **self.others
        )
        found: Tensor = out.transpose(1, 2)
        return found


def _unserved(dropout: float, others: dict[str, Any], query: Tensor, value: Tensor) -> str:
    """Why a call is not served, by what is asked of it besides masks."""
    if dropout:
        return "dropout of attention weights in training: set the config's attention dropout to 0"
    if others.get("output_attentions"):
        return "attention weights are asked for"
    if others.get("head_mask") is not None:
        return "a mask of heads"
    if others.get("softcap") is not None:
        return "capped logits"
    if others.get("s_aux") is not None:
        return "attention sinks"
    window = others.get("sliding_window")
    if window is not None and window < query.shape[2]:
        return f"a window of {window} tokens"
    if str(query.dtype).removeprefix("torch.") not in UNITS or value.dtype != query.dtype:
        return f"dtypes {query.dtype} and {value.dtype}"
    return ""


def _say(reason: str) -> None:
    """Say once that a kind of call is exact."""
    if reason not in _SAID:
        _SAID.add(reason)
        LOGGER.warning("fastgrad does not serve %s: such calls run exactly, on PyTorch's SDPA", reason)


# ---------------------------------------------------------------- what serves each head


def _served(call: Call, settings: Settings, found: Attached, exactly: _Exactly) -> Tensor:
    n, key_heads = call.q.shape[2], call.k.shape[1]
    if settings.heads is not None and len(settings.heads) != key_heads:
        raise ValueError(
            f"the settings are for {len(settings.heads)} key heads, and the call has {key_heads}"
        )
    keys = _centred(call, settings)
    case = case_of(call, settings, keys is not call.k)
    if n < (settings.exact_below if settings.exact_below is not None else case.break_even(1)):
        return exactly(call.q, call.k, call.v)
    found.counts.calls += 1
    exact = settings.beyond == "exact"
    chosen = _judged(call, keys, settings, case) if exact else [_fixed(settings, case)] * key_heads
    groups: dict[Polynomial | None, list[int]] = {}
    for head, polynomial in enumerate(chosen):
        groups.setdefault(polynomial, []).append(head)
    found.counts.exact += call.groups * len(groups.get(None, ()))
    found.counts.polynomial += call.groups * (key_heads - len(groups.get(None, ())))
    parts, order = [], []
    for polynomial, heads in groups.items():
        of_queries = call.heads(heads)
        q, k, v = (_taken(x, own) for x, own in ((call.q, of_queries), (keys, heads), (call.v, heads)))
        if polynomial is None:
            parts.append(exactly(q, _taken(call.k, heads), v))
        else:
            key = _guard(settings, polynomial, found)
            parts.append(
                load_kernel(case.kernel(polynomial), BACKENDS[settings.target])(
                    q, k, v, mask=call.seen.padding, documents=call.seen.documents, guard=key
                )
            )
        order += of_queries
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, _inverse(order)]


def _taken(x: Tensor, heads: Sequence[int]) -> Tensor:
    return x if x.shape[1] == len(heads) else x[:, list(heads)]


def _inverse(order: Sequence[int]) -> list[int]:
    places = [0] * len(order)
    for place, head in enumerate(order):
        places[head] = place
    return places


def case_of(call: Call, settings: Settings, centred: bool) -> Case:
    """What the choice of a polynomial for a call depends on."""
    n, d = call.q.shape[2:]
    dtype = str(call.q.dtype).removeprefix("torch.")
    return Case(
        n=1 << (n - 1).bit_length(),
        d=d,
        dv=call.v.shape[-1],
        groups=call.groups,
        scale=call.scale,
        causal=call.seen.causal,
        padding=call.seen.padding is not None,
        documents=call.seen.documents is not None,
        near=settings.near,
        target=settings.target,
        run=Run("cpu" if call.q.device.type == "cpu" else "gpu", dtype),
        centred=centred,
    )


def _centred(call: Call, settings: Settings) -> Tensor:
    """The keys less what softmax does not see: the centres of the settings, or the mean of what every query sees."""
    k = call.k
    own = mean_key(k, call.seen.padding) if settings.centre and call.seen.everyone_alike else None
    given = [form.centre for form in settings.heads or ()]
    if all(centre is None for centre in given):
        return k if own is None else k - own
    rows = [centre or (0.0,) * k.shape[-1] for centre in given]
    centre = torch.tensor(rows, dtype=k.dtype, device=k.device).unsqueeze(1)
    known = torch.tensor([row is not None for row in given], device=k.device).view(-1, 1, 1)
    return k - (centre if own is None else torch.where(known, centre, own))


def mean_key(k: Tensor, padding: Tensor | None) -> Tensor:
    """[b, h, 1, d]: the mean of the keys that are no padding, in the dtype of the keys."""
    if padding is None:
        return k.mean(2, keepdim=True)
    shown = padding[:, None, :, None]
    count = shown.sum(2, keepdim=True).clamp(min=1)
    return k.masked_fill(~shown, 0.0).sum(2, keepdim=True) / count


def _fixed(settings: Settings, case: Case) -> Polynomial | None:
    """The polynomial of settings that name a range."""
    assert settings.bound is not None
    if settings.degree is None:
        return least(settings.family, settings.bound, Limits(settings.output, settings.gradient), case)
    return polynomial_of(settings.family, settings.degree, settings.bound, case.d)


def _judged(call: Call, keys: Tensor, settings: Settings, case: Case) -> list[Polynomial | None]:
    """For each key head the polynomial that serves this call; None is exact."""
    ranges = logit_ranges(call, keys, settings)
    found = [_of_head(settings, settings.form(head), reach, case) for head, reach in enumerate(ranges)]
    if settings.exact_below is not None:
        return found
    n = call.q.shape[2]
    return [None if each is None or n < case.break_even(each.degree) else each for each in found]


def logit_ranges(call: Call, keys: Tensor, settings: Settings) -> list[float]:
    """What is known of the sizes of the logits of each key head: no less than any, or with `sample` than those seen."""
    with torch.no_grad():
        rows = rows_of(call.q.detach(), keys.detach(), call.seen.padding, call.seen.documents)
        pairs = Pairs(call.scale, call.seen.causal, settings.near or 0)
        known = norm_bound(rows, pairs)
        if settings.check == "sample":
            sample = choose_sample(rows, pairs, rows.q_norms.sum().to(torch.int64))
            known = torch.minimum(known, sampled_range(rows, pairs, sample))
        slack = 1 + 8 * call.q.shape[-1] * torch.finfo(compute_dtype(call.q)).eps  # of norms that are rounded
        of_keys: list[float] = (known.unflatten(0, (call.k.shape[1], -1)).amax(1) * slack).tolist()
    return of_keys


def _of_head(settings: Settings, form: Form | None, reach: float, case: Case) -> Polynomial | None:
    """The polynomial of a head whose logits are at most `reach` in size."""
    if not reach < inf:
        return None
    if form is None:
        bound = step_above(reach) if settings.bound is None else settings.bound
        if bound is None or reach > bound:
            return None
        found = least(settings.family, bound, Limits(settings.output, settings.gradient), case)
    elif form.degree is None or reach > form.limit:
        return None
    else:
        found = polynomial_of(form.family, form.degree, form.bound, case.d)
    return found


def _guard(settings: Settings, polynomial: Polynomial, found: Attached) -> str:
    """The key of what watches a range; empty where heads beyond it are exact."""
    if settings.beyond == "exact":
        return ""
    key = (polynomial.bound, settings.beyond)
    if key not in found.guards:
        path = found.path or "attention"
        found.guards[key] = Guard(
            bound=polynomial.bound, source="asserted", policy=settings.beyond, path=path
        )
    return found.guards[key].key
