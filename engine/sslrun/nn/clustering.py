"""Clustering of the features of a whole data set: PCA with whitening, k-means over ranks, and clusters that are updated
in each step.

Every rank works on its share of the rows, and sums are all-reduced. Rows that are clustered have a length of at most 1,
so that they can be summed in fixed point: sums of integers do not depend on the order, the number of ranks or the
device, and subtracting a row restores the sum exactly. Distances are computed in pieces; no N x K matrix exists. A stop
that a run is asked for is heard at each piece.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Progress
from sslrun.nn.queue_and_bank import Bank, last_occurrence
from sslrun.runtime import distributed
from sslrun.runtime.late_value import LateValue
from sslrun.runtime.stopping import stoppable

FIXED_POINT = 2.0**36  # a resolution of 1.5e-11, and room for a sum of 67 million rows
PIECE = 2**24  # entries in a piece of the distance matrix


@torch.no_grad()
def whitened(features: Tensor, dim: int, device: torch.device) -> Tensor:
    """PCA to `dim` dimensions, each of them scaled to a variance of 1 (DeepCluster: Caron et al. 2018, arXiv
    1807.05520, section 3.4).

    Directions in which the features do not vary become zeros.

    Args:
        features: (n, C), this rank's share of N rows, on any device.
        dim: number of dimensions, at most C.
        device: where to compute, in float64 up to the projection.

    Returns:
        (n, dim) fp32 on the device.
    """
    channels = features.shape[1]
    if not 1 <= dim <= channels:
        raise ValueError(f"PCA to {dim} dimensions of features that have {channels}")
    num_rows = distributed.total_rows(features, device)
    size = max(1, PIECE // channels)
    mean = torch.zeros(channels, dtype=torch.float64, device=device)
    for piece in _pieces(features, size, num_rows):
        mean += piece.to(device).double().sum(0)
    mean = distributed.all_reduce_sum_(mean) / num_rows
    covariance = torch.zeros(channels, channels, dtype=torch.float64, device=device)
    for piece in _pieces(features, size, num_rows):
        centered = piece.to(device).double() - mean
        covariance.addmm_(centered.T, centered)
    variances, directions = torch.linalg.eigh(distributed.all_reduce_sum_(covariance) / num_rows)
    floor = variances[-1] * channels * torch.finfo(torch.float32).eps ** 2  # rounding errors of float32 features
    scales = torch.where(variances > floor, variances.clamp(min=floor).rsqrt(), 0)
    projection = (directions * scales)[:, -dim:].contiguous()
    distributed.broadcast_([projection])  # the sign of a direction depends on the library
    return torch.cat([((piece.to(device).double() - mean) @ projection).float() for piece in features.split(size)])


@torch.no_grad()
def k_means(rows: Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, started from random rows.

    An empty cluster takes half of the largest one: both continue from the centroid of the largest, moved apart by
    1/1024, as in faiss (which draws the cluster to split at random, larger ones more often). After the last assignment
    there may be empty clusters.

    Args:
        rows: (n, D) fp32, this rank's share of N rows (`distributed.share`), each with a length of at most 1.
        num_clusters: number of clusters K, at most N.
        generator: a CPU generator in the same state on every rank.
        iterations: number of times that centroids are computed.

    Returns:
        Centroids (K, D) and labels (N,) int64 of all rows, the same on every rank.
    """
    num_rows = distributed.total_rows(rows, rows.device)
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(f"cannot make {num_clusters} clusters of {num_rows} samples")
    mine = distributed.share(num_rows)
    chosen = torch.randperm(num_rows, generator=generator)[:num_clusters]
    here = ((chosen >= mine.start) & (chosen < mine.stop)).nonzero().flatten()
    centroids = rows.new_zeros(num_clusters, rows.shape[1])
    centroids[here.to(rows.device)] = rows[(chosen[here] - mine.start).to(rows.device)]
    distributed.all_reduce_sum_(centroids)
    for _ in range(iterations):
        sums, counts = totals(rows, _assigned(rows, centroids, num_rows), num_clusters)
        distributed.all_reduce_sum_(sums)
        distributed.all_reduce_sum_(counts)
        centroids = means(sums, counts, centroids)
        _split_for_empty(centroids, counts)
    return centroids, distributed.all_gather_shares(_assigned(rows, centroids, num_rows), num_rows)


def totals(rows: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Fixed-point sums (K, D) and counts (K,), both int64, of the rows (n, D) with each label (n,)."""
    sums = torch.zeros(num_clusters, rows.shape[1], dtype=torch.long, device=rows.device)
    size = max(1, PIECE // rows.shape[1])
    for piece, piece_labels in zip(rows.split(size), labels.split(size), strict=True):
        sums.index_add_(0, piece_labels, fixed_point(piece))
    counts = torch.zeros(num_clusters, dtype=torch.long, device=rows.device)
    return sums, counts.index_add_(0, labels, torch.ones_like(labels))


def fixed_point(rows: Tensor) -> Tensor:
    """Rows of numbers from -1 to 1 as int64, whose sums are exact."""
    return (rows.double() * FIXED_POINT).round().long()


def means(sums: Tensor, counts: Tensor, old: Tensor) -> Tensor:
    """Centroids (K, D) from fixed-point sums and counts; empty clusters keep their `old` centroid."""
    average = (sums.double() / FIXED_POINT / counts.clamp(min=1).unsqueeze(1)).to(old.dtype)
    return torch.where(counts.unsqueeze(1) > 0, average, old)


def _nearest(rows: Tensor, centroids: Tensor, is_barred: Tensor | None = None) -> Tensor:
    """(n,) int64: the centroid at the smallest Euclidean distance from each row; none that is barred, (K,) bool."""
    squares = centroids.square().sum(1)
    if is_barred is not None:
        squares = squares.masked_fill(is_barred, torch.inf)
    pieces = rows.split(max(1, PIECE // len(centroids)))
    return torch.cat([torch.addmm(squares, piece, centroids.T, alpha=-2).argmin(1) for piece in pieces])


def _assigned(rows: Tensor, centroids: Tensor, num_rows: int) -> Tensor:
    """`_nearest` of this rank's share of `num_rows` rows."""
    pieces = _pieces(rows, max(1, PIECE // len(centroids)), num_rows)
    return torch.cat([_nearest(piece, centroids) for piece in pieces])


def _pieces(rows: Tensor, size: int, num_rows: int) -> Iterator[Tensor]:
    """This rank's share of `num_rows` rows, `size` rows at a time; before each piece a stop is heard."""
    return stoppable(rows.split(size), most=-(-num_rows // distributed.world_size() // size))


def _split_for_empty(centroids: Tensor, counts: Tensor) -> None:
    """Give each empty cluster half of what is the largest then, in place."""
    sizes = counts.cpu()
    apart = torch.ones(centroids.shape[1], device=centroids.device)
    apart[0::2], apart[1::2] = 1 + 1 / 1024, 1 - 1 / 1024
    for empty in (sizes == 0).nonzero().flatten().tolist():
        largest = int(sizes.argmax())
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
        centroids[empty] = centroids[largest] * apart
        centroids[largest] *= 2 - apart


class OnlineClusters(nn.Module):
    """A feature and a cluster for every sample, updated with every batch: the samples memory and the centroids memory
    of Zhan et al. 2020 (arXiv 2006.10645), section 3.2.

    Every rank holds a full copy and makes the same updates. Sizes and sums of the clusters are updated with each sample
    that moves, so they are never recomputed over all N.

    Args:
        num_samples: number of samples N.
        dim: dimension D of the features.
        num_clusters: number of clusters K.
        momentum: weight of a new feature in a sample's row of the bank.
    """

    labels: Tensor
    centroids: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, num_samples: int, dim: int, num_clusters: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.bank = Bank(num_samples, dim, momentum)
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.long))
        self.register_buffer("centroids", torch.zeros(num_clusters, dim))
        self.register_buffer("sums", torch.zeros(num_clusters, dim, dtype=torch.long))  # fixed point
        self.register_buffer("counts", torch.zeros(num_clusters, dtype=torch.long))
        self._has_small: LateValue | None = None

    @torch.no_grad()
    def start(self, features: Tensor, generator: torch.Generator) -> None:
        """Initializes the clusters by k-means of all samples' features; (n, D) is this rank's share of them."""
        unit = F.normalize(features.to(self.labels.device), dim=1)
        centroids, labels = k_means(unit, len(self.centroids), generator)
        self.bank.rows.copy_(distributed.all_gather_shares(unit, len(self.labels)))
        self.labels.copy_(labels)
        sums, counts = totals(self.bank.rows, self.labels, len(self.centroids))
        self.sums.copy_(sums)
        self.counts.copy_(counts)
        self.centroids.copy_(means(sums, counts, centroids))
        self._has_small = None

    def follow(
        self,
        progress: Progress,
        index: Tensor,
        features: Tensor,
        min_cluster: int,
        centroids_update_interval: int,
        deal_with_small_clusters_interval: int,
    ) -> Tensor:
        """What follows a step: new features and labels of its samples, then centroids and small clusters if they are
        due. A cluster that has become small is dissolved one step later at the earliest, so that the host need not wait
        for the device to know.

        Args:
            progress: the position after the step.
            index: (B,) int64, the samples of the global batch, as for `update`.
            features: (B, D), normalized.
            min_cluster: smallest number of samples that a cluster keeps.
            centroids_update_interval: steps between two updates of the centroids.
            deal_with_small_clusters_interval: steps between two checks for small clusters.

        Returns:
            The share of the samples that changed their cluster, 0-d.
        """
        had_small = self.has_small(min_cluster)
        changed = self.update(index, features)
        if progress.step % centroids_update_interval == 0:
            self.update_centroids()
        if had_small and progress.step % deal_with_small_clusters_interval == 0:
            self.tend_small(min_cluster, progress.generator())
        self.look_for_small(min_cluster)
        return changed

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> Tensor:
        """Updates the bank with new features, and labels these samples by the centroids nearest to their new rows.

        Args:
            index: (B,) int64, sample ids; if a sample occurs twice, its last feature counts.
            features: (B, D), normalized.

        Returns:
            The share of samples that changed their cluster, 0-d.
        """
        before = self.labels[index]
        old = self.bank.rows[index]
        self.bank.update(index, features)
        new = self.bank.rows[index]
        last = last_occurrence(index)
        after = _nearest(new, self.centroids)[last]  # repeated samples get one label, whatever the rounding
        once = (last == torch.arange(len(index), device=index.device)).long()
        self._move(index, old, new, after, once)
        return (before != after).float().mean()

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Sets each centroid to the mean of its samples' rows; empty clusters keep theirs."""
        self.centroids.copy_(means(self.sums, self.counts, self.centroids))

    @torch.no_grad()
    def look_for_small(self, min_size: int) -> None:
        """Lets the device find out whether a cluster has fewer than `min_size` samples, for `has_small`."""
        self._has_small = LateValue((self.counts < min_size).any())

    def has_small(self, min_size: int) -> bool:
        """Whether a cluster has fewer than `min_size` samples; to be called before the next change of the clusters.

        The host waits only if `look_for_small` was not called after the last change: after a start or a resume.
        """
        if self._has_small is None:
            self.look_for_small(min_size)
        assert self._has_small is not None
        return bool(self._has_small.read())

    @torch.no_grad()
    def tend_small(self, min_size: int, generator: torch.Generator) -> None:
        """Dissolves clusters of fewer than `min_size` samples and refills them.

        Their samples go to the nearest of the other clusters. Then each of them in turn takes half of the cluster that
        is the largest at that point, by 2-means. The host waits for the device, since it decides which clusters these
        are.

        Args:
            min_size: smallest number of samples that a cluster keeps, 0 or more.
            generator: a CPU generator for 2-means, in the same state on every rank.
        """
        is_small = self.counts < min_size
        if not is_small.any() or is_small.all():
            return
        members = is_small[self.labels].nonzero().flatten()
        size = max(1, PIECE // self.bank.rows.shape[1])
        for first in range(0, len(members), size):
            index = members[first : first + size]
            rows = self.bank.rows[index]
            self._move(index, rows, rows, _nearest(rows, self.centroids, is_small), torch.ones_like(index))
        for cluster in is_small.nonzero().flatten().tolist():
            self._take_half_of_largest(cluster, generator)

    def _take_half_of_largest(self, cluster: int, generator: torch.Generator) -> None:
        largest = int(self.counts.argmax())
        index = (self.labels == largest).nonzero().flatten()
        if len(index) < 2:
            return
        rows = self.bank.rows[index]
        with distributed.alone():  # every rank has all rows
            _, half = k_means(rows, 2, generator)
        leaves = half == 1
        if leaves.all() or not leaves.any():  # all rows are equal
            leaves = torch.arange(len(index), device=index.device) % 2 == 1
        index, rows = index[leaves], rows[leaves]
        self._move(index, rows, rows, torch.full_like(index, cluster), torch.ones_like(index))
        pair = [largest, cluster]
        self.centroids[pair] = means(self.sums[pair], self.counts[pair], self.centroids[pair])

    def _move(self, index: Tensor, old: Tensor, new: Tensor, after: Tensor, times: Tensor) -> None:
        """Moves samples to other clusters, and updates sums, counts and labels.

        Args:
            index: (n,) int64, sample ids.
            old: (n, D), their rows in the sums so far.
            new: (n, D), their current rows.
            after: (n,) int64, their new clusters.
            times: (n,) int64: 0 if the sample occurs again later in `index`, else 1.
        """
        before = self.labels[index]
        self.sums.index_add_(0, before, fixed_point(old) * times.unsqueeze(1), alpha=-1)
        self.sums.index_add_(0, after, fixed_point(new) * times.unsqueeze(1))
        self.counts.index_add_(0, before, times, alpha=-1)
        self.counts.index_add_(0, after, times)
        self.labels.index_copy_(0, index, after)


def balancing_weights(labels: list[Tensor], counts: Tensor, power: float) -> list[Tensor]:
    """Weights of samples by the size of their cluster, size ** -power, with a mean of 1 over the global batch.

    Args:
        labels: (B,) int64 labels of each of this rank's micro-batches.
        counts: (K,) sizes of the clusters, above 0 for every label.
        power: 0 weighs all samples equally, 1 all clusters.

    Returns:
        (B,) fp32 for each micro-batch.
    """
    weights = counts.clamp(min=1)[torch.cat(labels)].float() ** -power
    mean = distributed.all_reduce_sum_(weights.sum()) / (len(weights) * distributed.world_size())
    return list((weights / mean).split([len(part) for part in labels]))
