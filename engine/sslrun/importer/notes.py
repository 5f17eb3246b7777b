"""What is said of the keys of an old config that no conversion takes: data, by the class or the place of their table.

Places are the last part of a table's key; "top" is the whole config. A key whose value holds here anyway needs no word,
one on which nothing depends here is left out, and all else is lost.
"""

from typing import Any

_FEATURES = "features are those of center crops of the training images"
_OPTIONS = "optim_wrapper optimizer_config"
_CHECKPOINTS, _LOGS = "checkpoint checkpoint_config", "logger log_config"
_RESNETS = "ResNet ResNeXt ResNetSobel ResNet_CIFAR"
_VITS = "VisionTransformer MoCoV3ViT"
_OPTIMIZER_HOOKS = (
    "OptimizerHook", "Fp16OptimizerHook", "DistOptimizerHook", "GradAccumFp16OptimizerHook",
    "GradientCumulativeOptimizerHook", "GradientCumulativeFp16OptimizerHook",
)  # fmt: skip
_PREPROCESSORS = ("SelfSupDataPreprocessor", "RelativeLocDataPreprocessor", "RotationPredDataPreprocessor")
_PRECISION = "engine.precision is bf16 where a device has it, and that needs no scaling of the loss"
_MONITOR = "[monitor] measures beside training, on data.holdout"
_MACHINES = "machines and loaders are [engine]'s business, ranks the launcher's"
_BESIDE = "the old framework reads keys of 1.x instead, which stand beside it"
_KINDS = '[[optimizer.paramwise]] with kind = ["norm"] or ["bias"] says it here'
_ONCE = "every epoch sees every sample once here, as in the paper"

# Places or classes, keys on which nothing depends here, and why; nothing is said of those without a reason. "idle" are
# keys of the whole config that no conversion wanted.
_LEFT = [
    ("top", "dist_params env_cfg launcher gpus device local_rank cudnn_benchmark opencv_num_threads", _MACHINES),
    ("top", "mp_start_method persistent_workers prefetch find_unused_parameters", _MACHINES),
    ("top", "default_scope", "classes have one set of names here"),
    ("top", "val_dataloader test_dataloader val_evaluator test_evaluator val_cfg test_cfg evaluation", _MONITOR),
    ("top", "log_processor", "every row of metrics.jsonl is a mean over its interval"),
    ("idle", "optimizer optimizer_config lr_config data runner checkpoint_config log_config", _BESIDE),
    ("top", "auto_resume", "--resume goes on from a run's newest checkpoint"),
    ("top", "fp16", _PRECISION),
    (_OPTIONS, "loss_scale dtype use_fp16", _PRECISION),
    (_OPTIONS, "coalesce bucket_size_mb distributed", _MACHINES),
    ("runner train_cfg", "val_interval val_begin dynamic_intervals", _MONITOR),
    ("randomness", "deterministic diff_rank_seed", "a run follows from its seed alone, on any number of ranks"),
    (_CHECKPOINTS, "save_optimizer save_param_scheduler create_symlink save_last", "a checkpoint holds all of a run"),
    (_CHECKPOINTS, "out_dir filename_tmpl file_client_args backend_args", "checkpoints stand in the run folder"),
    (_LOGS, "ignore_last interval_exp_name out_dir log_metric_by_epoch", "logs stand in the run folder"),
    ("data", "val test val_dataloader test_dataloader", _MONITOR),
    ("data train_dataloader", "persistent_workers pin_memory prefetch_factor dist shuffle", _MACHINES),
    ("sampler", "round_up", "batches are filled by data.drop_last = false"),
    ("sources", "metainfo classes with_label return_label", "labels are not read for training"),
    ("sources", "memcached mclient_path", "images are read from the disk"),
    ("implied", "imdecode_backend to_float32 ignore_empty", "images are decoded by DALI"),
    ("ColorJitter CenterCrop RandomCrop RandomGrayscale", "backend color_format", "it follows PIL"),
    ("RandomResizedCrop Resize ResizeEdge", "antialias", "images are always filtered before they shrink"),
    ("methods", "pre_conv", "nothing reads it there"),
    ("memory_bank", "length", "the bank has a row for every sample of the data set"),
    ("memory_bank", "feat_dim num_classes", "features are those of the neck, clusters those of the head"),
    (_RESNETS, "with_cp", "it only trades memory for time; memory is engine.micro_batch here"),
    (
        "DeepClusterHook InterCLRHook",
        "extractor extract_dataloader",
        "features are those of center crops of the training images",
    ),
    ("DeepClusterHook", "seed", "a clustering follows from the seed of the run"),
    ("DeepClusterHook/ODC", "reweight reweight_pow", "ODCHook says it again"),
    ("InterCLRHook", "interval data_loaders", "the bank and its clusters are part of every checkpoint"),
    ("methods", "intra_cos_margin intra_arc_margin inter_arc_margin semieasy_neg_pool_num", "it is not used"),
    ("ODCHook InterCLRHook", "evaluate_interval", "the sizes of clusters are written with the other metrics"),
    ("SwAVHook", "interval", "the queue is part of every checkpoint"),
    ("SwAVHook", "batch_size", ""),
    ("SimSiamHook", "fix_pred_lr lr adjust_by_epoch", ""),
    ("auto_scale_lr", "base_batch_size", ""),
    ("visualizer", "type name", ""),
    ("implied", "keys meta_keys algorithm_keys pseudo_label_keys", ""),
]
# Places or classes, and values that hold here anyway; a tuple are several, such as classes without their packages.
_USUAL: list[tuple[str, dict[str, Any]]] = [
    ("top", {"workflow": [["train", 1]]}),
    ("optim_wrapper", {"type": ("OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper")}),
    ("optimizer_config", {"type": _OPTIMIZER_HOOKS}),
    ("optimizers", {"dampening": 0, "amsgrad": False, "maximize": False, "nesterov": False}),
    ("grad_clip clip_grad", {"type": "norm", "error_if_nonfinite": False}),
    ("paramwise_cfg", {"bypass_duplicate": False}),
    ("param_scheduler", {"end_factor": 1, "verbose": False}),
    ("auto_scale_lr", {"enable": False}),
    (f"{_CHECKPOINTS} {_LOGS}", {"type": ("CheckpointHook", "LoggerHook")}),
    ("data sampler", {"replace": False, "sampling_replace": False, "shuffle": True}),
    ("sampler", {"type": ("DefaultSampler", "DeepClusterSampler", "InfiniteSampler")}),
    ("collate_fn", {"type": ("default_collate", "pseudo_collate")}),
    ("sources implied", {"color_type": "color", "channel_order": "rgb", "test_mode": False}),
    ("file_client_args backend_args", {"backend": ("disk", "local"), "type": ("HardDiskBackend", "LocalBackend")}),
    ("data_preprocessor img_norm_cfg Normalize", {"bgr_to_rgb": True, "to_rgb": True}),
    ("data_preprocessor", {"type": _PREPROCESSORS}),
    ("RandomResizedCrop", {"max_attempts": 10, "efficientnet_style": False}),
    ("ResizeEdge", {"edge": "short"}),
    ("CenterCrop RandomCrop", {"padding": 0, "pad_if_needed": False}),
    ("RandomFlip RandomHorizontalFlip", {"direction": "horizontal"}),
    ("RandomGrayscale", {"keep_channels": True}),
    ("GaussianBlur", {"magnitude_std": "inf"}),
    ("RandomRotation", {"resample": 0, "expand": False, "fill": 0}),
    ("methods", {"train_cfg": {}, "test_cfg": {}}),
    ("memory_bank", {"type": ("SimpleMemory", "ODCMemory", "InterCLRMemory"), "debug": False}),
    ("norms", {"requires_grad": True}),
    (_RESNETS, {"deep_stem": False, "avg_down": False, "drop_path_rate": 0, "style": "pytorch"}),
    (_RESNETS, {"num_stages": 4, "strides": [1, 2, 2, 2], "dilations": [1, 1, 1, 1]}),
    (_VITS, {"frozen_stages": -1, "norm_eval": False, "drop_rate": 0, "drop_path_rate": 0, "qkv_bias": True}),
    (_VITS, {"layer_scale_init_value": 0, "final_norm": True, "pre_norm": False, "out_indices": (-1, [-1])}),
    (_VITS, {"out_type": "cls_token", "with_cls_token": True, "output_cls_token": True}),
    ("AvgPool2dNeck", {"output_size": 1}),
    ("SwAVNeck", {"with_l2norm": True}),
    ("LatentPredictHead", {"size_average": True}),
    ("DeepClusterHook", {"initial": True, "dist_mode": True}),
    ("DeepClusterHook/DeepCluster", {"interval": 1, "init_memory": False}),
    ("DeepClusterHook/ODC", {"unif_sampling": False, "init_memory": True}),
    ("ODCHook InterCLRHook", {"dist_mode": True}),
    ("InterCLRHook", {"initial": True, "init_memory": True, "online_labels": True}),
    ("MomentumUpdateHook BYOLHook", {"end_momentum": 1}),
]
# Places or classes, keys whose loss has a reason of its own where the value is not the usual one, and that reason.
_WHY = [
    ("top", "workflow", "a run trains, and monitor.loss_interval measures the loss on data.holdout"),
    ("top", "momentum_config", "the optimizer's momentum follows no schedule here"),
    (f"{_OPTIONS} optimizers", "constructor", "layer-wise rates are [[optimizer.paramwise]], rule by rule"),
    ("paramwise_cfg", "norm_decay_mult bias_decay_mult bias_lr_mult", _KINDS),
    ("auto_scale_lr", "enable", "a learning rate belongs to a batch here: nothing scales it"),
    ("data sampler", "replace sampling_replace", _ONCE),
    ("data_preprocessor img_norm_cfg Normalize", "bgr_to_rgb to_rgb", "images are RGB here"),
    ("CenterCrop RandomCrop", "padding", "images are not padded here"),
    ("first_weights", "init_cfg pretrained", "our class draws first weights; load_from takes those of a checkpoint"),
    ("DenseCLNeck", "num_grid", "the dense branch keeps all cells of the map here"),
    ("DeepClusterHook/DeepCluster", "interval", "clusters are made anew before every epoch here"),
]


def _by_key(rows: list[tuple[str, str, str]]) -> dict[tuple[str, str], str]:
    return {(owner, key): why for owners, keys, why in rows for owner in owners.split() for key in keys.split()}


# (place or class, key) -> what is said of it.
LEFT, WHY = _by_key(_LEFT), _by_key(_WHY)
USUAL = {(owner, key): value for owners, values in _USUAL for owner in owners.split() for key, value in values.items()}
PLACES = {owner for owner, _ in (*LEFT, *USUAL)}
