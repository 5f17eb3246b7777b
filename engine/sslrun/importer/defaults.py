"""Default arguments of the old frameworks' classes that differ from those of the classes here.

Read from the constructors of OpenSelfSup 0.3, MMSelfSup 0.5 and 0.11, MMSelfSup 1.0, and MMPretrain 1.2 (whose classes
`mmcls.X` of MMClassification 1.0 have the same defaults).
"""

from typing import Any

OPENSELFSUP, MMSELFSUP_0X, MMSELFSUP_1X, MMPRETRAIN = "OpenSelfSup", "MMSelfSup 0.x", "MMSelfSup 1.x", "MMPretrain"

_PACKAGES = {"mmpretrain": MMPRETRAIN, "mmcls": MMPRETRAIN, "openselfsup": OPENSELFSUP}

# Class -> old argument -> value; first what all of them have, then what is particular to one.
_OF_ALL: dict[str, dict[str, Any]] = {
    "BYOL": {"base_momentum": 0.996},
    "ClsHead": {"in_channels": 2048, "num_classes": 1000},
    "DenseCLHook": {"start_iters": 1000},
    "GaussianBlur": {"p": 0.5},
    "Kmeans": {"pca_dim": 256},
    "MoCoV3ViT": {"arch": "base", "stop_grad_conv1": False},
    "RandomAppliedTrans": {"p": 0.5},
    "RandomApply": {"prob": 0.5},
    "RandomFlip": {"prob": 0.5},
    "RandomGaussianBlur": {"prob": 0.5},
    "RandomHorizontalFlip": {"p": 0.5},
    "RandomSolarize": {"prob": 0.5},
    "ResNet_CIFAR": {"zero_init_residual": True},  # a class of MMPretrain, whoever names it
    "ResNeXt": {"groups": 32, "width_per_group": 4},
    "Solarization": {"p": 0.5},
    "Solarize": {"prob": 0.5},
    "VisionTransformer": {"arch": "base", "stop_grad_conv1": False},
}
_OF_1X: dict[str, dict[str, Any]] = {
    "GaussianBlur": {"prob": 0.5},
    "RandomGrayscale": {"prob": 0.5},
    "RandomResizedCrop": {"backend": "cv2"},
    "Resize": {"backend": "cv2"},
    "ResizeEdge": {"backend": "cv2"},
}
_PARTICULAR: dict[str, dict[str, dict[str, Any]]] = {
    OPENSELFSUP: {
        "GaussianBlur": {"p": 1.0},
        "NonLinearNeckSimCLR": {"sync_bn": True},
        "NonLinearNeckV0": {"sync_bn": False},
        "ResNeXt": {"groups": 1, "width_per_group": 4},
        "Solarization": {"p": 1.0},
    },
    MMSELFSUP_0X: {},
    MMSELFSUP_1X: _OF_1X,
    MMPRETRAIN: _OF_1X
    | {
        "BYOL": {"base_momentum": 0.004},
        "LinearNeck": {"norm_cfg": {"type": "BN1d"}},
        "ResNet": {"zero_init_residual": True},
        "ResNeXt": {"groups": 32, "width_per_group": 4, "zero_init_residual": True},
    },
}


def defaults(framework: str, name: str) -> dict[str, Any]:
    """The default arguments of an old class that differ from those of the class here."""
    return _PARTICULAR[framework].get(name) or _OF_ALL.get(name, {})


def framework_of(title: str, current: str) -> str:
    """The framework that the package of a `type` belongs to; `current` where the package does not say."""
    package = title.partition(".")[0] if "." in title else ""
    if package == "mmselfsup" and current == MMPRETRAIN:
        return MMSELFSUP_1X
    return _PACKAGES.get(package, current)


def framework(values: dict[str, Any], types: set[str]) -> str:
    """The framework that a config is written for: by what it names or, where it names none, by its form.

    Args:
        values: the plain config.
        types: every `type` in it, as written.
    """
    packages = {title.partition(".")[0] for title in types if "." in title}
    of_1x = {"train_dataloader", "optim_wrapper", "param_scheduler", "default_hooks"}
    is_1x = "train_dataloader" in values or ("data" not in values and not of_1x.isdisjoint(values))
    if values.get("default_scope") in ("mmpretrain", "mmcls") or "mmpretrain" in packages:
        return MMPRETRAIN
    if is_1x or values.get("default_scope") == "mmselfsup":
        is_plain = not any("SelfSup" in title for title in types - {"SelfSupDataPreprocessor"})
        return MMPRETRAIN if "PackInputs" in types and is_plain and "mmselfsup" not in packages else MMSELFSUP_1X
    data = values.get("data")
    is_oldest = isinstance(data, dict) and "imgs_per_gpu" in data
    return OPENSELFSUP if is_oldest or "total_epochs" in values or "openselfsup" in packages else MMSELFSUP_0X
