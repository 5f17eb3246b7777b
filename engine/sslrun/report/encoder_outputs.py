"""Outputs of a trained encoder: the features, neighbors, predictions and attention that a report shows."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.pictures import as_rgb
from sslrun.data.sources import Source
from sslrun.data.transforms import CenterCrop, Resize, Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation.features import evenly, pooled, require_finite
from sslrun.evaluation.frozen_encoder import FrozenEncoder
from sslrun.evaluation.frozen_encoder import labels as labels_of
from sslrun.evaluation.knn import knn_predict, nearest
from sslrun.measure import frozen_encoder
from sslrun.nn.vit import Attention, VisionTransformer
from sslrun.plan import device_of
from sslrun.runtime import checkpoint
from sslrun.saved import PREFIX, Saved, open_saved
from sslrun.session import build

logger = logging.getLogger("sslrun")

MOST_QUERIES, MOST_BANK = 1000, 5000  # images: seconds on a CPU if they are small, a minute on a GPU if large
MOST_CLASSES, SOME_CLASSES = 20, 10  # a data set of more than 20 classes is shown by 10 of them
NEIGHBORS = 5
ANY_DEVICE = "engine.device=auto"  # a run that was trained on a GPU can be reported on a machine without one


@dataclass(frozen=True)
class EncoderOutputs:
    """An encoder's outputs for some images (the queries), compared with those for training images (the bank).

    Attributes:
        saved: the saved encoder and its recipe.
        encoder: the encoder on its device, with its images.
        source: data source of the queries.
        queries: (M,) int64, sample ids of the queries.
        bank: (N,) int64, sample ids of the bank in `encoder.train`.
        features: (M, D) float32, features of the queries, of unit length.
        similarity: (M, k) cosine similarities of each query's nearest bank images, descending.
        neighbors: (M, k) int64, indices of these images in the bank.
        before: the neighbors before training; None if there is no such network.
        before_note: why there is none, or what it is.
        classes: (C,) int64, the labels that are shown, ascending; None if there are no labels.
        num_classes: number of classes in the data, shown or not.
        labels: (M,) int64, the queries' classes as indices into `classes`; None if there are no labels.
        bank_labels: (N,) int64, the bank's classes as indices into `classes`; None if there are no labels.
        predicted: (M,) int64, the k-NN's predictions as indices into `classes`; None if there are no labels.
    """

    saved: Saved
    encoder: FrozenEncoder
    source: Source
    queries: np.ndarray
    bank: np.ndarray
    features: Tensor
    similarity: np.ndarray
    neighbors: np.ndarray
    before: np.ndarray | None
    before_note: str
    classes: np.ndarray | None
    num_classes: int
    labels: np.ndarray | None
    bank_labels: np.ndarray | None
    predicted: np.ndarray | None

    @property
    def is_held_out(self) -> bool:
        """Whether the queries are images that the encoder was not trained on."""
        return self.source is not self.encoder.train

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that are shown; empty if there are no labels."""
        if self.classes is None:
            return []
        names = self.encoder.train.class_names or self.source.class_names
        return [names[label] if names and label < len(names) else f"class {label}" for label in self.classes]


def run_encoder(path: Path) -> EncoderOutputs:
    """Open a run's encoder and compute its outputs.

    Args:
        path: a run folder, or a checkpoint in one.

    Raises:
        UsageError: there is no checkpoint, or there are no images.
    """
    saved = open_saved(path, overrides=[ANY_DEVICE])
    encoder = frozen_encoder(saved, device_of(saved.recipe, 0))
    train, source = encoder.train, encoder.test or encoder.train
    classes, num_classes = _shown_classes(train, source)
    if source is train:
        ids = _spread(_ids(train, classes), MOST_QUERIES + MOST_BANK)
        queries = _spread(ids, min(MOST_QUERIES, len(ids) // 2))
        bank = np.setdiff1d(ids, queries)
    else:
        queries = _spread(_ids(source, classes), MOST_QUERIES)
        bank = _spread(_ids(train, classes), MOST_BANK)
    if min(len(queries), len(bank)) == 0:
        raise UsageError(f"{train!r} has too few images to compare")
    logger.info("%s: features of %d images", saved.name, len(queries) + len(bank))
    initial, before_note = _initial_backbone(saved)
    features, features_before = _features(encoder, initial, source, queries)
    others, others_before = _features(encoder, initial, train, bank)
    neighbors, similarity = nearest(others, features, NEIGHBORS)
    before = None
    if features_before is not None and others_before is not None:
        before = nearest(others_before, features_before, NEIGHBORS)[0].numpy()
    labels = bank_labels = predicted = None
    if classes is not None:
        monitor = saved.recipe.monitor
        vote: dict[str, Any] = {"k": monitor.knn_k, "temperature": monitor.knn_temperature}
        labels = np.asarray(np.searchsorted(classes, labels_of(source).numpy()[queries]))
        bank_labels = np.asarray(np.searchsorted(classes, labels_of(train).numpy()[bank]))
        predicted = knn_predict(others, torch.from_numpy(bank_labels), features, **vote).numpy()
    return EncoderOutputs(
        saved,
        encoder,
        source,
        queries,
        bank,
        F.normalize(features, dim=1),
        similarity.numpy(),
        neighbors.numpy(),
        before,
        before_note,
        classes,
        num_classes,
        labels,
        bank_labels,
        predicted,
    )


class _Both(nn.Module):
    """The features of two networks side by side, (B, D + D'), so that each image is decoded once."""

    def __init__(self, first: nn.Module, second: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.first, self.second, self.bf16 = first, second, bf16

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([pooled(each, images, self.bf16) for each in (self.first, self.second)], dim=1)


def _features(
    encoder: FrozenEncoder, initial: Backbone | None, source: Source, ids: np.ndarray
) -> tuple[Tensor, Tensor | None]:
    """(N, D) features of some images, by the trained and by the initial network (None without one)."""
    module = encoder.backbone if initial is None else _Both(encoder.backbone, initial.to(encoder.device), encoder.bf16)
    features = encoder.extractor(source).extract(module, ids)
    width = features.shape[1] // (1 if initial is None else 2)
    require_finite(features[:, :width])
    return features[:, :width], None if initial is None else features[:, width:]


def _initial_backbone(saved: Saved) -> tuple[Backbone | None, str]:
    """The run's network before its first step, and what it is; None, and why, if it cannot be made again.

    Initial weights are a function of the seed, see `session.build`.
    """
    recipe = build(saved.config)
    backbone, origin = recipe.model.backbone.eval(), recipe.load_from
    if saved.folder is None:
        return None, "a file of weights does not say how its training began"
    if not origin:
        return backbone, "with its random initial weights"
    try:
        weights = checkpoint.load_weights(Path(origin))
        own = {name.removeprefix(PREFIX): each for name, each in weights.items() if name.startswith(PREFIX)}
        backbone.load_state_dict(own)
    except (UsageError, RunFailed, OSError, RuntimeError):
        return None, f"its weights came from {origin}, which cannot be read now or had to be adapted"
    return backbone, f"with the weights of {origin}"


def examples(outputs: EncoderOutputs, count: int) -> np.ndarray:
    """Indices of some queries, chosen regardless of the outputs: the first of each class, or evenly spaced."""
    if outputs.labels is None:
        return _spread(np.arange(len(outputs.queries)), count)
    _, first = np.unique(outputs.labels, return_index=True)
    return _spread(first, count)


def pixels(outputs: EncoderOutputs, source: Source, ids: np.ndarray, side: int) -> np.ndarray:
    """(n, side, side, 3) uint8, the center square of each image."""
    return as_rgb(prepared(outputs, source, ids, [Resize(side), CenterCrop(side)]).numpy())


def clusters(features: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means clusters of unit features, largest first.

    Args:
        features: (M, D).
        count: number of clusters, at most M.

    Returns:
        (M,) number of each image's cluster, and (M,) its distance from the cluster's center.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = features.double().numpy()
    with threadpool_limits(1):  # as for t-SNE
        model = KMeans(count, n_init=4, random_state=0).fit(rows)
    found, sizes = np.unique(model.labels_, return_counts=True)  # fewer than `count` if images are equal
    order = found[np.argsort(-sizes, kind="stable")]
    numbers = np.empty(count, dtype=np.int64)
    numbers[order] = np.arange(len(order))
    return numbers[model.labels_], np.linalg.norm(rows - model.cluster_centers_[model.labels_], axis=1)


def maps(features: Tensor) -> tuple[np.ndarray, float, np.ndarray]:
    """(M, 2) first two principal components, their share of the variance, and (M, 2) t-SNE coordinates."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = features.double().numpy()
    with threadpool_limits(1):  # with several threads the order of sums varies, and with it t-SNE's map
        components = PCA(min(50, *rows.shape), svd_solver="full").fit(rows)
        reduced = components.transform(rows)
        perplexity = min(30.0, (len(rows) - 1) / 3)
        nearby = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    return reduced[:, :2], float(components.explained_variance_ratio_[:2].sum()), nearby


@torch.no_grad()
def attention(outputs: EncoderOutputs, places: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Attention of the last block's class token.

    Args:
        outputs: outputs of the encoder.
        places: (n,) indices of queries.

    Returns:
        (n, S, S, 3) uint8 images as the network gets them, and (n, heads, G, G) attention weights of the patches, which
        sum to 1 together with the class token's own; None if the encoder is not a vision transformer.
    """
    backbone = outputs.encoder.backbone
    if not isinstance(backbone, VisionTransformer):
        return None
    images, normalized = _inputs(outputs, places)
    return images, class_attention(backbone, normalized).cpu().numpy()


@torch.no_grad()
def patch_features(outputs: EncoderOutputs, places: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Outputs of the patches, after the last norm.

    Args:
        outputs: outputs of the encoder.
        places: (n,) indices of queries.

    Returns:
        (n, S, S, 3) uint8 images as the network gets them, and (n, G, G, D) features; None if the encoder is not a
        vision transformer.
    """
    backbone = outputs.encoder.backbone
    if not isinstance(backbone, VisionTransformer):
        return None
    images, normalized = _inputs(outputs, places)
    tokens: list[Tensor] = []
    hook = backbone.norm.register_forward_hook(lambda module, arguments, output: tokens.append(output))
    try:
        backbone(normalized)
    finally:
        hook.remove()
    rows, columns = (side // backbone.patch_size for side in normalized.shape[-2:])
    return images, tokens[0][:, -rows * columns :].unflatten(1, (rows, columns)).float().cpu().numpy()


def _inputs(outputs: EncoderOutputs, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """(n, S, S, 3) uint8 images as the network gets them, and (n, C, S, S), the same normalized, on its device."""
    encoder = outputs.encoder
    group = ViewGroup(num_views=1, transforms=encoder.transforms)
    images = prepared(outputs, outputs.source, outputs.queries[places], encoder.transforms)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (group.normalize.mean, group.normalize.std))
    normalized = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    return as_rgb(images.numpy()), normalized.to(encoder.device)


@torch.no_grad()
def class_attention(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """(B, heads, G, G) attention weights of the last block's class token, for (B, 3, H, W) images.

    The model computes attention in one fused call that does not return the weights, so they are computed again from the
    input of that call.
    """
    block: Any = backbone.blocks[-1]
    attend: Attention = block.attn
    inputs: list[tuple[Any, ...]] = []
    hook = attend.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    try:
        backbone(images)
    finally:
        hook.remove()
    query, key, _ = attend.heads_of(*inputs[0])
    scores = (query[:, :, :1] @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    rows, columns = (side // backbone.patch_size for side in images.shape[-2:])
    return scores.softmax(dim=-1)[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).float()


def prepared(outputs: EncoderOutputs, source: Source, ids: np.ndarray, transforms: list[Transform]) -> Tensor:
    """(n, H, W, C) uint8, images of a source after transforms."""
    group = ViewGroup(num_views=1, transforms=transforms).for_channels(source.channels)
    loader = Loader(
        source,
        [group],
        sampler=Sequential(len(source)),
        seed=0,
        batch_size=max(1, len(ids)),
        augment=outputs.encoder.augment,
        num_threads=outputs.encoder.num_threads,
    )
    with contextlib.closing(loader.run([(0, ids)])) as stream:
        batch: Batch = next(stream)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (group.normalize.mean, group.normalize.std))
    return ((batch.views[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _shown_classes(train: Source, source: Source) -> tuple[np.ndarray | None, int]:
    """The labels to show, and the number of all labels; None and 0 if a source has no labels."""
    if train.labels is None or source.labels is None:
        return None, 0
    labels = np.union1d(train.labels, source.labels)
    return labels if len(labels) <= MOST_CLASSES else _spread(labels, SOME_CLASSES), len(labels)


def _ids(source: Source, classes: np.ndarray | None) -> np.ndarray:
    """Ids of the samples in some classes; None for all samples."""
    if classes is None or source.labels is None:
        return np.arange(len(source))
    return np.flatnonzero(np.isin(source.labels, classes))


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the values, evenly spaced."""
    return values[evenly(len(values), most)]
