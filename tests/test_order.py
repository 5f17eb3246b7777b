"""Order: a permutation for any N, computed at any positions, different in every epoch and unbiased."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.data.order import Balanced, Order, Sequential


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 1023, 1024, 1025, 5000])
def test_bijective(num_samples):
    ids = Order(num_samples, seed=3).ids(1, np.arange(num_samples))
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@settings(deadline=None)  # of 200 ms, which a busy machine exceeds
@given(st.integers(1, 2**31), st.integers(0, 1000), st.integers(0, 2**63), st.data())
def test_entered_anywhere(num_samples, epoch, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=8, unique=True)))
    order = Order(num_samples, seed)
    together = order.ids(epoch, positions)
    assert together.min() >= 0 and together.max() < num_samples and len(set(together.tolist())) == len(positions)
    assert [order.ids(epoch, np.array([p]))[0] for p in positions] == together.tolist()


def test_epochs_and_seeds_differ():
    def overlap(a, b):
        return int((a == b).sum())

    positions = np.arange(2000)
    ids = Order(2000, seed=0).ids(0, positions)
    assert overlap(ids, positions) < 12  # a random permutation keeps one place on average
    assert overlap(ids, Order(2000, seed=0).ids(1, positions)) < 12
    assert overlap(ids, Order(2000, seed=1).ids(0, positions)) < 12


@pytest.mark.parametrize("num_samples", [3, 10, pytest.param(37, marks=pytest.mark.nightly)])
def test_every_sample_stands_everywhere_equally_often(num_samples):
    epochs = 4000
    order, positions = Order(num_samples, seed=5), np.arange(num_samples)
    counts = np.zeros((num_samples, num_samples))
    pairs = np.zeros((num_samples, num_samples))
    for epoch in range(epochs):
        ids = order.ids(epoch, positions)
        counts[positions, ids] += 1
        pairs[ids[:-1], ids[1:]] += 1
    expected = epochs / num_samples
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_samples - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    neighbors = pairs[~np.eye(num_samples, dtype=bool)] / expected
    assert np.abs(neighbors - 1).max() < 6 / np.sqrt(expected)


def test_neighbors_in_the_source_are_torn_apart():
    ids = Order(100_000, seed=0).ids(0, np.arange(1000))
    assert abs(ids.mean() / 100_000 - 0.5) < 0.05
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.12


def test_positions_past_the_end_wrap():
    order = Order(10, seed=0)
    assert np.array_equal(order.ids(0, np.arange(10, 20)), order.ids(0, np.arange(10)))
    assert np.array_equal(Sequential(10).ids(0, np.array([3, 9, 10, 12])), [3, 9, 0, 2])


def test_clusters_are_drawn_equally_often_and_go_round_their_samples():
    labels = np.array([7] * 60 + [2] * 30 + [9] * 9 + [4])
    order = Balanced(labels, seed=5)
    ids = order.ids(2, np.arange(100))
    counts = {label: np.bincount(ids, minlength=100)[labels == label] for label in (7, 2, 9, 4)}
    assert {label: int(count.sum()) for label, count in counts.items()} == {7: 25, 2: 25, 9: 25, 4: 25}
    assert all(count.max() - count.min() <= 1 for count in counts.values())
    assert [order.ids(2, np.array([p]))[0] for p in range(20)] == ids[:20].tolist()
    assert not np.array_equal(order.ids(3, np.arange(100)), ids)
    assert np.array_equal(Balanced(labels, seed=5).ids(2, np.arange(100)), ids)
