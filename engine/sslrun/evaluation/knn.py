"""k-nearest-neighbor classification of frozen features by a weighted vote (Wu et al. 2018, arXiv 1805.01978, 3.4).

`bank` and `queries` are this rank's share (`distributed.share`) of the rows, on any device. Of other ranks' rows, a
rank receives only the queries of the current piece. Other memory is bounded for any number of rows: at most `at_once`
similarities exist at a time, of 16 bytes each, and the best of each piece of the bank are merged with the best so far.

Similarities are cosines in fp32. Equally near neighbors are ordered by id, classes with equal votes by label, and votes
are added in fp64, nearest neighbor first. So the result is the same on any device and any number of ranks, up to the
rounding of the matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.evaluation.features import require_finite, unit_rows
from sslrun.evaluation.frozen_encoder import FrozenEncoder, labels, numbered
from sslrun.evaluation.partial_result import PartialResult
from sslrun.runtime import distributed
from sslrun.runtime.numerics import in_full_float32
from sslrun.runtime.run_files import KNN
from sslrun.runtime.stopping import stoppable

AT_ONCE = 2**24  # 256 MiB
BANK_PIECE = 4096  # rows; AT_ONCE then has room for as many queries, so that a bank on the host is copied rarely
NOTHING = torch.iinfo(torch.long).min  # below the key of any row
LAST_ID = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Classifies test images by weighted votes of the k nearest training images (Wu et al. 2018, arXiv 1805.01978).

    Attributes:
        k: numbers k of nearest training images that vote; the result is that of the best k.
        temperature: temperature of the votes; a vote weighs exp(cosine / temperature).
    """

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UsageError(f"eval.knn.k must be a list of numbers of at least 1, not {self.k}")
        if not self.temperature > 0:
            raise UsageError(f"eval.knn.temperature must be above 0, not {self.temperature}")

    def run(self, encoder: FrozenEncoder, partial_result: PartialResult) -> dict[str, Any]:
        """Classifies the test images; see `of_features`."""
        train, test = encoder.labeled()
        bank, queries = (encoder.features_share(source) for source in (train, test))
        return self.of_features(bank, labels(train), queries, labels(test), encoder.device)

    def of_features(
        self,
        bank: Tensor,
        bank_labels: Tensor,
        queries: Tensor,
        query_labels: Tensor,
        device: torch.device | None = None,
    ) -> dict[str, Any]:
        """`knn/top1_pct`, the `k` of this result (the smallest if several are equal) and the `grid` of all k.

        Arguments are those of `knn_grid`.

        Raises:
            RunFailed: features are not finite.
        """
        for features in (bank, queries):
            require_finite(features)
        grid = knn_grid(
            bank, bank_labels, queries, query_labels, ks=self.k, temperature=self.temperature, device=device
        )
        best = max(grid, key=lambda row: (row["top1_pct"], -row["k"]))
        return {KNN: best["top1_pct"], "k": best["k"], "grid": grid}


@torch.no_grad()
@in_full_float32()
def knn_grid(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | None = None,
    at_once: int = AT_ONCE,
) -> list[dict[str, Any]]:
    """Accuracy of the vote of the k nearest bank rows, for several k in one pass.

    All ranks call it and get the same result. A query's class is among the first five if a neighbor voted for it and
    fewer than five classes come before it.

    Args:
        bank: (n, D), this rank's share of N features; normalized here.
        bank_labels: (N,) int64.
        queries: (m, D), this rank's share of M features; normalized here.
        query_labels: (M,) int64.
        ks: numbers of neighbors that vote; all of them if the bank has fewer.
        temperature: temperature of the votes; a vote weighs exp(cosine / temperature).
        device: where to compute; None for the device of the bank.
        at_once: largest number of similarities, or votes, in memory.

    Returns:
        A row for each of the ks: `k`, `temperature`, `top1_pct`, `top5_pct`.
    """
    device = bank.device if device is None else device
    (bank_labels, query_labels), num_classes = numbered(bank_labels.cpu(), query_labels.cpu())
    bank_labels, num_queries = bank_labels.to(device), len(query_labels)
    mine = query_labels[distributed.share(num_queries)].to(device)
    assert len(mine) == len(queries), "labels of all queries, not of this rank's"
    right = {k: torch.zeros(2, dtype=torch.long, device=device) for k in ks}
    for rows, ids, cosines in _nearest(bank, queries, max(ks), device, at_once, num_classes):
        for k, votes in _votes(bank_labels[ids], cosines, sorted(right), temperature, num_classes):
            before = _classes_before(votes, mine[rows])
            right[k] += torch.stack([(before < 1).sum(), (before < 5).sum()])
    counts = distributed.all_reduce_sum_(torch.stack([right[k] for k in ks])).tolist()
    return [
        {
            "k": k,
            "temperature": temperature,
            "top1_pct": 100 * first / num_queries,
            "top5_pct": 100 * five / num_queries,
        }
        for k, (first, five) in zip(ks, counts, strict=True)
    ]


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, **options: Any
) -> float:
    """Percentage of queries that are classified correctly with one k; arguments are those of `knn_grid`."""
    return float(knn_grid(bank, bank_labels, queries, query_labels, ks=[k], **options)[0]["top1_pct"])


@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """(M,) int64 on the CPU: the predicted class of each query of all ranks; arguments are those of `knn_grid`."""
    ids, cosines = nearest(bank, queries, k)
    classes, numbers = torch.unique(bank_labels.cpu(), return_inverse=True)
    ((_, votes),) = _votes(numbers[ids], cosines, [k], temperature, len(classes))
    return classes[votes.argmax(1)]  # the first of equal votes


@torch.no_grad()
@in_full_float32()
def nearest(
    bank: Tensor, queries: Tensor, count: int, *, device: torch.device | None = None, at_once: int = AT_ONCE
) -> tuple[Tensor, Tensor]:
    """The bank rows nearest to each query of all ranks, nearest first; arguments are those of `knn_grid`.

    Returns:
        Ids, int64, and cosines, fp32, both (M, min(count, N)) on the CPU.
    """
    device = bank.device if device is None else device
    pieces = [(ids, cosines) for _, ids, cosines in _nearest(bank, queries, count, device, at_once)]
    num_queries = distributed.total_rows(queries, device)
    ids, cosines = (distributed.all_gather_shares(torch.cat(part), num_queries).cpu() for part in zip(*pieces))  # noqa: B905
    return ids, cosines


def _nearest(
    bank: Tensor, queries: Tensor, count: int, device: torch.device, at_once: int, width: int = 1
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, for one piece of this rank's queries after another: their slice, and the ids (b, k) and cosines (b, k) of
    their nearest bank rows.

    In each iteration every rank searches its own share of the bank for one piece of each rank's queries. All ranks make
    the same number of pieces, of which the last may be empty.

    Args:
        bank: as in `knn_grid`.
        queries: as in `knn_grid`.
        count: number of neighbors.
        device: where to compute.
        at_once: as in `knn_grid`.
        width: number of values that the caller keeps per query.
    """
    ranks = distributed.world_size()
    num_bank, num_queries = (distributed.total_rows(each, device) for each in (bank, queries))
    first, most, count = distributed.share(num_bank).start, -(-num_queries // ranks), min(count, num_bank)
    step = min(BANK_PIECE, -(-num_bank // ranks), at_once)
    each = min(most, max(1, at_once // max(step, ranks * count, width) // ranks))  # queries of a rank in a piece
    for start in range(0, most, each):
        mine = queries[start : start + each]
        everyones = distributed.all_gather_rows(unit_rows(F.pad(mine, (0, 0, 0, each - len(mine))), device))
        best = torch.full((len(everyones), count), NOTHING, device=device)
        for offset in stoppable(range(0, len(bank), step), most=-(-num_bank // ranks // step)):
            keys = _keys(everyones @ unit_rows(bank[offset : offset + step], device).T, first + offset)
            keys = keys.topk(min(count, keys.shape[1])).values
            best = torch.cat([best, keys], 1).topk(count).values
        if ranks > 1:  # (rank with a part of the bank, rank with a query, query, k)
            shares = distributed.all_gather_rows(best).view(ranks, ranks, each, count)[:, distributed.rank()]
            best = shares.transpose(0, 1).flatten(1).topk(count).values
        yield slice(start, start + len(mine)), *_read(best[: len(mine)])


def _keys(cosines: Tensor, first: int) -> Tensor:
    """int64 (b, n) keys that are larger for nearer rows and, of equally near rows, for the smaller id.

    No two keys are equal, so the largest keys do not depend on how the bank is split into pieces. It overwrites
    `cosines`, fp32 (b, n).
    """
    bits = cosines.add_(0.0).view(torch.int32)  # adding 0 turns -0 into 0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # now the integers have the order of the numbers
    ids = torch.arange(first, first + cosines.shape[1], device=cosines.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(LAST_ID - ids)


def _read(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and cosines in keys."""
    bits = (keys >> 32).int()
    return LAST_ID - (keys & LAST_ID), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _votes(
    labels: Tensor, cosines: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> Iterator[tuple[int, Tensor]]:
    """Yields each k with the votes (b, C), fp64, of the k nearest neighbors: one tensor that is updated in place.

    Args:
        labels: (b, k) int64 classes of the neighbors, nearest first.
        cosines: (b, k) similarities of the neighbors.
        ks: ascending numbers of neighbors that vote.
        temperature: temperature of the votes.
        num_classes: number of classes C.
    """
    # Relative to the nearest neighbor: the winner is the same, and small temperatures do not overflow.
    weights = ((cosines - cosines[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    counted = 0
    for k in ks:
        for place in range(counted, min(k, weights.shape[1])):  # one at a time: sums in the same order everywhere
            votes.scatter_add_(1, labels[:, place : place + 1], weights[:, place : place + 1])
        counted = k
        yield k, votes


def _classes_before(votes: Tensor, labels: Tensor) -> Tensor:
    """(b,) int64: number of classes that come before the label (b,): with more votes (b, C), or as many and a smaller
    number. A very large number if the label has no votes."""
    own = votes.gather(1, labels.unsqueeze(1))
    comes_first = torch.arange(votes.shape[1], device=votes.device) < labels.unsqueeze(1)
    before = ((votes > own) | (votes == own) & comes_first).sum(1)
    return before.masked_fill(own.squeeze(1) == 0, LAST_ID)
