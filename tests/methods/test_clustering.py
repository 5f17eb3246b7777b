"""PCA, k-means, online clusters and weights against loops written from the papers, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ranks import run_ranks
from sslrun.nn import clustering
from sslrun.nn.clustering import OnlineClusters, balancing_weights, k_means, totals, whitened
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.runtime import distributed

CPU = torch.device("cpu")


def unit_rows(num_rows: int, dim: int, seed: int = 0, num_blobs: int = 0) -> Tensor:
    """Directions, in blobs where wanted."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator)
    if num_blobs:
        centers = torch.randn(num_blobs, dim, generator=generator)
        rows = centers[torch.arange(num_rows) % num_blobs] + 0.3 * rows
    return F.normalize(rows, dim=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lloyd(rows: Tensor, num_clusters: int, seed: int, iterations: int) -> tuple[list[list[float]], list[int]]:
    """k-means with loops over Python floats, of rows that leave no cluster empty. Returns centroids and labels."""
    points = rows.double().tolist()
    centroids = [list(points[i]) for i in torch.randperm(len(points), generator=seeded(seed))[:num_clusters].tolist()]

    def nearest(point: list[float]) -> int:
        squares = [sum((a - b) ** 2 for a, b in zip(point, centroid, strict=True)) for centroid in centroids]
        return squares.index(min(squares))

    for _ in range(iterations):
        labels = [nearest(point) for point in points]
        for k in range(num_clusters):
            members = [point for point, label in zip(points, labels, strict=True) if label == k]
            centroids[k] = [sum(column) / len(members) for column in zip(*members, strict=True)]
    return centroids, [nearest(point) for point in points]


@pytest.mark.parametrize("piece", [2**24, 40])
@pytest.mark.parametrize(("num_rows", "num_clusters", "num_blobs"), [(60, 5, 4), (41, 1, 0), (30, 30, 0), (50, 7, 0)])
def test_k_means_is_lloyds(num_rows, num_clusters, num_blobs, piece, monkeypatch):
    monkeypatch.setattr(clustering, "PIECE", piece)
    rows = unit_rows(num_rows, 6, num_blobs=num_blobs)
    centroids, labels = k_means(rows, num_clusters, seeded(3), iterations=4)
    expected_centroids, expected_labels = lloyd(rows, num_clusters, 3, 4)
    assert labels.dtype == torch.long and labels.tolist() == expected_labels
    torch.testing.assert_close(centroids.double(), torch.tensor(expected_centroids).double(), atol=1e-6, rtol=1e-5)


def test_an_empty_cluster_gets_half_of_the_largest():
    centroids, sizes = unit_rows(6, 3), torch.tensor([9, 0, 4, 0, 0, 2])
    expected = centroids.double().tolist()

    def split(largest: int, empty: int) -> None:
        old = expected[largest]
        expected[empty] = [x * (1 + s / 1024) for x, s in zip(old, (1, -1, 1), strict=True)]
        expected[largest] = [x * (1 - s / 1024) for x, s in zip(old, (1, -1, 1), strict=True)]

    split(0, 1)  # sizes 5 4 4 0 0 2
    split(0, 3)  # sizes 3 4 4 2 0 2
    split(1, 4)
    clustering._split_for_empty(centroids, sizes)
    torch.testing.assert_close(centroids.double(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_k_means_fills_what_is_empty():
    """All first centroids are the same point: two clusters stay empty, and one of those left holds two blobs."""
    blobs = torch.tensor([0] * 12 + [1] * 20 + [2] * 20)
    rows = torch.cat([unit_rows(1, 4, seed=seed) for seed in range(3)])[blobs]
    seed = next(seed for seed in range(9999) if (torch.randperm(52, generator=seeded(seed))[:3] < 12).all())
    _, labels = k_means(rows, 3, seeded(seed), iterations=8)
    assert len({*zip(blobs.tolist(), labels.tolist(), strict=True)}) == len(labels.unique()) == 3


def test_k_means_depends_on_the_generator_alone():
    rows = unit_rows(80, 5)
    state = torch.get_rng_state()
    once, again, other = (k_means(rows, 6, seeded(seed), iterations=3)[0] for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_clusters_than_samples_is_an_error():
    with pytest.raises(ValueError, match="cannot make 5 clusters of 4 samples"):
        k_means(unit_rows(4, 3), 5, seeded())


def test_sums_do_not_depend_on_the_order():
    rows, labels = unit_rows(1000, 16), torch.randint(7, (1000,), generator=seeded())
    order = torch.randperm(1000, generator=seeded(1))
    sums, counts = totals(rows, labels, 7)
    assert all(torch.equal(a, b) for a, b in zip(totals(rows[order], labels[order], 7), (sums, counts), strict=True))
    for k in range(7):
        torch.testing.assert_close(
            sums[k].double() / clustering.FIXED_POINT, rows[labels == k].double().sum(0), atol=1e-8, rtol=0
        )
        assert counts[k] == (labels == k).sum()


@pytest.mark.parametrize("piece", [2**24, 50])
def test_whitening_is_pca(piece, monkeypatch):
    monkeypatch.setattr(clustering, "PIECE", piece)
    features = torch.randn(200, 8, generator=seeded()) @ torch.randn(8, 8, generator=seeded(1)) + 3
    centered = features.double().numpy() - features.double().numpy().mean(0)
    variances, directions = np.linalg.eigh(centered.T @ centered / 200)
    expected = centered @ directions[:, -3:] / np.sqrt(variances[-3:])
    found = whitened(features, 3, CPU).double().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)  # up to the sign of each direction
    np.testing.assert_allclose(found.T @ found / 200, np.eye(3), atol=1e-5)


def test_directions_without_variance_come_out_as_zeros():
    features = torch.randn(50, 6, generator=seeded()) * torch.tensor([1.0, 0, 2, 0, 1, 0]) + 0.1
    found = whitened(features, 5, CPU)
    assert found.isfinite().all()
    torch.testing.assert_close(found.square().mean(0).sort().values, torch.tensor([0.0, 0, 1, 1, 1]), atol=1e-4, rtol=0)
    assert not whitened(torch.ones(10, 4), 2, CPU).any()
    with pytest.raises(ValueError, match="PCA to 7 dimensions of features that have 6"):
        whitened(features, 7, CPU)


def clustered_here(num_rows: int) -> tuple[Tensor, ...]:
    """Features, clusters and weights of this rank, from what all ranks have."""
    device = torch.device("cpu")
    distributed.init(device)
    features = unit_rows(num_rows, 12, num_blobs=5) * 4 + 1
    mine = distributed.share(num_rows)
    rows = whitened(features[mine], 6, device)
    centroids, labels = k_means(F.normalize(rows, dim=1), 8, seeded(2), iterations=5)
    counts = labels.bincount(minlength=8)
    drawn = labels[torch.randperm(num_rows, generator=seeded(4))[:16]].view(distributed.world_size(), 2, -1)
    weights = torch.cat(balancing_weights(list(drawn[distributed.rank()]), counts, 0.5))
    masks = torch.cat(dropout_masks(2, (8 // distributed.world_size(), 5), 0.4, 7, device))
    online = OnlineClusters(num_rows, 12, 8)
    online.start(features[mine], seeded(3))
    distributed.shutdown()
    return rows, centroids, labels, weights, masks, online.bank.rows, online.labels, online.sums


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_cluster_as_one_process_does(world_size):
    ranks = run_ranks(clustered_here, world_size, 103)
    rows, centroids, labels, weights, masks, *online = clustered_here(103)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]).abs(), rows.abs(), atol=1e-6, rtol=1e-5)
    for _, other_centroids, other_labels, _, _, *other_online in ranks:
        assert all(torch.equal(one, other) for one, other in zip(online, other_online, strict=True))
        assert torch.equal(other_labels, labels)
        torch.testing.assert_close(other_centroids.abs(), centroids.abs(), atol=1e-6, rtol=1e-5)
        assert torch.equal(other_centroids, ranks[0][1])
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), weights)
    assert torch.equal(torch.cat([rank[4] for rank in ranks]), masks)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weighted_loss_is_the_weighted_mean(power):
    """Cross-entropy with class weights as in Caron et al. 2018 (section 3.3) over the whole batch, and its gradient."""
    torch.manual_seed(0)
    head = ClsHead(6, 4, init_std=1.0).double()
    features, labels = torch.randn(12, 6, dtype=torch.float64), torch.randint(4, (12,))
    counts = torch.tensor([100, 3, 41, 7])
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for row, label in zip(features, labels.tolist(), strict=True):
        scores = head.fc.weight @ row + head.fc.bias
        weight = float(counts[label]) ** -power
        total = total - weight * torch.log(scores[label].exp() / scores.exp().sum())
        weights += weight
    expected = total / weights
    expected_gradient = torch.autograd.grad(expected, head.fc.weight)[0]

    parts = balancing_weights(list(labels.split(4)), counts, power)
    losses = [
        head(rows, own, weight)[0] for rows, own, weight in zip(features.split(4), labels.split(4), parts, strict=True)
    ]
    loss = sum(losses) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    gradient = torch.autograd.grad(loss, head.fc.weight)[0]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_a_redrawn_head_is_a_new_one():
    head = ClsHead(50, 40, init_std=0.3)
    with torch.no_grad():
        head.fc.bias.fill_(2)
    first, again = ({p: f(p.detach()) for p, f in head.redrawn(seeded(1))} for _ in range(2))
    assert first.keys() == set(head.parameters())
    weight, bias = first[head.fc.weight], first[head.fc.bias]
    assert torch.equal(weight, again[head.fc.weight]) and not bias.any()
    assert float(weight.std()) == pytest.approx(0.3, rel=0.05) and abs(float(weight.mean())) < 0.03
    assert not torch.equal(weight, dict(head.redrawn(seeded(2)))[head.fc.weight](weight))


def test_dropout_is_of_the_place_in_the_global_batch():
    whole = torch.cat(dropout_masks(1, (64, 500), 0.3, 5, CPU))
    assert torch.equal(whole, torch.cat(dropout_masks(4, (16, 500), 0.3, 5, CPU)))
    assert whole.unique().tolist() == pytest.approx([0, 1 / 0.7])
    dropped = (whole == 0).double()
    assert float(dropped.mean()) == pytest.approx(0.3, abs=0.01)
    columns = dropped.mean(0)
    assert float(columns.std()) == pytest.approx(math.sqrt(0.3 * 0.7 / 64), rel=0.1)
    assert abs(float(((dropped[:, 1:] - 0.3) * (dropped[:, :-1] - 0.3)).mean())) < 0.01
    following = torch.cat(dropout_masks(1, (64, 500), 0.3, 6, CPU)).flatten()
    assert 0.4 < float(((following == 0) == (whole.flatten() == 0)).double().mean()) < 0.62  # 0.58 when independent
    for shift in (1, 500):
        same = (following[:-shift] == 0) == (whole.flatten()[shift:] == 0)
        assert 0.4 < float(same.double().mean()) < 0.62
    assert torch.cat(dropout_masks(1, (8, 9), 0.0, 5, CPU)).eq(1).all()


class Longhand:
    """ODC's memories as dictionaries of Python numbers (Zhan et al. 2020, section 3.2)."""

    def __init__(self, clusters: OnlineClusters) -> None:
        self.rows = {i: row for i, row in enumerate(clusters.bank.rows.double().tolist())}
        self.labels = dict(enumerate(clusters.labels.tolist()))
        self.centroids = clusters.centroids.double().tolist()

    def members(self, cluster: int) -> list[int]:
        return [sample for sample, label in self.labels.items() if label == cluster]

    def mean(self, cluster: int) -> list[float]:
        rows = [self.rows[sample] for sample in self.members(cluster)]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def nearest(self, row: list[float], allowed: list[int]) -> int:
        squares = [sum((a - b) ** 2 for a, b in zip(row, self.centroids[k], strict=True)) for k in allowed]
        return allowed[squares.index(min(squares))]

    def update(self, index: list[int], features: list[list[float]], momentum: float) -> int:
        latest = dict(zip(index, features, strict=True))  # of a sample that occurs twice the last one stays
        changed = set()
        for sample, feature in latest.items():
            row = [(1 - momentum) * a + momentum * b for a, b in zip(self.rows[sample], feature, strict=True)]
            length = math.sqrt(sum(x * x for x in row))
            self.rows[sample] = [x / length for x in row]
            label = self.nearest(self.rows[sample], list(range(len(self.centroids))))
            if label != self.labels[sample]:
                changed.add(sample)
            self.labels[sample] = label
        return sum(sample in changed for sample in index)

    def update_centroids(self) -> None:
        for cluster in range(len(self.centroids)):
            if self.members(cluster):
                self.centroids[cluster] = self.mean(cluster)

    def tend_small(self, min_size: int, generator: torch.Generator) -> int:
        every = range(len(self.centroids))
        small = [k for k in every if len(self.members(k)) < min_size]
        large = [k for k in every if k not in small]
        for sample, label in list(self.labels.items()):
            if label in small:
                self.labels[sample] = self.nearest(self.rows[sample], large)
        for cluster in small:
            sizes = [len(self.members(k)) for k in every]
            largest = sizes.index(max(sizes))
            members = self.members(largest)
            _, half = k_means(torch.tensor([self.rows[sample] for sample in members]), 2, generator)
            for sample, side in zip(members, half.tolist(), strict=True):
                if side == 1:
                    self.labels[sample] = cluster
            self.centroids[cluster], self.centroids[largest] = self.mean(cluster), self.mean(largest)
        return len(small)

    def check(self, clusters: OnlineClusters) -> None:
        assert clusters.labels.tolist() == list(self.labels.values())
        torch.testing.assert_close(clusters.bank.rows, torch.tensor(list(self.rows.values())), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clusters.centroids, torch.tensor(self.centroids), atol=1e-5, rtol=1e-5)


def test_online_clusters_are_the_papers():
    clusters = OnlineClusters(60, 5, 6, momentum=0.3)
    clusters.start(unit_rows(60, 5) * 3, seeded(1))
    assert torch.equal(clusters.labels, k_means(unit_rows(60, 5), 6, seeded(1))[1])
    twin = Longhand(clusters)
    twin.update_centroids()
    twin.check(clusters)  # centroids are the means of what is in the bank
    tended, num_changed, generator = 0, 0, seeded(5)
    for step in range(12):
        index = torch.randint(60, (16,), generator=generator)
        assert len(index.unique()) < 16, "no sample occurs twice: the case is missing"
        features = F.normalize(torch.randn(16, 5, generator=generator), dim=1)
        share_changed = clusters.update(index, features)
        changed = twin.update(index.tolist(), features.double().tolist(), 0.3)
        assert float(share_changed) == pytest.approx(changed / 16)
        num_changed += changed
        if step % 3 == 2:
            clusters.update_centroids()
            twin.update_centroids()
        clusters.tend_small(9, seeded(step))
        tended += twin.tend_small(9, seeded(step))
        twin.check(clusters)
        sums, counts = totals(clusters.bank.rows, clusters.labels, 6)
        assert torch.equal(sums, clusters.sums) and torch.equal(counts, clusters.counts)  # to the bit, not nearly
    assert tended > 3 and num_changed > 10, "nothing happened"


def test_equal_rows_are_split_all_the_same():
    clusters = OnlineClusters(12, 3, 4)
    clusters.start(torch.ones(12, 3), seeded())
    clusters.tend_small(2, seeded(1))
    assert clusters.counts.sum() == 12 and (clusters.counts > 0).sum() == 4
    assert clusters.counts.tolist() == clusters.labels.bincount(minlength=4).tolist()


def test_when_all_clusters_are_small_they_stay():
    clusters = OnlineClusters(12, 3, 4)
    clusters.start(unit_rows(12, 3), seeded())
    labels = clusters.labels.clone()
    clusters.tend_small(13, seeded(1))
    assert torch.equal(clusters.labels, labels)
