"""The dali mode: its distance from PIL on photographs, and that nothing but the draws decides a single bit."""

import numpy as np
import pytest

from fidelity_cases import (
    CASES,
    Case,
    Graph,
    changed,
    exact_views,
    geometric_steps,
    graph_views,
    measure,
    recipe,
    sizes,
)
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.transforms import CenterCrop, ColorJitter, RandomHorizontalFlip
from sslrun.data.views import ViewGroup

GROUPS = [ViewGroup(2, recipe(48)), ViewGroup(1, recipe(33, (0.05, 0.14)))]


def arguments_of(groups: list[ViewGroup], positions: np.ndarray | None = None) -> Arguments:
    positions = np.arange(8) if positions is None else positions
    return view_arguments(groups, 0, 0, positions, sizes()[positions])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_against_pil(case: Case) -> None:
    error, _ = measure(case, "dali", num_views=2)
    assert error.mean <= case.dali.mean and error.p99 <= case.dali.p99 and error.most <= case.dali.most, error


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(GROUPS)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(5, 6), slice(None, None, -1)], ids=str)
def test_neighbors_and_place_in_the_batch_decide_no_bit(graph: Graph, rows: slice) -> None:
    positions = np.arange(8)[rows]
    part = graph.views(arguments_of(GROUPS, positions), rows)
    for group, one, other in zip(GROUPS, graph.views(arguments_of(GROUPS)), part, strict=True):
        assert np.array_equal(one[np.concatenate([positions + 8 * v for v in range(group.num_views)])], other)


def test_threads_decide_no_bit_and_numbers_do(graph: Graph) -> None:
    arguments = arguments_of(GROUPS)
    expected = graph.views(arguments)
    for one, other in zip(expected, Graph(GROUPS, num_threads=3).views(arguments), strict=True):
        assert np.array_equal(one, other)
    row = int(np.flatnonzero(arguments[0][1].apply)[0])
    factors = arguments[0][1]["factors"].copy()
    factors[row] += (0.05, 0.05, 0.05, 3)
    other = graph.views(changed(arguments, 0, 1, factors=factors))[0]
    assert np.flatnonzero((other != expected[0]).any(axis=(1, 2, 3))).tolist() == [row]


def test_a_graph_that_stops_at_geometry_leaves_the_rest_to_the_stage() -> None:
    """As on a GPU in exact mode: only the resize differs from the exact mode of the CPU."""
    arguments = arguments_of(GROUPS)
    for one, other in zip(
        graph_views(GROUPS, arguments, geometric_steps(GROUPS)), exact_views(GROUPS, arguments), strict=True
    ):
        assert 0 < np.abs(one.astype(int) - other).mean() < 0.3
    cut = [ViewGroup(1, [CenterCrop(64), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1)])]
    arguments = arguments_of(cut)
    assert np.array_equal(graph_views(cut, arguments, geometric_steps(cut))[0], exact_views(cut, arguments)[0])
