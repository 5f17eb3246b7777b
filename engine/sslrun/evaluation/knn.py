"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Per cent of queries whose label wins the vote of the k nearest bank rows, each with weight exp(cosine / T).

    Args:
        bank: (N, D) features; normalised here.
        bank_labels: (N,) int64.
        queries: (M, D) features.
        query_labels: (M,) int64.
        k: neighbours that vote; all of them where the bank has fewer.
        temperature: T of the weights.
        chunk: queries compared at once; bounds the memory to chunk x N.
    """
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    k = min(k, len(bank))
    correct = 0
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, neighbour = (rows @ bank.T).topk(k, dim=1)  # (m, k)
        # Shifted by the nearest neighbour's: the same winner, and no overflow at small temperatures.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), num_classes).scatter_add_(1, bank_labels[neighbour], weight)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100.0 * correct / len(queries)
