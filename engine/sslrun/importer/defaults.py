"""Default arguments of the old frameworks' classes that differ from those of the classes here.

Read from the constructors of OpenSelfSup 0.3, MMSelfSup 0.5 and 0.11, MMSelfSup 1.0, and MMPretrain 1.2 (whose classes
`mmcls.X` of MMClassification 1.0 have the same defaults).
"""

from typing import Any

OPENSELFSUP, MMSELFSUP_0X, MMSELFSUP_1X, MMPRETRAIN = "OpenSelfSup", "MMSelfSup 0.x", "MMSelfSup 1.x", "MMPretrain"
OF_1X = (MMSELFSUP_1X, MMPRETRAIN)

_PACKAGES = {"mmpretrain": MMPRETRAIN, "mmcls": MMPRETRAIN, "openselfsup": OPENSELFSUP}

# Frameworks, classes, and their arguments; a later row replaces an earlier one.
_ALL = (OPENSELFSUP, MMSELFSUP_0X, MMSELFSUP_1X, MMPRETRAIN)
_ROWS: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
    (_ALL, "BYOL", {"base_momentum": 0.996}),
    (_ALL, "ClsHead", {"in_channels": 2048, "num_classes": 1000}),
    (_ALL, "DenseCLHook", {"start_iters": 1000}),
    (_ALL, "Kmeans", {"pca_dim": 256}),
    (_ALL, "MoCoV3ViT VisionTransformer", {"arch": "base", "stop_grad_conv1": False}),
    (_ALL, "MAEViT MaskFeatViT", {"arch": "b", "patch_size": 16, "img_size": 224}),
    (_ALL, "MAEPretrainDecoder", {"embed_dim": 1024, "patch_size": 16}),
    (_ALL, "ResNeXt", {"groups": 32, "width_per_group": 4}),
    (_ALL, "ResNet_CIFAR", {"zero_init_residual": True}),  # a class of MMPretrain, whoever names it
    (_ALL, "GaussianBlur RandomAppliedTrans RandomHorizontalFlip Solarization", {"p": 0.5}),
    (_ALL, "RandomApply RandomFlip RandomGaussianBlur RandomSolarize Solarize", {"prob": 0.5}),
    (OF_1X, "GaussianBlur RandomGrayscale", {"prob": 0.5}),
    (OF_1X, "RandomResizedCrop Resize ResizeEdge", {"backend": "cv2"}),
    ((OPENSELFSUP,), "GaussianBlur Solarization", {"p": 1.0}),
    ((OPENSELFSUP,), "NonLinearNeckSimCLR", {"sync_bn": True}),
    ((OPENSELFSUP,), "NonLinearNeckV0", {"sync_bn": False}),
    ((OPENSELFSUP,), "ResNeXt", {"groups": 1, "width_per_group": 4}),
    ((MMPRETRAIN,), "BYOL", {"base_momentum": 0.004}),
    ((MMPRETRAIN,), "LinearNeck", {"norm_cfg": {"type": "BN1d"}}),
    ((MMPRETRAIN,), "ResNet", {"zero_init_residual": True}),
    ((MMPRETRAIN,), "ResNeXt", {"groups": 32, "width_per_group": 4, "zero_init_residual": True}),
]
DEFAULTS = {(name, old): values for frameworks, names, values in _ROWS for name in frameworks for old in names.split()}


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
