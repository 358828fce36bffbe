"""Which keys a query sees, and which queries see a key, beside all pairs one by one."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.runtime.documents import document_runs
from fastgrad_compiler.runtime.sight import CPU, Band, Ranges, Sight

SIZES = [(1, 1), (1, 5), (5, 1), (7, 7), (4, 9), (9, 4)]
WINDOWS = (0, 1, 2, 3, 7, 20)
DOCUMENTS = {
    "one": [[5] * 7],
    "of one token each": [[0, 1, 2, 3, 4, 5, 6]],
    "that come again": [[4, 4, 0, 4, 4, 4, 0], [1, 2, 2, 1, 1, 2, 1]],
    "that begin at the last token": [[0, 0, 0, 0, 0, 0, -1], [0, 9, 9, 9, 9, 9, 9]],
}


def sees(i: int, j: int, causal: bool, window: int, documents: list[int] | None = None) -> bool:
    """Whether query i sees key j: by causality, by the window, and with no boundary between them."""
    between = [] if documents is None else documents[min(i, j) : max(i, j) + 1]
    return (
        (not causal or j <= i)
        and (not window or abs(i - j) < window)
        and all(one == two for one, two in pairwise(between))
    )


def dense(n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None = None) -> Tensor:
    """bool [batch or 1, n, m]: every pair by itself."""
    batch: list[list[int] | None] = [None] if documents is None else [*documents]
    seen = [[[sees(i, j, causal, window, ids) for j in range(m)] for i in range(n)] for ids in batch]
    return torch.tensor(seen)


def all_of(ranges: Ranges) -> Tensor:
    """bool [batch or 1, tokens, others], by the ends of the ranges."""
    place = torch.arange(ranges.others)
    return (ranges.first[..., None] <= place) & (place < ranges.behind[..., None])


CASES = [
    pytest.param(n, m, causal, window, None, id=f"{n} x {m}, causal {causal}, window {window}")
    for (n, m), causal, window in product(SIZES, (False, True), WINDOWS)
] + [
    pytest.param(7, 7, causal, window, ids, id=f"documents {name}, causal {causal}, window {window}")
    for (name, ids), causal, window in product(DOCUMENTS.items(), (False, True), WINDOWS)
]
all_cases = pytest.mark.parametrize(("n", "m", "causal", "window", "documents"), CASES)


def ranges_of(n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None) -> Ranges:
    ids = None if documents is None else torch.tensor(documents)
    return Sight(causal, window).ranges(n, m, ids, CPU)


@pytest.mark.sampled(30)
@all_cases
def test_a_query_sees_an_interval_of_keys(
    n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None
) -> None:
    ranges, expected = ranges_of(n, m, causal, window, documents), dense(n, m, causal, window, documents)
    assert torch.equal(all_of(ranges), expected)
    assert ranges.others == m
    for ends in (ranges.first, ranges.behind):
        assert ends.dtype == torch.int64
        assert ends.shape == (1 if documents is None else len(documents), n)
        assert (ends >= 0).all()
        assert (ends <= m).all()
        assert (ends.diff() >= 0).all()
    assert (ranges.first <= ranges.behind).all()


@pytest.mark.sampled(30)
@all_cases
def test_a_key_is_seen_by_an_interval_of_queries(
    n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None
) -> None:
    ranges = ranges_of(n, m, causal, window, documents)
    keys = ranges.transposed()
    assert torch.equal(all_of(keys), dense(n, m, causal, window, documents).mT)
    assert keys.others == n
    assert torch.equal(all_of(keys.transposed()), all_of(ranges))


@pytest.mark.sampled(30)
@all_cases
def test_hidden_pairs_of_blocks(
    n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None
) -> None:
    ranges, expected = ranges_of(n, m, causal, window, documents), ~dense(n, m, causal, window, documents)
    for first, last in ((0, n), (0, 1), (n - 1, n), (n // 2, n)):
        for low, high in ((0, m), (0, 1), (m - 1, m), (m // 2, m), (0, 0)):
            found = ranges.hidden((first, last), (low, high))
            assert torch.equal(found, expected[:, first:last, low:high])
    batch = len(expected)
    for places in ([0], [n - 1], [n // 2, 0, n - 1, 0]):
        found = ranges.hidden_from(torch.tensor([places] * batch))
        assert torch.equal(found, expected[:, places])
    apart = torch.tensor([[[0, n - 1]], [[n - 1, n // 2]]])  # of two sequences: other tokens of each
    rows = [expected[b % batch, apart[b, 0]] for b in range(2)]
    assert torch.equal(ranges.hidden_from(apart), torch.stack(rows)[:, None])


@pytest.mark.sampled(30)
@all_cases
def test_bands_hold_what_their_queries_see(
    n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None
) -> None:
    """No key that one of them sees is left out; taken for whole are the keys that all of them see."""
    ranges, seen = ranges_of(n, m, causal, window, documents), dense(n, m, causal, window, documents)
    for size in (1, 2, 3, 7, 50):
        bands = list(ranges.bands(size))
        assert [band.queries for band in bands] == [(at, min(at + size, n)) for at in range(0, n, size)]
        for band in bands:
            check_band(band, seen[:, slice(*band.queries)].flatten(0, 1))


def check_band(band: Band, rows: Tensor) -> None:
    """rows: bool [queries of all sequences, keys]."""
    places = rows.any(0).nonzero().flatten().tolist()
    if places:
        assert band.keys == (places[0], places[-1] + 1)
    else:
        assert band.keys[0] >= band.keys[1]
    assert rows[:, slice(*band.whole)].all()
    assert int(rows.all(0).sum()) == band.whole[1] - band.whole[0]


@pytest.mark.sampled(30)
@all_cases
def test_what_ranges_hold(
    n: int, m: int, causal: bool, window: int, documents: list[list[int]] | None
) -> None:
    """Flags of the first key, the last, one in the middle, none, and all of them, in two sequences of five heads."""
    flags = torch.zeros(2, 5, m, dtype=torch.bool)
    flags[:, 0, 0] = flags[:, 1, -1] = flags[:, 2, m // 2] = flags[:, 4] = True
    flags[1] = flags[1].flip(0)
    seen = dense(n, m, causal, window, documents).expand(2, -1, -1)
    expected = (seen[:, None] & flags[:, :, None]).any(-1)
    assert torch.equal(ranges_of(n, m, causal, window, documents).hold(flags), expected)


def test_ranges_of_some_sequences() -> None:
    documents = DOCUMENTS["that come again"]
    every = ranges_of(7, 7, True, 3, documents)
    for at in range(2):
        one = every.of(slice(at, at + 1))
        assert torch.equal(all_of(one), dense(7, 7, True, 3, documents[at : at + 1]))
    alike = ranges_of(7, 7, True, 3, None)
    assert alike.of(slice(1, 2)) is alike


def test_runs_are_taken_for_the_ids_that_they_count() -> None:
    ids = torch.tensor(DOCUMENTS["that come again"], dtype=torch.uint8)
    one, two = (Sight(True, 4).ranges(7, 7, each, CPU) for each in (ids, document_runs(ids)))
    assert torch.equal(one.first, two.first)
    assert torch.equal(one.behind, two.behind)
