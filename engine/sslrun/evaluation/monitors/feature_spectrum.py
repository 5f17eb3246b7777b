"""RankMe and standard deviation of training features during training."""

from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.evaluation.spectrum import rankme, spectrum


class FeatureSpectrum(Monitor):
    """Effective rank and standard deviation of training features: `spectrum/rankme`, `spectrum/feature_std`.

    It needs neither labels nor held-out images. RankMe: Garrido et al. 2023, arXiv 2210.02885.
    """

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        singular_values, feature_std = spectrum(snapshot.training.features_share, snapshot.training.device)
        return {"spectrum/rankme": rankme(singular_values), "spectrum/feature_std": feature_std}
