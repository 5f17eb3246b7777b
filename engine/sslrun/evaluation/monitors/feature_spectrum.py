"""RankMe and spread of the features of training images while training."""

from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.evaluation.spectrum import rankme, spectrum


class FeatureSpectrum(Monitor):
    """How many directions the features of training images use, and how widely they spread.

    It measures `spectrum/rankme` and `spectrum/feature_std`, and needs neither labels nor held-out images.
    """

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        singular_values, feature_std = spectrum(snapshot.training.features_share, snapshot.training.device)
        return {"spectrum/rankme": rankme(singular_values), "spectrum/feature_std": feature_std}
