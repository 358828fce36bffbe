"""The cost model against a count of the products of a plain implementation, and its break-even length."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from fastgrad_compiler.planning import cost, roofline
from fastgrad_compiler.planning.cost import EQUAL, EXACT, Flops, Pace, Shape, Time, Way, state_bytes
from fastgrad_compiler.planning.target_cost import dense_break_even
from fastgrad_compiler.runtime import attention_op
from fastgrad_compiler.runtime.monomials import rank


def flops(*, n: int, degree: int | None, m: int | None = None, **sizes: Any) -> Flops:
    way = {key: sizes.pop(key) for key in ("near", "chunk") if key in sizes}
    return cost.flops(Shape(n=n, m=n if m is None else m, **sizes), Way(degree, **way))


def break_even(*, d: int, dv: int, degree: int, pace: Pace = EQUAL, **sizes: Any) -> int:
    """From one token on, whatever the calls take."""
    way = {key: sizes.pop(key) for key in ("near", "chunk") if key in sizes}
    return cost.break_even(pace, Shape(n=1, m=1, d=d, dv=dv, **sizes), Way(degree, **way), least=1)


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def counted_causal(n: int, d: int, dv: int, degree: int, chunk: int) -> Flops:
    """Walk the chunks of docs/mathematics.md, sections 3 and 4, and add up their matrix products."""
    r, width = rank(d, degree), dv + 1
    forward = backward = 0
    for _ in range(n // chunk):
        forward += matmul(chunk, d, chunk) + matmul(chunk, chunk, width)  # p(Q K^T), times V~
        forward += matmul(r, chunk, width) + matmul(chunk, r, width)  # Z += phi(K) V~; phi(Q)^T W Z
        backward += matmul(chunk, d, chunk)  # Q K^T again
        backward += matmul(chunk, width, chunk) * 2  # dA = U~ V~^T; dV = A~^T U~
        backward += matmul(chunk, chunk, d) * 2  # dQ = dS K; dK = dS^T Q
        backward += matmul(r, chunk, width) + matmul(chunk, width, r)  # Z again; the cotangent of phi(q)
        backward += matmul(r, chunk, width)  # Y
        backward += matmul(chunk, r, width) + matmul(chunk, width, r)  # dV; the cotangent of phi(k)
    return Flops(forward, backward)


@pytest.mark.parametrize(("d", "dv", "degree", "chunk"), [(16, 64, 2, 64), (4, 4, 3, 16), (1, 7, 0, 8)])
def test_causal_flops_are_those_of_the_products(d: int, dv: int, degree: int, chunk: int) -> None:
    n = 8 * chunk
    assert flops(n=n, d=d, dv=dv, degree=degree, chunk=chunk) == counted_causal(n, d, dv, degree, chunk)


def test_formulas_of_the_documentation_per_token() -> None:
    d, dv, n, c, r = 16, 64, 4096, 64, 153
    found = flops(n=n, d=d, dv=dv, degree=2, chunk=c)
    assert found.forward == n * (4 * r * (dv + 1) + 2 * c * (d + dv + 1))
    assert found.backward == n * (10 * r * (dv + 1) + 2 * c * (3 * d + 2 * (dv + 1)))
    exact = flops(n=n, d=d, dv=dv, degree=None)
    assert (exact.forward, exact.backward) == (n * n * (d + dv), n * n * (3 * d + 2 * dv))
    assert exact.total == exact.forward + exact.backward


def test_without_a_mask() -> None:
    d, dv, n, m, r = 8, 16, 100, 700, 45
    found = flops(n=n, m=m, d=d, dv=dv, degree=2, causal=False)
    assert found.forward == matmul(r, m, dv + 1) + matmul(n, r, dv + 1)
    assert found.backward == 3 * matmul(r, m, dv + 1) + 2 * matmul(n, r, dv + 1)
    exact = flops(n=n, m=m, d=d, dv=dv, degree=None, causal=False)
    assert exact.forward == matmul(n, d, m) + matmul(n, m, dv)
    assert exact.backward == 3 * matmul(n, d, m) + 2 * matmul(n, m, dv)


def test_near_field() -> None:
    d, dv, n, w = 16, 64, 1024, 32
    causal = flops(n=n, d=d, dv=dv, degree=2, near=w)
    assert causal == flops(n=n, d=d, dv=dv, degree=2, chunk=2 * w)
    both = flops(n=n, d=d, dv=dv, degree=2, near=w, causal=False)
    plain = flops(n=n, d=d, dv=dv, degree=2, causal=False)
    assert both.forward == 2 * plain.forward + n * 2 * 3 * w * (d + dv + 1)
    assert both.backward == 2 * plain.backward + n * 2 * 3 * w * (3 * d + 2 * (dv + 1))


def test_a_chunk_longer_than_the_sequence_holds_the_sequence() -> None:
    assert flops(n=10, d=4, dv=4, degree=2, chunk=64) == flops(n=10, d=4, dv=4, degree=2, chunk=10)


def test_break_even_of_the_documentation() -> None:
    """About 550, 3,400 and 17,000 by the state alone; a chunk of one token adds two."""
    lengths = [break_even(d=16, dv=64, degree=degree, chunk=1) for degree in (2, 3, 4)]
    assert lengths == pytest.approx([550, 3400, 17000], rel=0.02)
    assert [break_even(d=16, dv=64, degree=degree) for degree in (2, 3, 4)] == [674, 3574, 17352]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("near", [None, 1, 16])
@pytest.mark.parametrize("chunk", [1, 64])
def test_break_even_is_the_least_length(causal: bool, near: int | None, chunk: int) -> None:
    for d, dv, degree in product((1, 4, 16), (1, 16), (0, 1, 2)):
        found = break_even(d=d, dv=dv, degree=degree, chunk=chunk, near=near, causal=causal)

        def pays(n: int, d: int = d, dv: int = dv, degree: int = degree) -> bool:
            polynomial = flops(n=n, d=d, dv=dv, degree=degree, chunk=chunk, near=near, causal=causal)
            return polynomial.total <= flops(n=n, d=d, dv=dv, degree=None, causal=causal).total

        assert found >= 1
        assert not any(pays(n) for n in range(1, found))
        assert all(pays(found + more) for more in range(20))


@pytest.mark.parametrize(("causal", "keys"), [(True, 100), (False, 199)])
def test_exact_attention_in_a_window(causal: bool, keys: int) -> None:
    """A query meets the keys of the band; a window that is wider than the sequence hides nothing."""
    found = flops(n=5000, d=16, dv=64, degree=None, causal=causal, window=100)
    assert found.forward == 5000 * keys * 2 * (16 + 64)
    assert found.backward == 5000 * keys * 2 * (3 * 16 + 2 * 64)
    wide = flops(n=5000, d=16, dv=64, degree=None, causal=causal, window=5000)
    assert wide == flops(n=5000, d=16, dv=64, degree=None, causal=causal)


def test_documents_cost_a_chunk_of_pairs_and_two_states() -> None:
    """Causal attention does the same work with and without documents."""
    assert flops(n=999, d=8, dv=4, degree=2, documents=True) == flops(n=999, d=8, dv=4, degree=2)
    found = flops(n=999, d=8, dv=4, degree=2, causal=False, documents=True)
    near = flops(n=999, d=8, dv=4, degree=2, causal=False, near=64)
    plain, pairs = flops(n=999, d=8, dv=4, degree=2, causal=False), 2 * 999 * 64
    assert found.forward == 2 * plain.forward + pairs * (8 + 4 + 1)
    assert found.forward < near.forward
    assert break_even(d=8, dv=4, degree=2, causal=False, documents=True) > break_even(
        d=8, dv=4, degree=2, causal=False
    )


def test_bytes_of_a_state() -> None:
    assert state_bytes(d=16, dv=64, degree=2) == 153 * 65 * 4
    assert state_bytes(d=16, dv=64, degree=2, itemsize=8) == 153 * 65 * 8


def test_a_pace_makes_seconds_of_flops() -> None:
    shape, pace, way = Shape(n=999, m=999, d=16, dv=64), Pace(1.8, 500), Way(2, 64)
    work, exact = cost.flops(shape, way), cost.flops(shape)
    assert pace.time(shape, way) == Time(work.forward / 1.8, work.backward / 1.8)
    assert pace.seconds(shape, way) == pytest.approx(work.total / 1.8)
    assert pace.seconds(shape, Way(2, 64, "float64")) == 2 * pace.seconds(shape, way)
    assert pace.seconds(shape, EXACT) == pytest.approx(exact.total * (1 + 500 / 999))


def test_a_near_field_of_the_model_is_the_polynomials_too() -> None:
    own, added = Shape(n=999, m=999, d=16, dv=64, near=32), Shape(n=999, m=999, d=16, dv=64)
    assert cost.flops(own, Way(2)) == cost.flops(added, Way(2, 32))
    assert cost.flops(own, EXACT) == cost.flops(added, EXACT)


def test_break_even_is_sought_from_the_longest_length_down() -> None:
    """Exact attention that is slow at short lengths may take longer there, and less in between."""

    class Bumpy:
        step = 1

        def seconds(self, shape: Shape, way: Way) -> float:
            return 1.0 if way == EXACT else 2.0 if 300 <= shape.n < 5000 else 0.5

    shape = Shape(n=1, m=1, d=4, dv=4)
    assert cost.break_even(Bumpy(), shape, Way(2)) == 5000
    assert cost.break_even(Pace(100.0, 0), shape, Way(1)) == cost.LEAST_LENGTH


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n": 8, "m": 9}, "as many keys as queries, not 9 for 8"),
        ({"n": 0}, "must be at least 1"),
        ({"n": 8, "near": 0}, "must be at least 1"),
        ({"n": 8, "chunk": 0}, "must be at least 1"),
        ({"n": 8, "window": 0}, "must be at least 1"),
        ({"n": 8, "window": 4}, "no polynomial serves a window"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flops(d=4, dv=4, degree=2, **sizes)


def test_all_pairs_of_a_polynomial_cost_what_exact_attention_does_and_a_denominator() -> None:
    for causal in (False, True):
        shape = Shape(n=100, m=100, d=16, dv=64, causal=causal)
        wider = replace(shape, dv=65)  # values with their ones
        dense, exact = cost.flops(shape, Way(4, dense=True)), cost.flops(wider)
        assert (dense.forward, dense.backward) == (exact.forward, exact.backward)
        assert cost.flops(shape, Way(2, 16, dense=True)) == dense


@pytest.mark.parametrize(
    ("target", "speed", "dense", "keys"), [("torch", 1.0, 0.8, 0), ("cpp", 1.8, 0.9, 500)]
)
def test_states_pay_from_where_all_pairs_take_longer(
    target: str, speed: float, dense: float, keys: int
) -> None:
    shape, way = Shape(n=1, m=1, d=16, dv=64), Way(4)
    even = dense_break_even(target, shape, way)
    states, chunk = 14 * 4845 * 65, 64 * 2 * (4 * 16 + 3 * 65)
    pairs = (4 * 16 + 3 * 65) * (even + keys) * speed / dense
    assert (states + chunk) == pytest.approx(pairs, rel=1e-3)
    both = [cost.PACE[target].seconds(replace(shape, n=n, m=n), way) for n in (even - 1, even)]
    all_pairs = [
        cost.PACE[target].seconds(replace(shape, n=n, m=n), replace(way, dense=True))
        for n in (even - 1, even)
    ]
    assert both[0] > all_pairs[0]
    assert both[1] <= all_pairs[1]


def test_states_of_a_small_rank_always_pay_in_native_kernels() -> None:
    assert dense_break_even("cpp", Shape(n=1, m=1, d=4, dv=16), Way(2)) == 0


def test_on_a_gpu_launches_make_all_pairs_of_short_sequences_slow() -> None:
    assert dense_break_even("triton", Shape(n=1, m=1, d=16, dv=64), Way(4)) == 0
    assert dense_break_even("triton", Shape(n=1, m=1, d=64, dv=128), Way(3)) > 0
    assert roofline.WORK_BYTES == attention_op.WORK_BYTES
