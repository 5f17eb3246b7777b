"""The recipes that are rehearsed: every method, and every feature of the engine that changes what a step does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A recipe to rehearse.

    Attributes:
        config: path of the recipe.
        settings: as with `--set`.
        ranks: number of processes that are played.
        groups: BatchNorm groups of all ranks in a step of the short form, which differs from the full one, the recipe's
            own global batch, only in how often things are repeated.
        late: places that read a value one step late, beside the executor's finite flag.
        float32: places that multiply matrices in float32, and why.
        on_host: places that compute on tensors in host memory, and why.
        fault: settings that plant a fault. The plan is made without them.
    """

    config: str
    settings: tuple[str, ...] = ()
    ranks: int = 1
    groups: int = 2
    late: tuple[str, ...] = ()
    float32: tuple[tuple[str, str], ...] = ()
    on_host: tuple[tuple[str, str], ...] = ()
    fault: tuple[str, ...] = ()


# Files are given by the end of their path.
FLAG = "runtime/executor.py"
VOTE = "runtime/distributed.py"

SHUFFLE = ("nn/momentum.py", "the shuffle is drawn on the host, equal on all ranks, and copied without a wait")
EXCHANGE = ("runtime/distributed.py", "which rows go to which rank: the host passes these counts to the collective")
NEGATIVES = ("nn/drawn_rows.py", "keys are drawn on the host, equal on all ranks, and copied without a wait")
MIXING = ("methods/supervised.py", "shares and boxes are drawn on the host by numpy, and copied without a wait")
ADDRESSES = ("sslkernels/lars_update.py", "a table of addresses, made on the host and copied without a wait")
SLICES = ("methods/lejepa.py", "directions are drawn on the host, equal on all ranks, and copied without a wait")
DROPPED = ("methods/msn.py", "the dropped patches are drawn on the host, equal on all ranks, and copied without a wait")
RATES = ("nn/dropout.py", "a rate for each branch, copied without a wait")

BACKWARD = ("(autograd)", "the backward pass of that product")
CORRELATION = (("nn/heads.py", "rounding C_ii to bfloat16 would dominate 1 - C_ii"), BACKWARD)
COVARIANCE = (("methods/vicreg.py", "squared covariances are small beside the variances"), BACKWARD)
NEIGHBORS = (("methods/nnclr.py", "rounded similarities would tie in the argmax"), BACKWARD)
NORMALITY = (("methods/lejepa.py", "projections are multiplied by up to 3 in a cosine"), BACKWARD)
SHARPENED = (("methods/msn.py", "scores are divided by 0.025 in the exponent"), BACKWARD)
PROTOTYPES = (
    ("methods/swav.py", "scores are divided by epsilon = 0.05 in the exponent of Sinkhorn's iteration"),
    BACKWARD,
)
SCORES = (
    ("nn/self_distillation.py", "scores are divided by 0.04 in the exponent"),
    ("sslkernels/prototype_cross_entropy.py", "and the student's by 0.1"),
    BACKWARD,
)
KOLEO = ("nn/koleo.py", "rounded cosines would tie in the argmax")
GRAM_MATRICES = ("nn/gram.py", "rounded cosines are squared after they are subtracted from each other")
QUEUE = (("methods/distillation.py", "similarities are divided by 0.07 in the exponent"), BACKWARD)
MATCHES = (("methods/densecl.py", "rounded similarities of cells would tie in the argmax"),)
NEAREST = (("nn/clustering.py", "rounded distances to centroids would tie in the argmin"),)

BETWEEN = (("methods/interclr.py", "rounded similarities would tie at the edge of the pool"), *NEAREST, BACKWARD)

ALL = (("", "the recipe asks for float32"),)

SELFSUP = "configs/selfsup"
MOCOV2 = f"{SELFSUP}/mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.toml"
VIT = f"{SELFSUP}/mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.toml"
GRAM = "dinov3_vit-large-p16_32xb64-mcrop-2-8-gram-constlr-40k_in1k-448-96"
FINETUNED = (
    'model={ _delete_ = true, type = "Supervised", num_classes = 1000, mixup = 0.8, cutmix = 1.0, drop_path = 0.1, '
    'label_smoothing = 0.1, backbone = { type = "VisionTransformer", arch = "small", img_size = 224 } }',
    "data.views=[{ num_views = 1, transforms = [{ type = 'RandomResizedCrop', size = 224 }, { type = 'Normalize' }] }]",
    "monitor.loss_interval=0",
)

CASES = {
    "mocov1": Case("configs/mocov1.toml", on_host=(SHUFFLE,)),
    "mocov2": Case(MOCOV2, on_host=(SHUFFLE,)),
    "mocov3": Case("configs/mocov3.toml", on_host=(ADDRESSES,)),
    "byol": Case("configs/byol.toml", on_host=(ADDRESSES,)),
    "simclr": Case("configs/simclr.toml", on_host=(ADDRESSES,)),
    "simsiam": Case("configs/simsiam.toml"),
    "barlowtwins": Case("configs/barlowtwins.toml", on_host=(ADDRESSES,), float32=CORRELATION),
    "vicreg": Case("configs/vicreg.toml", on_host=(ADDRESSES,), float32=COVARIANCE),
    "nnclr": Case("configs/nnclr.toml", on_host=(ADDRESSES,), float32=NEIGHBORS),
    "lejepa": Case("configs/lejepa.toml", on_host=(SLICES,), float32=NORMALITY),
    "swav": Case("configs/swav.toml", on_host=(ADDRESSES,), float32=PROTOTYPES),
    "dino": Case("configs/dino.toml", float32=SCORES),
    "ibot": Case("configs/ibot.toml", float32=SCORES),
    "dinov2": Case("configs/dinov2.toml", float32=(*SCORES, KOLEO)),
    "dinov3": Case(f"{SELFSUP}/dinov3/{GRAM}.toml", float32=(*SCORES, KOLEO, GRAM_MATRICES)),
    "distillation": Case("configs/distillation.toml", float32=QUEUE),
    "densecl": Case("configs/densecl.toml", on_host=(SHUFFLE,), float32=MATCHES),
    "npid": Case("configs/npid.toml", on_host=(NEGATIVES,)),
    "odc": Case("configs/odc.toml", float32=NEAREST, late=("nn/clustering.py",)),
    "deepcluster": Case("configs/deepcluster.toml"),
    "interclr": Case(
        "configs/interclr.toml", on_host=(SHUFFLE, NEGATIVES), float32=BETWEEN, late=("nn/clustering.py",)
    ),
    "mae": Case("configs/mae.toml"),
    "simmim": Case("configs/simmim.toml"),
    "maskfeat": Case("configs/maskfeat.toml"),
    "ijepa": Case("configs/ijepa.toml"),
    "msn": Case("configs/msn.toml", on_host=(DROPPED,), float32=SHARPENED),
    "relative_loc": Case("configs/relative_loc.toml"),
    "rotation_pred": Case("configs/rotation_pred.toml"),
    "supervised": Case(VIT, FINETUNED, on_host=(MIXING, RATES)),
    "accumulation": Case(MOCOV2, ("engine.micro_batch=32",), on_host=(SHUFFLE,)),
    "syncbn": Case(MOCOV2, ("model.backbone.norm_cfg.type=SyncBN",), on_host=(SHUFFLE,)),
    "vit": Case(VIT),
    "clipping": Case(MOCOV2, ("optimizer.grad_clip.max_norm=1.0",), on_host=(SHUFFLE,)),
    "float32": Case(MOCOV2, ("engine.precision=fp32",), on_host=(SHUFFLE,), float32=ALL),
    "mocov2 on 8 ranks": Case(MOCOV2, ranks=8, groups=8, on_host=(SHUFFLE, EXCHANGE)),
    "simclr on 8 ranks": Case("configs/simclr.toml", on_host=(ADDRESSES,), ranks=8, groups=8),
    "swav on 8 ranks": Case("configs/swav.toml", on_host=(ADDRESSES,), ranks=8, groups=8, float32=PROTOTYPES),
    "barlowtwins on 8 ranks": Case(
        "configs/barlowtwins.toml", on_host=(ADDRESSES,), ranks=8, groups=8, float32=CORRELATION
    ),
    "vicreg on 8 ranks": Case("configs/vicreg.toml", on_host=(ADDRESSES,), ranks=8, groups=8, float32=COVARIANCE),
    "nnclr on 8 ranks": Case("configs/nnclr.toml", on_host=(ADDRESSES,), ranks=8, groups=8, float32=NEIGHBORS),
    "lejepa on 8 ranks": Case("configs/lejepa.toml", on_host=(SLICES,), ranks=8, groups=8, float32=NORMALITY),
    "msn on 8 ranks": Case("configs/msn.toml", on_host=(DROPPED,), ranks=8, groups=8, float32=SHARPENED),
    "mocov3 on 8 ranks": Case("configs/mocov3.toml", on_host=(ADDRESSES,), ranks=8, groups=8),
    "npid on 8 ranks": Case("configs/npid.toml", ranks=8, groups=8, on_host=(NEGATIVES,)),
    "odc on 8 ranks": Case("configs/odc.toml", ranks=8, groups=8, float32=NEAREST, late=("nn/clustering.py",)),
    "deepcluster on 8 ranks": Case("configs/deepcluster.toml", ranks=8, groups=8),
}
# LARS: barlowtwins, byol, mocov3, nnclr, simclr, swav, vicreg. Multi-crop: swav, lejepa. SyncBN with its collectives:
# simclr and others on 8 ranks.
