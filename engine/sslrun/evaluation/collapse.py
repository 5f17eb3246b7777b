"""Warnings about a collapsed network and about a loss that is no better than guessing."""

SPREAD_FLOOR = 0.1  # standard deviation; 1 is an even spread over the sphere, healthy runs stay above 0.5


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
        f"healthy above 0.5); try a lower learning rate, a longer warm-up or stronger augmentation"
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
