"""Has the network stopped telling pictures apart? Figures in, one plain sentence out."""

SPREAD_FLOOR = 0.1  # of an even spread over the sphere; healthy contrastive runs stay above 0.5


def collapse_warning(feature_std: float | None, loss: float, chance_loss: float | None, epoch: int) -> str | None:
    """A sentence for the log when the run looks collapsed, else None.

    Args:
        feature_std: spread of the normalised embeddings, 1 for an even spread, 0 when all are equal.
        loss: mean training loss of the last interval.
        chance_loss: loss of a network that cannot tell pictures apart (ln(K + 1) for a queue of K), if there is one.
        epoch: epochs done; untrained networks look collapsed, so nothing is judged before the first is over.
    """
    if epoch < 1:
        return None
    if feature_std is not None and feature_std < SPREAD_FLOOR:
        return (
            f"the run looks collapsed: embeddings of different pictures are almost equal (spread {feature_std:.3f}, "
            f"healthy above 0.5); try a lower learning rate, a longer warm-up or stronger augmentation"
        )
    if chance_loss is not None and loss >= chance_loss:
        return (
            f"the network does not tell pictures apart: loss {loss:.3f} is at or above that of guessing "
            f"({chance_loss:.3f} = ln of the number of candidates)"
        )
    return None
