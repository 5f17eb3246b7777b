"""Every metric: what it is, its unit, which way is good. `python -m sslrun.glossary` writes docs/metrics.md from it.

Names are those in the rows of metrics.jsonl and in the results of `sslrun eval`. A metric of a user's own is not here.
"""

from pathlib import Path
from typing import Literal, NamedTuple

Better = Literal["higher", "lower"]


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: key in a row, or in the results of an evaluation.
        unit: what it counts; "" for a number without one.
        better: which way is good; None where neither is.
        meaning: what it is, how it is computed, and whose formula that is.
    """

    name: str
    unit: str
    better: Better | None
    meaning: str


ROW = (
    Metric("step", "steps", None, "Optimizer steps that are done."),
    Metric("epoch", "epochs", None, "`step` in epochs; a fraction within an epoch."),
    Metric("wall_s", "s", None, "Time since the first start, without the pauses before resumes."),
)
TRAINING = (
    Metric("train/loss", "", "lower", "The method's loss, a mean over the steps since the last row."),
    Metric(
        "train/lr",
        "",
        None,
        "Learning rate at the row's last step, of parameters without a factor or rate of their own.",
    ),
    Metric(
        "train/grad_norm",
        "",
        None,
        "2-norm of the gradient of all parameters before clipping (`optimizer.grad_clip.norm_type` sets another), a "
        "mean over the steps.",
    ),
    Metric(
        "train/momentum",
        "",
        None,
        "Decay of the momentum encoder: the share of its weights that a step keeps.",
    ),
    Metric(
        "train/loss_of_chance",
        "",
        "lower",
        "`train/loss` divided by the loss of an answer that knows nothing, such as log(1 + queue_len) of MoCo. Near 1, "
        "the network guesses. For methods whose loss has such a value.",
    ),
    Metric(
        "train/feature_std",
        "",
        "higher",
        "Standard deviation of the embeddings, scaled to length 1, over the global batch, times sqrt(D): 1 if they are "
        "spread evenly over the sphere, 0 if all are equal (Chen & He 2021, figure 2).",
    ),
    Metric(
        "train/top1_pct",
        "%",
        "higher",
        "How often the right answer of the method's own task has the highest score: the image's other view among the "
        "negatives (MoCo, DenseCL), the image itself among all (NPID), the pseudo-label (DeepCluster, ODC), the "
        "rotation, the place of the patch, or the class (Supervised).",
    ),
    Metric("train/global_loss", "", "lower", "DenseCL: the loss of whole images, as MoCo's."),
    Metric("train/dense_loss", "", "lower", "DenseCL: the loss of positions (Wang et al. 2021, equation 2)."),
    Metric("train/dense_top1_pct", "%", "higher", "DenseCL: as `train/top1_pct`, of positions."),
    Metric(
        "train/largest_prototype_pct",
        "%",
        "lower",
        "DINO, iBOT, DINOv2, DINOv3: share of the teacher's targets whose largest entry is at one and the same "
        "prototype, the one that has most. At 100 the teacher has one answer for all images.",
    ),
    Metric(
        "train/center_size",
        "",
        None,
        "The same, centered by a moving average: the largest absolute value in the center. With prototypes of length 1 "
        "it is below 1; it runs away if learned lengths grow without bound.",
    ),
    Metric(
        "train/class_loss_of_chance",
        "",
        "lower",
        "iBOT, DINOv2, DINOv3: the loss of class tokens divided by ln of the number of prototypes. Near 1 the network "
        "guesses.",
    ),
    Metric("train/patch_loss_of_chance", "", "lower", "The same of masked patches, a mean over crops that have some."),
    Metric(
        "train/koleo_loss",
        "",
        "lower",
        "DINOv2, DINOv3: KoLeo before its weight, summed over the large crops.",
    ),
    Metric("train/gram_loss", "", "lower", "DINOv3: Gram anchoring before its weight, a mean over pairs of patches."),
    Metric("train/inter_loss", "", "lower", "InterCLR: the loss between images, before its weight."),
    Metric("train/inter_top1_pct", "%", "higher", "InterCLR: as `train/top1_pct`, of images of one cluster."),
    Metric("train/clusters_in_use", "clusters", "higher", "DeepCluster: clusters that have images."),
    Metric("train/labels_changed_pct", "%", None, "ODC, InterCLR: share of pseudo-labels that a step has changed."),
    Metric("train/smallest_cluster", "images", "higher", "ODC, InterCLR: images in the smallest cluster."),
    Metric("train/largest_cluster", "images", "lower", "ODC, InterCLR: images in the largest cluster."),
)
MACHINE = (
    Metric(
        "speed/images_per_s",
        "images/s",
        "higher",
        "Training images per second over all ranks, without measurements and checkpoints; an image counts once, "
        "whatever its number of views.",
    ),
    Metric("data/wait_pct", "%", "lower", "Share of the training time in which rank 0 waits for a batch."),
    Metric(
        "mem/peak_gib",
        "GiB",
        "lower",
        "Largest memory so far: allocated by torch on rank 0's GPU, or resident of rank 0's process on the CPU.",
    ),
    Metric("compile/graphs", "graphs", "lower", "Graphs that torch.compile has made so far. With compilation only."),
    Metric("compile/total_s", "s", "lower", "Time that torch.compile has taken so far. With compilation only."),
)
MONITORS = (
    Metric(
        "knn/top1_pct",
        "%",
        "higher",
        "Held-out images whose class the nearest training images vote for: weights exp(cosine / temperature) of the k "
        "nearest (Wu et al. 2018). Of `sslrun eval knn`, the test images, with the best k.",
    ),
    Metric(
        "probe/top1_pct",
        "%",
        "higher",
        "Held-out images whose class a logistic regression on training features finds; it is fitted anew each time.",
    ),
    Metric("probe/loss", "nats", "lower", "Cross-entropy of that regression on the held-out images."),
    Metric(
        "spectrum/rankme",
        "directions",
        "higher",
        "Directions that features use: exp of the entropy of their singular values, divided by the sum (Garrido et al. "
        "2023); 1 to D.",
    ),
    Metric("spectrum/feature_std", "", "higher", "As `train/feature_std`, of the backbone's features."),
    Metric(
        "val/loss",
        "",
        "lower",
        "The method's loss on held-out images, in training mode. `val/...` of the other metrics of `train/` likewise.",
    ),
    Metric("test/top1_pct", "%", "higher", "Supervised: held-out images whose class has the highest score."),
    Metric("test/top5_pct", "%", "higher", "The same, among the five highest; with more than five classes."),
)
EVALUATIONS = (
    Metric("k", "neighbors", None, "`eval knn`: the number of neighbors of the result."),
    Metric("linear/top1_pct", "%", "higher", "Test images that a linear classifier on frozen features has right."),
    Metric("linear/top5_pct", "%", "higher", "The same, among the five highest; with more than five classes."),
    Metric(
        "finetune/top1_pct", "%", "higher", "Test images that encoder and classifier, trained together, have right."
    ),
    Metric("finetune/top5_pct", "%", "higher", "The same, among the five highest; with more than five classes."),
    Metric("num_samples", "images", None, "`eval spectrum`: the number of images."),
    Metric(
        "spectrum/alignment",
        "",
        "lower",
        "Mean squared distance of two views of an image, features of length 1 (Wang & Isola 2020).",
    ),
    Metric(
        "spectrum/uniformity",
        "",
        "lower",
        "Log of the mean of exp(-2 squared distance) over all pairs of images, features of length 1 (the same).",
    ),
)
PARTS = {
    "In every row": ROW,
    "Training": TRAINING,
    "Speed and memory": MACHINE,
    "Monitors": MONITORS,
    "Evaluations": EVALUATIONS,
}
METRICS = {metric.name: metric for metrics in PARTS.values() for metric in metrics}

_LOWER = ("loss", "error", "wait", "_s", "_ms", "_gib")  # in the names of metrics that are not here


def better(name: str) -> Better:
    """Which way of a metric is good, by the glossary, else by its name; "higher" where neither says."""
    known = _known(name)
    if known is not None:
        return known.better or "higher"
    last = name.rpartition("/")[2]
    return "lower" if any(word in last if word.isalpha() else last.endswith(word) for word in _LOWER) else "higher"


def meaning(name: str) -> str | None:
    """What a metric is, as plain text; None if it is not in the glossary."""
    known = _known(name)
    return None if known is None else known.meaning.replace("`", "")


def _known(name: str) -> Metric | None:
    """The metric, or for one of held-out images the same of training."""
    return METRICS.get(name) or METRICS.get(name.replace("val/", "train/", 1) if name.startswith("val/") else name)


def page() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run writes to `metrics.jsonl`, and every number in the results of `sslrun eval`",
        "(`eval/*.json`). Their tables, such as the grid of `eval linear`, are described in",
        "[evaluation.md](evaluation.md). A metric of your own ([add-a-metric.md](add-a-metric.md)) has the name that",
        "you give it; for `sslrun runs --sort` and `--best` it is better when higher, unless its name has `loss`,",
        "`error` or `wait` in it or ends with `_s`, `_ms` or `_gib`.",
        "",
        "This page is generated from `engine/sslrun/glossary.py` by `python -m sslrun.glossary`.",
    ]
    for title, metrics in PARTS.items():
        lines += ["", f"## {title}", "", "| metric | unit | better | meaning |", "|---|---|---|---|"]
        lines += [f"| `{each.name}` | {each.unit} | {each.better or ''} | {each.meaning} |" for each in metrics]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).parents[2].joinpath("docs/metrics.md").write_text(page(), encoding="utf-8")
