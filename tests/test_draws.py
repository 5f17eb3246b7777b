"""Draws: the generator's published answers, and that a number depends on nothing but its own arguments."""

import numpy as np
import pytest

from sslrun.randomness import ORDER_VIEW, philox, uniforms

# kat_vectors of Random123 (philox4x32, 10 rounds): counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert tuple(philox(np.array(counter, dtype=np.uint64), key)) == answer


def test_a_number_depends_only_on_its_own_arguments():
    positions = np.array([7, 3, 1_000_000, 4_000_000_000])
    full = uniforms(1, 2, positions, view=3, count=23)
    assert full.shape == (4, 23)
    for i, position in enumerate(positions):
        for offset in (0, 1, 4, 7):
            alone = uniforms(1, 2, np.array([position]), view=3, count=5, offset=offset)
            assert np.array_equal(alone[0], full[i, offset : offset + 5])


def test_every_argument_changes_every_number():
    base = {"seed": 1, "epoch": 2, "positions": np.arange(8), "view": 3, "count": 16}
    changes = [{"seed": 2}, {"seed": 1 + 2**40}, {"epoch": 3}, {"positions": np.arange(8) + 8}, {"view": ORDER_VIEW}]
    numbers = uniforms(**base)
    for change in changes:
        assert not np.any(numbers == uniforms(**{**base, **change})), change


def test_negative_and_huge_seeds():
    positions = np.arange(4)
    assert np.array_equal(uniforms(-1, 0, positions, 0, 4), uniforms(2**64 - 1, 0, positions, 0, 4))


def test_uniform_and_uncorrelated():
    numbers = uniforms(0, 0, np.arange(20_000), view=0, count=8)
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = np.stack([np.histogram(numbers[:, k], bins=50, range=(0, 1))[0] for k in range(8)])
    chi2 = ((counts - 400) ** 2 / 400).sum(axis=1)  # 49 degrees of freedom: mean 49, p = 1e-5 at about 101
    assert chi2.max() < 101 and chi2.min() > 15
    correlation = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 0.04


def test_out_of_range_positions_are_refused():
    with pytest.raises(ValueError, match="positions"):
        uniforms(0, 0, np.array([-1]), 0, 1)
    with pytest.raises(ValueError, match="epochs"):
        uniforms(0, -1, np.array([0]), 0, 1)
