"""Judges whether a network has collapsed, and whether its loss is better than guessing."""

from collections.abc import Mapping
from typing import NamedTuple

SPREAD_FLOOR = 0.1  # standard deviation; 1 is an even spread over the sphere, healthy runs stay above EVEN_SPREAD
EVEN_SPREAD = 0.5
ONE_DIRECTION = 2.0  # RankMe; 1 if all features lie on one line through 0
FEW_DIRECTIONS_PCT = 10  # RankMe, in per cent of the largest possible one

# Of self-distillation over K prototypes; the loss in units of ln K.
ONE_PROTOTYPE_PCT = 90
LARGEST_CENTER = 2.0  # prototypes of length 1 have scores, and so a center, of at most 1
NO_LOSS, CHANCE = 0.01, 0.999

THRESHOLDS = (
    f"Collapsed: RankMe below {ONE_DIRECTION:g}, or a spread of the embeddings below {SPREAD_FLOOR}. Partly collapsed: "
    f"RankMe below {FEW_DIRECTIONS_PCT} % of the possible directions. "
    f"A spread of 1 is even, one below {EVEN_SPREAD} uneven."
)
"""The thresholds of `verdict` in words."""


def collapse_warning(feature_std: float | None, epoch: int) -> str | None:
    """A warning if the run has collapsed, else None.

    Args:
        feature_std: standard deviation of the normalized embeddings (`nn.feature_std`); 0 if all are equal.
        epoch: epochs done. An untrained network looks collapsed, so there is no warning before the first epoch ends.
    """
    if epoch < 1 or feature_std is None or feature_std >= SPREAD_FLOOR:
        return None
    return (
        f"the run looks collapsed: embeddings of different images are almost equal (spread {feature_std:.3f}, "
        f"healthy above {EVEN_SPREAD}); try a lower learning rate, a longer warm-up or stronger augmentation"
    )


def guessing_warning(loss: float, chance_loss: float | None, epoch: int) -> str | None:
    """A warning if the loss is no better than guessing, else None.

    Such a run is not stopped: with old features (a memory bank) or new clusters as targets, a network may stay at this
    loss for some epochs and still learn.

    Args:
        loss: mean training loss of the last interval.
        chance_loss: loss of a network that cannot tell images apart (ln(K + 1) for a queue of K); None if unknown.
        epoch: epochs done. There is no warning before the first epoch ends.
    """
    if epoch < 1 or chance_loss is None or loss < chance_loss:
        return None
    return (
        f"the network does not tell images apart yet: loss {loss:.3f} is at or above that of guessing "
        f"({chance_loss:.3f} = ln of the number of candidates)"
    )


def prototype_warning(metrics: Mapping[str, float], epoch: int) -> str | None:
    """A warning if a teacher's distributions over prototypes have collapsed (DINO and its successors), else None.

    Without centering one prototype takes all images; without sharpening all prototypes get the same share of each, and
    the loss is ln K (Caron et al. 2021, arXiv 2104.14294, section 5.3). The thresholds are our own.

    Args:
        metrics: of training, without "train/": `largest_prototype_pct`, `center_size`, and losses in units of ln K,
            whose names end with "loss_of_chance". A method without the first is not judged.
        epoch: epochs done. There is no warning before the first epoch ends.
    """
    share = metrics.get("largest_prototype_pct")
    if epoch < 1 or share is None:
        return None
    if share > ONE_PROTOTYPE_PCT:
        return (
            f"one prototype takes all: the teacher gives {share:.0f} % of the images the same one; try a higher "
            "teacher_temperature or a lower center_momentum"
        )
    if (center := metrics.get("center_size", 0.0)) > LARGEST_CENTER:
        return (
            f"the center runs away: its largest value is {center:.1f}, where prototypes of length 1 give at most 1; "
            "try learned_length = false, or a lower learning rate of the prototypes"
        )
    for name, ratio in metrics.items():
        term = {"loss_of_chance": "the loss", "class_loss_of_chance": "the loss of class tokens"}.get(
            name, "the loss of patches"
        )
        if name.endswith("loss_of_chance") and ratio < NO_LOSS:
            return f"{term} is near 0 ({ratio:.4f} of ln K): student and teacher agree on an answer that needs no image"
        if name.endswith("loss_of_chance") and ratio >= CHANCE:
            return (
                f"{term} is ln K: the teacher gives all prototypes the same share, or the student learns nothing from "
                "it; try a lower teacher_temperature, a lower learning rate or more steps with frozen prototypes"
            )
    return None


class Verdict(NamedTuple):
    """What the measurements say about collapse.

    Attributes:
        word: "collapsed", "partly collapsed", "not collapsed" or "cannot be judged".
        reason: the measurements behind it, as sentences.
    """

    word: str
    reason: str


def verdict(feature_std: float | None, rankme: float | None, most_directions: int | None) -> Verdict:
    """Whether a trained network has collapsed, in words.

    Complete collapse is one output for all images: the spread of the embeddings is then 0 and RankMe 1 (SimSiam, Chen &
    He 2021, arXiv 2011.10566, section 4.1). Dimensional collapse is the use of few directions: RankMe is then a small
    share of the possible ones (Jing et al. 2022, arXiv 2110.09348; RankMe: Garrido et al. 2023, arXiv 2210.02885). The
    papers name no thresholds; those here (`THRESHOLDS`) are our own.

    Args:
        feature_std: newest `train/feature_std`, the standard deviation of the normalized embeddings (1 if they are
            spread evenly over the sphere); None if it was not measured.
        rankme: newest RankMe of the backbone's features; None if it was not measured.
        most_directions: the largest possible RankMe, the smaller one of the numbers of features and of images; None if
            it is unknown.
    """
    if feature_std is None and rankme is None:
        return Verdict("cannot be judged", "Neither RankMe nor the spread of the embeddings was measured in training.")
    words, reasons = [], []
    if rankme is not None:
        of_all = "" if most_directions is None else f" of {most_directions:,} possible"
        if rankme < ONE_DIRECTION:
            words.append("collapsed")
            reasons.append(f"All images have almost the same features: RankMe is {rankme:.1f}{of_all}.")
        elif most_directions is None:
            reasons.append(f"The features use {rankme:.0f} directions (RankMe); how many are possible is not known.")
        elif 100 * rankme < FEW_DIRECTIONS_PCT * most_directions:
            words.append("partly collapsed")
            reasons.append(f"The features use few directions, {rankme:.1f}{of_all} (RankMe).")
        else:
            reasons.append(f"The features use {rankme:.0f}{of_all} directions (RankMe).")
    if feature_std is not None:
        if feature_std < SPREAD_FLOOR:
            words.append("collapsed")
            reasons.append(f"The embeddings of all images are almost equal (spread {feature_std:.2g}).")
        elif feature_std < EVEN_SPREAD:
            reasons.append(f"The embeddings are spread, but unevenly ({feature_std:.3g}).")
        else:
            reasons.append(f"The embeddings are spread over their sphere ({feature_std:.3g}).")
    if rankme is None:
        reasons.append("RankMe was not measured, so the features themselves are not judged.")
    if "collapsed" in words:
        return Verdict("collapsed", " ".join(reasons))
    return Verdict(words[0] if words else "not collapsed", " ".join(reasons))
