"""What is said of the keys of an old config that no conversion takes: data, by the class or the place of their table.

A note says why a key was not converted, or left out since nothing depends on it here. A key whose value is the one that
holds here anyway needs no word. What has no note at all is reported as "nothing like it here".
"""

from typing import Any, NamedTuple


class Note(NamedTuple):
    """What is said of a key.

    Attributes:
        why: the reason; empty for the general one.
        usual: the value that holds here anyway; a tuple of several, which may be classes.
        is_left: whether nothing depends on the key here, whatever its value.
        is_silent: whether no word is needed, whatever its value.
    """

    why: str = ""
    usual: Any = None
    is_left: bool = False
    is_silent: bool = False


Notes = dict[str, Note]


def _left(why: str, names: str) -> Notes:
    return {name: Note(why, is_left=True) for name in names.split()}


def _lost(why: str, names: str) -> Notes:
    return {name: Note(why) for name in names.split()}


def _usual(why: str, **values: Any) -> Notes:
    return {name: Note(why, usual=value) for name, value in values.items()}


def _silent(names: str) -> Notes:
    return {name: Note(is_silent=True) for name in names.split()}


_THREADS = "images are decoded by threads, data.workers_per_gpu of them"
_MONITOR = "[monitor] measures beside training, on data.holdout"
_PRECISION = "engine.precision is bf16 where a device has it, and that needs no scaling of the loss"
_LOADER = "the loader decides it: threads of its own that live as long as the run"
_ONCE = "every epoch sees every sample once here, as in the paper"
_SIZE = "a turned image keeps its size, with black corners"
_TOKEN = "the class token after the last block is the feature here"
_RULES = "layer-wise rates and the like are [[optimizer.paramwise]], rule by rule"
_KINDS = '[[optimizer.paramwise]] with kind = ["norm"] or ["bias"] says it here'
_NO_HOOK = "there is no such hook here"
_WEIGHTS = "first weights are those that our class draws; load_from takes those of a checkpoint"

_OPTIONS = (
    _lost(_RULES, "constructor")
    | _left(_PRECISION, "loss_scale dtype use_fp16")
    | _left("gradients are summed over ranks by the engine", "coalesce bucket_size_mb distributed")
)
_HOOKS = (
    "OptimizerHook", "Fp16OptimizerHook", "DistOptimizerHook", "GradAccumFp16OptimizerHook",
    "GradientCumulativeOptimizerHook", "GradientCumulativeFp16OptimizerHook",
)  # fmt: skip
_CLIPPING = _usual("gradients are clipped by their norm here", type=("norm",)) | _usual(
    "engine.max_skipped_steps says what non-finite gradients do", error_if_nonfinite=False
)
_LENGTH = _left("a run trains, and [monitor] measures beside it", "val_interval val_begin dynamic_intervals")
_CHECKPOINTS = (
    _usual(_NO_HOOK, type=("CheckpointHook",))
    | _left("checkpoints stand in the run folder", "out_dir filename_tmpl file_client_args backend_args")
    | _left(
        "a checkpoint holds all that a run needs to go on",
        "save_optimizer save_param_scheduler create_symlink save_last sync_buffer",
    )
)
_LOG = (
    _usual(_NO_HOOK, type=("LoggerHook",))
    | _left("every row is a mean over its interval", "ignore_last interval_exp_name")
    | _left("logs stand in the run folder", "out_dir keep_local log_metric_by_epoch file_client_args")
)
_END = _usual("the momentum ends at 1 here", end_momentum=1)
_DISK = _usual("images are files here", backend=("disk", "local"), type=("HardDiskBackend", "LocalBackend"))
_NORMALIZED = (
    _usual("images are RGB here", bgr_to_rgb=True, to_rgb=True)
    | _left("batches are made by the loader", "non_blocking pad_size_divisor pad_value")
    | _usual(
        "images are normalized here, and no more",
        type=("SelfSupDataPreprocessor", "RelativeLocDataPreprocessor", "RotationPredDataPreprocessor"),
    )
)
_CROP = (
    _usual("images are not padded here", padding=0)
    | _usual("images that are too small get a black border", pad_if_needed=False)
    | _silent("backend")
)
_RESAMPLED = _left("images are always filtered before they shrink", "antialias")
_FLIP = _usual("images are only flipped left to right", direction="horizontal")
_RESNET = (
    _usual("our ResNet has no such variant", deep_stem=False, avg_down=False)
    | _usual("the stages are those of the paper here", num_stages=4, strides=[1, 2, 2, 2], dilations=[1, 1, 1, 1])
    | _usual("the stride is in the 3x3 convolution here", style="pytorch")
    | _usual("our ResNet drops no paths", drop_path_rate=0)
    | _left("it only trades memory for time; memory is engine.micro_batch here", "with_cp")
)
_VIT = (
    _usual("our VisionTransformer has nothing like it", frozen_stages=-1, norm_eval=False, drop_rate=0)
    | _usual("our VisionTransformer has nothing like it", drop_path_rate=0, layer_scale_init_value=0)
    | _usual("our VisionTransformer has nothing like it", qkv_bias=True, final_norm=True, pre_norm=False)
    | _usual(_TOKEN, out_indices=-1, out_type="cls_token", with_cls_token=True, output_cls_token=True)
)
# Class or place -> key -> note. Places are the last part of a table's key; "" is the whole config.
NOTES: dict[str, Notes] = {
    "": (
        _left("machines are [engine]'s business, ranks the launcher's", "dist_params env_cfg launcher gpus device")
        | _left("machines are [engine]'s business, ranks the launcher's", "local_rank cudnn_benchmark")
        | _left(_THREADS, "opencv_num_threads mp_start_method")
        | _left(_MONITOR, "val_dataloader test_dataloader val_evaluator test_evaluator val_cfg test_cfg evaluation")
        | _left("loader threads live as long as the run", "persistent_workers")
        | _left("images are decoded and normalized ahead of the step anyway", "prefetch")
        | _left("a method uses all of its parameters, or says which it does not", "find_unused_parameters")
        | _left(_PRECISION, "fp16")
        | _left("there is one set of names here", "default_scope")
        | _left("every row of metrics.jsonl is a mean over its interval", "log_processor")
        | _left("--resume goes on from a run's newest checkpoint", "auto_resume")
        | _lost("the optimizer's momentum follows no schedule here", "momentum_config")
        | _usual("a run trains, and monitor.loss_interval measures the loss on data.holdout", workflow=[["train", 1]])
    ),
    # Training.
    "optim_wrapper": _OPTIONS
    | _usual("there is nothing like it here", type=("OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper")),
    "optimizer_config": _OPTIONS | _usual("there is nothing like it here", type=_HOOKS),
    "optimizers": _usual("", dampening=0, amsgrad=False, maximize=False, foreach=None, nesterov=False)
    | _lost(_RULES, "constructor"),
    "grad_clip": _CLIPPING,
    "clip_grad": _CLIPPING,
    "paramwise_cfg": _usual("every parameter has one name here", bypass_duplicate=False)
    | _lost(_KINDS, "norm_decay_mult bias_decay_mult bias_lr_mult"),
    "param_scheduler": _left("it is only written to the log", "verbose")
    | _usual("a warm-up ends at the rate itself", end_factor=1),
    "runner": _LENGTH,
    "train_cfg": _LENGTH,
    "auto_scale_lr": _usual("a learning rate belongs to a batch here: nothing scales it", enable=False)
    | _silent("base_batch_size"),
    "randomness": _left("a run follows from its seed alone, on any number of ranks", "deterministic diff_rank_seed"),
    "checkpoint": _CHECKPOINTS,
    "checkpoint_config": _CHECKPOINTS,
    "logger": _LOG,
    "log_config": _LOG,
    "visualizer": _silent("type name"),
    # Data.
    "data": _left("[monitor] measures on data.holdout", "val test val_dataloader test_dataloader")
    | _left(_LOADER, "persistent_workers pin_memory prefetch_factor dist shuffle")
    | _usual(_ONCE, replace=False, sampling_replace=False),
    "train_dataloader": _left(_LOADER, "persistent_workers pin_memory prefetch_factor"),
    "collate_fn": _usual("batches are made as always", type=("default_collate", "pseudo_collate")),
    "sampler": _usual("there is no such order here", type=("DefaultSampler", "DeepClusterSampler", "InfiniteSampler"))
    | _usual("the order of an epoch is random", shuffle=True)
    | _usual(_ONCE, replace=False)
    | _left("batches are filled by data.drop_last = false", "round_up"),
    "sources": _usual("images are read in color", color_type="color")
    | _usual("images are RGB here", channel_order="rgb")
    | _usual("training takes the training images", test_mode=False)
    | _left("labels are not read for training", "metainfo classes with_label return_label")
    | _left("images are read from the disk", "memcached mclient_path"),
    "file_client_args": _DISK,
    "backend_args": _DISK,
    "data_preprocessor": _NORMALIZED,
    "img_norm_cfg": _NORMALIZED,
    # Transforms.
    "implied": _usual("images are read in color", color_type="color")
    | _left("images are decoded by DALI", "imdecode_backend to_float32 ignore_empty")
    | _silent("keys meta_keys algorithm_keys pseudo_label_keys"),
    "RandomResizedCrop": _RESAMPLED
    | _usual("ten boxes are tried here", max_attempts=10)
    | _usual("our RandomResizedCrop has no such variant", efficientnet_style=False),
    "Resize": _RESAMPLED,
    "ResizeEdge": _RESAMPLED | _usual("a single number is the shorter side here", edge="short"),
    "CenterCrop": _CROP,
    "RandomCrop": _CROP,
    "RandomFlip": _FLIP,
    "RandomHorizontalFlip": _FLIP,
    "RandomGrayscale": _usual("a gray image keeps its three channels here", keep_channels=True)
    | _left("images are RGB here", "color_format"),
    "GaussianBlur": _usual("the radius is drawn evenly here", magnitude_std="inf"),
    "ColorJitter": _left("it follows PIL", "backend color_format"),
    "RandomRotation": _usual("pixels are the nearest ones here", resample=0) | _usual(_SIZE, expand=False, fill=0),
    "Normalize": _usual("images are RGB here", to_rgb=True) | _left("pixels are not written to", "inplace"),
    # Models.
    "methods": _left("nothing reads it there", "pre_conv") | _usual("", train_cfg={}, test_cfg={}),
    "memory_bank": _usual("there is no such bank here", type=("SimpleMemory", "ODCMemory"))
    | _left("the bank has a row for every sample of the data set", "length")
    | _left("features are those of the neck, clusters those of the head", "feat_dim num_classes")
    | _usual("there is no such switch here", debug=False),
    "first weights": _lost(_WEIGHTS, "init_cfg pretrained"),
    "norms": _usual("norms are trained here", requires_grad=True),
    "ResNet": _RESNET,
    "ResNeXt": _RESNET,
    "ResNetSobel": _RESNET,
    "ResNet_CIFAR": _RESNET,
    "VisionTransformer": _VIT,
    "MoCoV3ViT": _VIT,
    "AvgPool2dNeck": _usual("the whole map is averaged here", output_size=1),
    "SwAVNeck": _usual("embeddings are normalized here", with_l2norm=True),
    "DenseCLNeck": _lost("the dense branch keeps all cells of the map here", "num_grid"),
    "LatentPredictHead": _usual("the loss is a mean over samples here", size_average=True),
    # Hooks of methods.
    "DeepClusterHook": _left("features are those of center crops of the training images", "extractor")
    | _left("features are those of center crops of the training images", "extract_dataloader")
    | _left("a clustering follows from the seed of the run", "seed")
    | _usual("the first clusters come before the first epoch", initial=True)
    | _usual("all ranks take part", dist_mode=True),
    "DeepClusterHook of DeepCluster": _usual("clusters are made anew before every epoch here", interval=1)
    | _usual("DeepCluster has no bank", init_memory=False),
    "DeepClusterHook of ODC": _usual("every epoch sees every sample once", unif_sampling=False)
    | _usual("ODC's bank begins with these clusters", init_memory=True)
    | _left("ODCHook says it again", "reweight reweight_pow"),
    "MomentumUpdateHook": _END,
    "BYOLHook": _END,
    "ODCHook": _left("the sizes of clusters are written with the other metrics", "evaluate_interval")
    | _usual("all ranks take part", dist_mode=True),
    "SwAVHook": _left("the queue is part of every checkpoint", "interval") | _silent("batch_size"),
    "SimSiamHook": _silent("fix_pred_lr lr adjust_by_epoch"),
}
