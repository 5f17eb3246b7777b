"""k-NN equals scikit-learn's on real data, does not depend on the size of pieces, and has bounded memory."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation import knn, probe
from sslrun.evaluation.knn import Knn, knn_grid, knn_predict, knn_top1, nearest

KS = [1, 10, 20, 100, 200, 5000]
BANK = 1200  # of the 1797 digits


def digits(noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bank, its labels, queries, their labels: 8 x 8 images of digits, with noise added."""
    pixels, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    features = pixels.float() + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return features[:BANK], labels[:BANK].long(), features[BANK:], labels[BANK:].long()


def scikit_learns(k: int, temperature: float, bank: torch.Tensor, labels: torch.Tensor) -> KNeighborsClassifier:
    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    classifier = KNeighborsClassifier(min(k, len(bank)), weights=weights, metric="cosine", algorithm="brute")
    return classifier.fit(bank.double().numpy(), labels.numpy())


@pytest.mark.parametrize(("noise", "ks", "temperature"), [(0.0, [10, 20], 0.07), (12.0, KS, 0.07), (12.0, [200], 0.5)])
def test_predictions_equal_scikit_learns_on_digits(noise, ks, temperature):
    bank, labels, queries, truth = digits(noise)
    grid = knn_grid(bank, labels, queries, truth, ks=ks, temperature=temperature, at_once=500_000)
    for k, row in zip(ks, grid, strict=True):
        votes = scikit_learns(k, temperature, bank, labels).predict_proba(queries.double().numpy())
        predicted = knn_predict(bank, labels, queries, k=k, temperature=temperature)
        assert predicted.tolist() == votes.argmax(1).tolist(), k
        best = (-votes).argsort(1, kind="stable")[:, :5]
        is_right = (best == truth.numpy()[:, None]) & (np.take_along_axis(votes, best, 1) > 0)
        assert row["top1_pct"] == pytest.approx(100 * is_right[:, 0].mean())
        assert row["top5_pct"] == pytest.approx(100 * is_right.any(1).mean())
        assert (row["k"], row["temperature"]) == (k, temperature)
    assert len({row["top1_pct"] for row in grid}) > len(ks) / 2, "or one could stand for all"


def test_the_best_of_the_grid_is_the_result():
    bank, labels, queries, truth = digits(12.0)
    result = Knn(k=[200, 10, 20]).of_features(bank, labels, queries, truth)
    rows = {row["k"]: row["top1_pct"] for row in result["grid"]}
    assert list(rows) == [200, 10, 20] and result["knn/top1_pct"] == max(rows.values()) == rows[result["k"]]
    assert min(rows.values()) < max(rows.values())
    assert knn_top1(bank, labels, queries, truth, k=10) == rows[10]
    same = Knn(k=[9000, 5000, 7000]).of_features(bank, labels, queries, truth)
    assert same["k"] == 5000, "of equals the smallest"


def test_equally_near_rows_are_ordered_by_id_whatever_the_pieces():
    """All rows lie on the axes, so that every product is exact and most are equal."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    bank = axes[torch.randint(8, (300,), generator=generator)]
    queries = axes[torch.randint(8, (12,), generator=generator)] * 3
    cosines = F.normalize(queries, dim=1) @ bank.T
    expected = torch.tensor([sorted(range(300), key=lambda i, row=row: (-row[i], i))[:130] for row in cosines.tolist()])
    for at_once in (1, 50, 2000, 2**24):
        ids, similarity = nearest(bank, queries, 130, at_once=at_once)
        assert torch.equal(ids, expected)
        assert torch.equal(similarity, cosines.gather(1, expected))
    assert similarity.unique().tolist() == [0.0, 1.0], "or there was no choice among equals"
    numbers = torch.tensor([[-0.0, -0.5, 1.0, 0.0, 1e-40, -1.0, 0.5, 1.0]])
    keys = knn._keys(numbers.clone(), 10).sort(descending=True).values
    assert knn._read(keys)[0].tolist() == [[12, 17, 16, 14, 10, 13, 11, 15]], "0 and -0 are equal"
    assert torch.equal(knn._read(keys)[1], numbers[:, [2, 7, 6, 4, 0, 3, 1, 5]])


def test_the_nearer_neighbor_weighs_more():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    query = torch.tensor([[1.0, 0.05]])
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(bank, labels, query, k=3).tolist() == [0]
    assert knn_predict(bank, labels, query, k=3, temperature=100.0).tolist() == [1]


def test_the_first_class_wins_a_tie_and_a_class_without_votes_is_not_in_the_top_five():
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    tie = knn_predict(pair, torch.tensor([3, 1]), pair[:1], k=2)
    assert tie.tolist() == [1]
    rows = knn_grid(pair, torch.tensor([3, 1]), pair, torch.tensor([3, 0]), ks=[1, 2])
    assert [(row["top1_pct"], row["top5_pct"]) for row in rows] == [(50, 50), (0, 50)]


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that is created within it."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_memory_is_bounded_in_rows_queries_and_classes():
    generator = torch.Generator().manual_seed(0)

    def largest(num_bank: int, num_queries: int, num_classes: int, at_once: int) -> int:
        bank, queries = (torch.randn(n, 2, generator=generator) for n in (num_bank, num_queries))
        labels = torch.arange(num_bank) * num_classes // num_bank
        with Largest() as seen:
            knn_grid(bank, labels, queries, torch.arange(num_queries) % num_classes, ks=[5, 20], at_once=at_once)
        return seen.bytes

    for shape in ((6000, 60, 10), (100, 900, 10), (100, 300, 300)):  # many rows, many queries, many classes
        assert largest(*shape, at_once=30_000) <= 8 * 30_000, shape
        assert largest(*shape, at_once=2**24) > 8 * 30_000, "a bound that nothing reaches says nothing"


def test_wrong_arguments_are_errors():
    for wrong in ({"k": []}, {"k": [10, 0]}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError, match=rf"eval\.knn\.{next(iter(wrong))} must"):
            Knn(**wrong)
    bank, labels, queries, truth = digits()
    queries[3, 5] = torch.inf
    with pytest.raises(RunFailed, match="the features of 1 of 597 images are not finite"):
        Knn().of_features(bank, labels, queries, truth)


def test_labels_may_be_any_numbers():
    """Labels of a list with gaps: memory for each number up to the largest would be 2.4 TB."""
    bank, labels, queries, truth = digits(noise=12.0)
    odd = torch.tensor([3, 7, 10**4, 10**6, 10**9, 3 * 10**11, 10**15, 10**16, 10**17, 2**63 - 1])
    assert knn_grid(bank, odd[labels], queries, odd[truth], ks=[10]) == knn_grid(bank, labels, queries, truth, ks=[10])
    assert torch.equal(knn_predict(bank, odd[labels], queries), odd[knn_predict(bank, labels, queries)])
    few = [part[:60] for part in (bank, labels, queries, truth)]
    probed = [probe.linear_probe(few[0], of[few[1]], few[2], of[few[3]], bank.device) for of in (torch.arange(10), odd)]
    assert probed[0] == probed[1]
