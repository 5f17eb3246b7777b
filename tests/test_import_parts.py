"""What becomes of each part of an old config that the whole ones in old_configs/ do not have, row by row."""

import tomllib

import pytest

from sslrun.config import load
from sslrun.config.node import Node, lookup, parse_key, plain, wrap
from sslrun.importer import import_config

MODEL = """
model = dict(
    type='MoCo',
    backbone=dict(type='ResNet', depth=18, out_indices=[4]),
    neck=dict(type='MoCoV2Neck', in_channels=512, hid_channels=512, out_channels=128),
    head=dict(type='ContrastiveHead'))
"""
V0 = f"""{MODEL}
source = dict(type='ImageNet', data_prefix='p')
steps = [dict(type='RandomResizedCrop', size=32)]
train = dict(type='MultiViewDataset', data_source=source, num_views=[2], pipelines=[steps])
data = dict(samples_per_gpu=16, train=train)
optimizer = dict(type='SGD', lr=0.1)
lr_config = dict(policy='fixed')
runner = dict(type='EpochBasedRunner', max_epochs=10)
"""
V1 = f"""{MODEL}
steps = [dict(type='RandomResizedCrop', size=32, backend='pillow')]
source = dict(type='mmcls.ImageNet', data_root='d/', pipeline=steps)
train_dataloader = dict(batch_size=16, dataset=source)
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=10)]
train_cfg = dict(max_epochs=10)
"""
NOTHING = "there is nothing like it here"
WEIGHTS = "our class draws first weights; load_from takes those of a checkpoint"
UNREAD = "nothing here reads it: a key that has no counterpart, or a variable"
OWN = "a run is continued from a checkpoint of sslrun, not from one of the old framework"
MACHINES = "machines and loaders are [engine]'s business, ranks the launcher's"
PRECISION = "engine.precision is bf16 where a device has it, and that needs no scaling of the loss"


@pytest.fixture
def convert(write):
    """(resolved values, findings without their places) of a small old config with more behind it."""

    def converted(base, more="", name="moco_8xb16.py", gpus=None):
        imported = import_config(write(name, f"{base}\n{more}\n"), gpus)
        new = write("new.toml", imported.text)
        lines = [line.split(": ", 1)[1] for line in imported.report.lines()]
        assert bool(imported.missing) == any(" is missing; " in line for line in lines)
        values = tomllib.loads(imported.text) if imported.missing else load(new).values
        return values, [line for line in lines if " is missing; " not in line]

    return converted


def check(made, expected, lines):
    """Compares values at some keys, and all findings: lost ones are written without their effect."""
    values, found = made
    root = wrap(values, None)
    nodes = {key: lookup(root, parse_key(key)) or Node(None, ()) for key in expected}
    assert {key: plain(node) for key, node in nodes.items()} == expected
    assert sorted(line.replace(": not converted: ", ": ") for line in found) == sorted(lines)


RULES = """
    'bn': dict(weight_decay=0.), 'downsample.1': dict(weight_decay=0.), 'bias': dict(lr=1.),
    '\\Aneck.': dict(lr_mult=10, momentum=0), 'bn1': dict(lr=2.), '(a+)+$': dict(lr=2.),
    '(bn|gn)(\\\\d+)?.(weight|bias)': dict(weight_decay=0.), 'head': dict(lars_exclude=True, fix_lr=True, color=3),
"""
PARTS = {
    "Step": (V0, "lr_config = dict(policy='Step', step=[3, 6], gamma=0.5, min_lr=0.1, warmup_iters=5)",
             {"lr": {"policy": "Step", "step": [3, 6], "gamma": 0.5, "min_lr": 0.1, "by": "epoch"}},
             ["lr_config.warmup_iters: left out: there is no warm-up"]),
    "Cyclic": (V0, "lr_config = dict(policy='cyclic', cyclic_times=2, warmup='linear')",
               {"lr": {"policy": "Cyclic", "cyclic_times": 2, "by": "iter"}},
               ["lr_config.warmup: a warm-up has a length"]),
    "zigzag": (V0, "lr_config = dict(policy='zigzag')\noptimizer = dict(type='RAdam')", {"lr": None, "optimizer": None},
               ["lr_config: there is no policy zigzag here", "optimizer: there is no optimizer RAdam here"]),
    "ConstantLR": (V1, "param_scheduler = dict(type='mmengine.optim.ConstantLR', factor=0.5, end=1)",
                   {"lr": {"policy": "Constant", "warmup": "constant", "warmup_epochs": 1, "warmup_ratio": 0.5}},
                   ["param_scheduler.0: changed: a warm-up goes by iteration here, not by epoch"]),
    "spans": (V1, "param_scheduler = [dict(type='LinearLR'), dict(type='CosineAnnealingLR', T_max=5, begin=2, end=4), "
              "dict(type='LinearLR')]", {"lr": {"policy": "CosineAnnealing", "by": "epoch"}},
              ["param_scheduler.0: a warm-up has an end",
               "param_scheduler.1.T_max: changed: half a cosine lasts from the begin to the end here, not for 5",
               "param_scheduler.1: changed: it begins where the warm-up ends, or with the run",
               "param_scheduler.1: changed: it lasts to the end of the run here, not to 4",
               "param_scheduler.2: LinearLR: only a warm-up from the start and one policy after it can be said here"]),
    "begins": (V1, "param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=500), "
               "dict(type='MultiStepLR', milestones=[3, 6], gamma=0.2, begin=2, "
               "convert_to_iter_based=True)]",
               {"lr": {"policy": "Step", "step": [3, 6], "gamma": 0.2, "warmup": "linear", "warmup_iters": 500,
                       "warmup_ratio": 0.1, "by": "epoch"}},
               ["param_scheduler.1: changed: it counts from the start of the run here, not from 2"]),
    # Iterations are backward passes there, steps here.
    "passes": (V0, "optimizer_config = dict(type='GradientCumulativeOptimizerHook', cumulative_iters=4)\n"
               "checkpoint_config = dict(interval=40, by_epoch=False)\nlog_config = dict(interval=50)\n"
               "lr_config = dict(policy='step', by_epoch=False, step=[400, 801], warmup='linear', warmup_iters=100)\n"
               "runner = dict(type='IterBasedRunner', max_iters=1000)",
               {"lr.step": [100, 201], "lr.warmup_iters": 25, "checkpoint.interval": 10, "checkpoint.by": "iter",
                "log.interval": 13, "max_iters": 250, "epochs": None, "global_batch": 512, "engine.micro_batch": 16},
               ["lr_config.step.1: changed: 801 iterations are 200.25 steps of 4; rounded up"]),
    "passes of 1.x": (V1, "optim_wrapper['accumulative_counts'] = 5\n"
                      "param_scheduler = [dict(type='StepLR', step_size=10, by_epoch=False)]",
                      {"lr": {"policy": "Step", "step": 2, "by": "iter"}, "global_batch": 640}, []),
    "clipping": (V0, "optimizer_config = dict(grad_clip=dict(max_norm=5., norm_type=2, p=1), use_fp16=True)",
                 {"optimizer.grad_clip": {"max_norm": 5.0}},
                 [f"optimizer_config.grad_clip.p: {NOTHING}", f"optimizer_config.use_fp16: left out: {PRECISION}"]),
    "rules": (V0, f"optimizer['paramwise_options'] = {{{RULES}}}",
              {"optimizer.paramwise": [
                  {"kind": ["norm"], "weight_decay": 0.0}, {"kind": ["bias"], "lr": 1.0},
                  {"match": "\\Aneck.", "lr_mult": 10, "momentum": 0}, {"match": "bn1|(a+)+$", "lr": 2.0},
                  {"match": r"bn\d*\.|mlp\.[147]\.", "weight_decay": 0.0}]},
              ["optimizer.paramwise_options.bn1: changed: this pattern is taken as it is; our names of parameters may "
               "be others",
               f"optimizer.paramwise_options.head.color: {NOTHING}",
               "optimizer.paramwise_options.head.fix_lr: without SimSiamHook nothing there fixes the rate",
               "optimizer.paramwise_options.head.lars_exclude: left out: SGD has no lars_exclude"]),
    "rules of a ViT": (V0, "model['backbone'] = dict(type='MoCoV3ViT', arch='mocov3-small')\n"
                       "optimizer['paramwise_options'] = {'bias': dict(weight_decay=0.)}",
                       {"optimizer.paramwise": [{"match": "bias", "weight_decay": 0.0}]},
                       ["optimizer.paramwise_options.bias: changed: this pattern is taken as it is; our names of "
                        "parameters may be others"]),
    "rules of 1.x": (V1, "optim_wrapper['clip_grad'] = dict(max_norm=3., norm_type=1)\n"
                     "optim_wrapper['paramwise_cfg'] = dict(norm_decay_mult=0., custom_keys={"
                     "'neck': dict(decay_mult=2.), 'bias': dict(lr_mult=0.5, decay_mult=0.)})",
                     {"optimizer.grad_clip": {"max_norm": 3.0, "norm_type": 1},
                      "optimizer.paramwise": [{"match": "neck", "weight_decay_mult": 2.0},
                                              {"kind": ["bias"], "lr_mult": 0.5, "weight_decay": 0.0}]},
                     ["optim_wrapper.paramwise_cfg.custom_keys: changed: all rules that fit apply here, in this order; "
                      "there the longest name that fits decides alone",
                      'optim_wrapper.paramwise_cfg.norm_decay_mult: [[optimizer.paramwise]] with kind = ["norm"] or '
                      '["bias"] says it here']),
    "start": (V0, "seed = 3\nload_from = 'a.pth'\nresume_from = 'b.pth'\nwork_dir = 'runs'",
              {"seed": 3, "load_from": "a.pth", "load_strict": False, "resume_from": "b.pth", "work_dir": "runs"},
              ["load_from: changed: what does not fit is left out, as there; but the old parameters have other names",
               f"resume_from: changed: {OWN}",
               "work_dir: changed: a folder is made in it for every run, with the recipe's name"]),
    "resume": (V1, "resume = True\nload_from = 'a.pth'\nrandomness = dict(seed=4, deterministic=True)",
               {"resume_from": "a.pth", "load_from": None, "seed": 4},
               [f"load_from: changed: {OWN}", "resume: left out: --resume goes on from a run's newest checkpoint",
                "randomness.deterministic: left out: a run follows from its seed alone, on any number of ranks"]),
    "resume a path": (V1, "resume = 'c.pth'", {"resume_from": "c.pth"}, [f"resume: changed: {OWN}"]),
    "top": (V0, "workflow = [('train', 1), ('val', 1)]\nfp16 = dict(loss_scale=512.)\nvisualizer = dict(type='x')\n"
            "custom_imports = dict(imports=['mine'])", {"custom_imports": None},
            ["custom_imports: modules for the old registries; custom_imports here names modules with classes of "
             "sslrun's", f"fp16: left out: {PRECISION}",
             "workflow: a run trains, and monitor.loss_interval measures the loss on data.holdout"]),
    "top of 1.x": (V1, "custom_imports = dict(imports=['mmselfsup.models', 'mmcls.models'])\ndata = dict(a=1)\n"
                   "train_cfg = dict(type='Loop', max_iters=9)\nparam_scheduler = []", {"max_iters": 9, "epochs": None},
                   ["custom_imports: left out: the old framework's own modules, whose classes are known here",
                    "data: left out: the old framework reads keys of 1.x instead, which stand beside it",
                    "train_cfg: Loop: a run goes by epochs or iterations here"]),
    "variables": (V0, "used = 3\nidle = used\nratio = [1, 1]\nx = dict(a=1)\nsteps[0]['ratio'] = [1, 1]", {},
                  [f"idle: {UNREAD}", "ratio: left out: a variable, whose value stands where it was used",
                   f"x: {UNREAD}"]),
    "saving": (V0, "checkpoint_config = dict(interval=2, max_keep_ckpts=5, save_optimizer=True)\nlog_level = 'DEBUG'\n"
               "log_config = dict(interval=7, hooks=[dict(type='TextLoggerHook', by_epoch=1), dict(type='Pavi'), "
               "dict(type='TensorboardLoggerHook'), dict(type='WandbLoggerHook', entity='x'), "
               "dict(type='MlflowLoggerHook')])",
               {"checkpoint": {"interval": 2, "by": "epoch", "max_keep_ckpts": 5},
                "log": {"interval": 7, "hooks": ["tensorboard", "wandb", "mlflow"], "level": "DEBUG"}},
               ["checkpoint_config.save_optimizer: left out: a checkpoint holds all of a run",
                "log_config.hooks.0.by_epoch: left out: the log is written anyway",
                'log_config.hooks.1: Pavi: there are "tensorboard", "wandb" and "mlflow" here',
                "log_config.hooks.3.entity: set what you need of it in [log.wandb] or [log.mlflow]"]),
    "hooks": (V1, "default_hooks = dict(logger=dict(type='LoggerHook', interval=9), other=dict(type='X'), "
              "checkpoint=dict(interval=-1, max_keep_ckpts=0), visualization=dict(type='VisualizationHook', "
              "enable=False), timer=dict(type='m.IterTimerHook'), off=dict(enable=False), none=None)\n"
              "log_level = 'CRITICAL'\nvisualizer = dict(vis_backends=[dict(type='TensorboardVisBackend')], name='x')",
              {"log": {"interval": 9, "hooks": ["tensorboard"]}, "checkpoint": {"max_keep_ckpts": -1}},
              ["default_hooks.checkpoint.interval: every so many epochs or iterations, at least 1",
               "default_hooks.off: left out: it is switched off", "default_hooks.other: there is no hook X here",
               "default_hooks.visualization: left out: it is switched off",
               'log.level: expected "DEBUG", "INFO", "WARNING" or "ERROR", got the string "CRITICAL"']),
    "loader": (V1, "train_dataloader['num_workers'] = 3\ntrain_dataloader['pin_memory'] = True\n"
               "train_dataloader['sampler'] = dict(type='Odd', shuffle=False, replace=True)",
               {"data.workers_per_gpu": 3, "data.drop_last": False},
               [f"train_dataloader.pin_memory: left out: {MACHINES}", f"train_dataloader.sampler.shuffle: {NOTHING}",
                "train_dataloader.sampler.replace: every epoch sees every sample once here, as in the paper",
                f"train_dataloader.sampler.type: Odd: {NOTHING}"]),
    "OpenSelfSup": (V0, "model['type'] = 'MOCO'\nmodel['neck']['type'] = 'NonLinearNeckV1'\nprefetch = False\n"
                    "data = dict(imgs_per_gpu=16, train=dict(type='ContrastiveDataset', pipeline=[dict("
                    "type='GaussianBlur', sigma_min=0.1, sigma_max=2.)], data_source=dict(type='ImageNet', root='r')))",
                    {"model.type": "MoCo", "model.neck.type": "MoCoV2Neck", "global_batch": 128,
                     "data.views": [{"num_views": 2, "transforms": [
                         {"type": "GaussianBlur", "sigma_min": 0.1, "sigma_max": 2.0, "p": 1.0}]}]},
                    [f"prefetch: left out: {MACHINES}"]),
    "BYOLDataset": (V0, "train = dict(type='BYOLDataset', pipeline1=steps, pipeline2=[3])\ndata['train'] = train",
                    {"data.views.1": {"num_views": 1, "transforms": []}, "data.source": None},
                    ["data.train.pipeline2.0: expected a table, got the number 3"]),
    "wrong values": (V0, "optimizer = dict(type='AdamW', lr=0.1, betas=(0.9, 'x'))\noptimizer_config = dict("
                     "update_interval=0)\nmodel['type'] = 'SimSiam'",
                     {"optimizer.betas": None, "model.head": None, "global_batch": 128},
                     ["model.head.type: there is no 'ContrastiveHead' among the heads; known: LatentPredictHead; "
                      "custom_imports makes your own classes known",
                      'optimizer.betas.1: expected a number, got the string "x"']),
    "two norms": (V0, "one = dict(type='Normalize', mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])\n"
                  "train['num_views'] = [1, 1]\ntrain['pipelines'] = [[one], [dict(one, mean=[0.4, 0.4, 0.4])]]",
                  {"vars": None, "data.views.1.transforms.0.mean": [0.4] * 3}, []),
    "method": (V0, "train['type'] = 'X'\nmodel['queue_len'] = 4096\nmodel['shuffle'] = False\nmodel['test_cfg'] = {}",
               {"model.queue_len": 4096},
               ["data.train: there is no data set X here", "model.shuffle: MoCo has nothing like it here"]),
    "another rate": (V0, "model = dict(type='SimSiam')\noptimizer['paramwise_options'] = {'neck': dict(fix_lr=True)}\n"
                     "custom_hooks = [dict(type='SimSiamHook', fix_pred_lr=True, lr=0.5)]",
                     {"optimizer.paramwise": [{"match": "neck", "lr": 0.5, "fix_lr": True}]}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts(convert, name):
    base, more, expected, lines = PARTS[name]
    check(convert(base, more), expected, lines)


@pytest.mark.parametrize(
    ("more", "name", "gpus", "batch", "line"),
    [
        ("", "moco_r18_16xb16-coslr-1e_in1k.py", None, 256, ""),
        ("", "moco_8xb16.py", 2, 32, ""),
        ("gpu_ids = range(0, 4)", "moco.py", None, 64, ""),
        ("auto_scale_lr = dict(base_batch_size=4096)", "moco.py", None, 4096, ""),
        ("", "r18_bs256_ep200.py", None, 256, ""),
        ("", "moco.py", None, 16, "nothing says for how many GPUs this batch is: global_batch is that of one; "
         "--gpus N says it"),
        ("", "moco_8xb64.py", None, 128, "the name says 8xb64, the batch on a GPU is 16"),
    ],
)  # fmt: skip
def test_global_batch(convert, more, name, gpus, batch, line):
    lines = [f"data.samples_per_gpu: changed: {line}"] if line else []
    check(convert(V0, more, name, gpus), {"global_batch": batch, "engine": None}, lines)


JITTER, GRAY = {"type": "ColorJitter", "hue": 0.1}, {"type": "RandomGrayscale", "p": 1.0}
STEPS_V0 = [  # the old transform, ours, and what is said of it
    ("'RandomResizedCrop', size=96, scale=(0.05, 0.14), ratio=(1, 1), interpolation=3",
     {"type": "RandomResizedCrop", "size": 96, "scale": [0.05, 0.14], "ratio": [1, 1], "interpolation": "bicubic"}, ""),
    ("'Resize', size=[32, 48], interpolation=1", {"type": "Resize", "size": [32, 48]},
     '.interpolation: there are "bilinear" and "bicubic" here'),
    ("'RandomCrop', size=32, padding=4", {"type": "RandomCrop", "size": 32}, ".padding: images are not padded here"),
    ("'RandomGrayscale'", {"type": "RandomGrayscale"}, ""),
    ("'Solarization'", {"type": "Solarization", "p": 0.5}, ""),
    ("'RandomRotation', degrees=2, expand=True", {"type": "RandomRotation", "degrees": 2},
     ".expand: RandomRotation has nothing like it here"),
    ("'RandomAppliedTrans', transforms=[dict(type='RandomGrayscale', p=0.5)]", {**GRAY, "p": 0.25}, ""),
    ("'RandomAppliedTrans', p=0.8, transforms=[dict(type='ColorJitter', hue=0.1)]", {**JITTER, "p": 0.8}, ""),
    ("'RandomAppliedTrans', transforms=[dict(type='ColorJitter', hue=0.1), dict(type='RandomGrayscale', p=1.)]",
     {"type": "RandomAppliedTrans", "p": 0.5, "transforms": [JITTER, GRAY]}, ""),
    ("'RandomAppliedTrans', transforms=[dict(type='Lighting')]", None,
     ".transforms.0: there is no transform Lighting here"),
]  # fmt: skip
STEPS_V1 = [
    ("'RandomResizedCrop', scale=96, crop_ratio_range=(0.2, 1.), aspect_ratio_range=(1, 1)",
     {"type": "RandomResizedCrop", "size": 96, "scale": [0.2, 1.0], "ratio": [1, 1]},
     ".backend: changed: resized as PIL does, which filters before it shrinks; OpenCV does not"),
    ("'RandomResizedCrop', scale=96, backend='pillow'", {"type": "RandomResizedCrop", "size": 96}, ""),
    ("'Resize', scale=(48, 32), backend='pillow'", {"type": "Resize", "size": [32, 48]}, ""),
    ("'Resize', size=8, scale=(48, 32), keep_ratio=True, backend='pillow'", {"type": "Resize", "size": 8},
     ".scale: an image is not fitted into a frame here: size = PIXELS is the shorter side, [height, width] both"),
    ("'mmcls.ResizeEdge', scale=48, edge='short', backend='pillow'", {"type": "Resize", "size": 48}, ""),
    ("'CenterCrop', crop_size=32", {"type": "CenterCrop", "size": 32}, ""),
    ("'RandomFlip', direction='vertical'", {"type": "RandomHorizontalFlip", "p": 0.5},
     ".direction: RandomHorizontalFlip has nothing like it here"),
    ("'RandomGrayscale', prob=0.2, keep_channels=True, channel_weights=(0.114, 0.587, 0.2989)", {**GRAY, "p": 0.2}, ""),
    ("'RandomGrayscale'", {**GRAY, "p": 0.5},
     ".channel_weights: changed: gray is weighed as PIL does: [0.114, 0.587, 0.2989] of blue, green and red"),
    ("'mmcls.GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=0.7",
     {"type": "GaussianBlur", "sigma_min": 0.1, "sigma_max": 2.0, "p": 0.7}, ""),
    ("'mmcls.Solarize', thr=100", {"type": "Solarization", "threshold": 100, "p": 0.5}, ""),
    ("'torchvision/RandomSolarize', threshold=100, prob=0.3", {"type": "Solarization", "threshold": 100, "p": 0.3}, ""),
    ("'GridMask', ratio=0.5", None, ": there is no transform GridMask here"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "rows", "place"),
    [(V0, STEPS_V0, "data.train.pipelines.0"), (V1, STEPS_V1, "train_dataloader.dataset.pipeline")],
)
def test_transforms(convert, base, rows, place):
    more = "".join(f"steps.append(dict(type={old}))\n" for old, _, _ in rows)
    values, lines = convert(base, more)
    assert values["data"]["views"][0]["transforms"][1:] == [new for _, new, _ in rows if new]
    check((values, lines), {}, [f"{place}.{index}{line}" for index, (*_, line) in enumerate(rows, 1) if line])


@pytest.mark.parametrize(
    ("base", "old", "new", "lines"),
    [
        (V0, "type='ImageNet', data_prefix='p', ann_file='m', zoom=1", ["ImageNet", "p", "m"],
         ["zoom: ImageNet has nothing like it here"]),
        (V0, "type='ImageList', data_prefix='/', file_client_args=dict(backend='petrel')", ["ImageFolder", "/", None],
         [f"file_client_args.backend: {NOTHING}"]),
        (V0, "type='CIFAR10', data_prefix='c/', ann_file='m'", ["CIFAR10", "c", None],
         ["ann_file: left out: its files have fixed names, and it reads no list of images"]),
        (V1, "type='ImageNet', data_root='d/', data_prefix=dict(img='x', seg='y'), classes=3",
         ["ImageNet", "d/x", None], ["classes: left out: labels are not read for training",
                                     f"data_prefix.seg: {NOTHING}"]),
        (V1, "type='ImageNet', data_root='d/', split='train'", ["ImageNet", "d/train", None], []),
        (V1, "type='mmcls.CustomDataset', data_root='d', data_prefix='x', ann_file='/m'",
         ["ImageList", "d/x", "/m"], []),
    ],
)  # fmt: skip
def test_sources(convert, base, old, new, lines):
    place, held = "data.train.data_source", "train['data_source'] = dict("
    if base == V1:
        place, held = "train_dataloader.dataset", "train_dataloader['dataset'] = dict(pipeline=steps, "
    expected = {
        f"data.source.{key}": value for key, value in zip(("type", "data_prefix", "ann_file"), new, strict=True)
    }
    check(convert(base, f"{held}{old})"), expected, [f"{place}.{line}" for line in lines])


NUMBERS = "mean=[127.5, 127.5, 127.5], std=[51, 51, 51]"


@pytest.mark.parametrize(
    ("base", "more"),
    [
        (V0, "steps.append(dict(type='Normalize', mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]))"),
        (V0, f"train['prefetch'] = True\nimg_norm_cfg = dict({NUMBERS})"),
        (V1, f"steps.append(dict(type='Normalize', {NUMBERS}, to_rgb=True))"),
        (V1, f"model['data_preprocessor'] = dict(type='SelfSupDataPreprocessor', {NUMBERS})"),
        (V1, f"data_preprocessor = dict({NUMBERS}, bgr_to_rgb=True)"),
    ],
)
def test_normalize(convert, base, more):
    """Of numbers from 0 to 255 or from 0 to 1, in the pipeline or beside the model."""
    values, lines = convert(base, more)
    numbers = {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert values["data"]["views"][0]["transforms"][1:] == [{"type": "Normalize", **numbers}]
    assert values["vars"] == numbers and lines == []
    assert "mean and std are three numbers" in str(
        convert(base, more.replace("127.5,", "None,").replace("0.5,", "'a',"))
    )


@pytest.mark.parametrize(
    ("counts", "first", "line"),
    [
        ([1, 3], "Resize", ""),
        ([1, 3], "RandomFlip", ": changed: what stands before MultiView is drawn for each group of views here"),
        ([1], "Resize", ".transforms: not converted: 2 pipelines for 1 numbers of views"),
    ],
)
def test_groups_of_views(convert, counts, first, line):
    views = f"dict(type='MultiView', num_views={counts}, transforms=[steps, [dict(type='CenterCrop', crop_size=48)]])"
    more = f"source['pipeline'] = [dict(type='{first}', backend='pillow'), {views}, dict(type='ColorJitter')]"
    values, lines = convert(V1, more)
    groups = [(v["num_views"], [step["type"] for step in v["transforms"][1:]]) for v in values["data"]["views"]]
    crops = (["RandomResizedCrop", "ColorJitter"], ["CenterCrop", "ColorJitter"])
    assert groups == list(zip(counts, crops, strict=False))
    place = "train_dataloader.dataset.pipeline.1"
    assert [found.removeprefix(place) for found in lines if found.startswith(place)] == ([line] if line else [])


RESNET, VIT = {"type": "ResNet", "depth": 18}, {"type": "VisionTransformer", "frozen_patch_embed": False}
NECK = {"in_channels": 512, "hid_channels": 64, "out_channels": 128}
SIZES = "in_channels=512, hid_channels=64, out_channels=128"
LINEAR = {"type": "LinearNeck", "in_channels": 512, "out_channels": 128}
MLP = {"type": "NonLinearNeck", **NECK, "with_bias": True, "with_last_bn": False, "with_last_bias": True}
LOSS = ".loss.loss_weight: the weight of this loss is 1.0 here"
NETWORKS = [
    ("backbone", "'ResNet', depth=18, out_indices=4, norm_cfg=dict(type='SyncBN', requires_grad=True)",
     {**RESNET, "out_indices": [4], "norm_cfg": {"type": "SyncBN"}}, []),
    ("backbone", "'openselfsup.ResNeXt', depth=50, groups=8, base_width=6",
     {**RESNET, "depth": 50, "groups": 8, "width_per_group": 6}, []),
    ("backbone", "'ResNet_CIFAR', depth=18, out_indices=(3,)",
     {**RESNET, "stem": "small", "out_indices": [4], "zero_init_residual": True}, []),
    ("backbone", "'mmcls.ResNet', depth=18, out_indices=(0, 3), base_channels=128, stem_channels=64, with_cp=True",
     {**RESNET, "base_width": 128, "out_indices": [1, 4], "zero_init_residual": True},
     [".stem_channels: the stem is as wide as the first stage here",
      ".with_cp: left out: it only trades memory for time; memory is engine.micro_batch here"]),
    ("backbone", "'ResNet', depth=18, norm_cfg=dict(type='GN', num_groups=32), style='caffe', num_stages=4, "
     "norm_eval=True, pretrained='x.pth'", {**RESNET, "norm_eval": True},
     [".norm_cfg: there is no norm GN here; the default stands", f".pretrained: {WEIGHTS}",
      ".style: ResNet has nothing like it here"]),
    ("backbone", "'ResNet', depth='x'", {"type": "ResNet"}, [".depth: expected 18, 34, 50, 101 or 152"]),
    ("backbone", "'SwinTransformer', x=1", None, [": there is no backbone SwinTransformer here"]),
    ("backbone", "'VisionTransformer', arch='deit-small', stop_grad_conv1=True, drop_path_rate=0.1, out_indices=-1",
     {**VIT, "arch": "small", "num_heads": 6, "frozen_patch_embed": True},
     [".drop_path_rate: VisionTransformer has nothing like it here"]),
    ("backbone", "'mmcls.VisionTransformer', arch='small'",
     {**VIT, "embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0},
     [": changed: positions are fixed sines and cosines here, as in MoCo v3; there they are learned"]),
    ("backbone", "'MoCoV3ViT', arch='giant'", VIT, ['.arch: the string "giant" is no size of our ViT']),
    ("neck", "'mmpretrain.models.LinearNeck', in_channels=512, out_channels=128, with_avg_pool=True", LINEAR,
     [".norm_cfg: LinearNeck has nothing like it here"]),
    ("neck", f"'NonLinearNeck', {SIZES}, with_avg_pool=False", {"type": "NonLinearNeck", **NECK},
     [".with_avg_pool: feature maps are averaged here, and vectors left alone"]),
    ("neck", f"'NonLinearNeckSimCLR', {SIZES}, sync_bn=True, with_bias=True, with_last_bn=False",
     {**MLP, "norm_cfg": {"type": "SyncBN"}}, []),
    ("neck", "'RelativeLocNeck', in_channels=512, out_channels=128, norm_cfg=dict(type='BN1d')",
     {**LINEAR, "type": "RelativeLocNeck", "norm_cfg": {"type": "BN", "momentum": 0.003}}, []),
    ("neck", "'AvgPoolNeck', output_size=2", {"type": "AvgPool2dNeck", "in_channels": 512},
     [".output_size: AvgPool2dNeck has nothing like it here"]),
    ("neck", f"'DenseCLNeck', {SIZES}, num_grid=7", {"type": "DenseCLNeck", **NECK},
     [".num_grid: the dense branch keeps all cells of the map here"]),
    ("head", "'ContrastiveHead', temperature=0.2, loss=dict(type='FocalLoss', gamma=2, loss_weight=0.5)",
     {"type": "ContrastiveHead", "temperature": 0.2},
     [".loss: the loss of this head is CrossEntropyLoss here", f".loss.gamma: {NOTHING}", LOSS]),
    ("head", "'ClsHead', num_classes=4, init_cfg=dict(type='Normal', std=0.1, layer='Linear')",
     {"type": "ClsHead", "in_channels": 2048, "num_classes": 4, "init_std": 0.1}, []),
    ("head", "'ClsHead', init_cfg=dict(type='Xavier', layer='Linear')",
     {"type": "ClsHead", "in_channels": 2048, "num_classes": 1000}, [f".init_cfg: {WEIGHTS}"]),
    ("head", "'LatentCrossCorrelationHead', in_channels=9, loss=dict(type='CrossCorrelationLoss', lambd=0.02)",
     {"type": "LatentCrossCorrelationHead", "lambd": 0.02}, [".in_channels: the neck gives 128 channels"]),
    ("head", "'MoCoV3Head', temperature=0.5, predictor=dict(type='LinearNeck', in_channels=512, out_channels=128), "
     "loss=dict(type='CrossEntropyLoss', loss_weight=3)",
     {"type": "MoCoV3Head", "temperature": 0.5, "predictor": LINEAR}, [LOSS]),
    ("head", "'SwAVHead', feat_dim=128, num_crops=[2, 6]", {"type": "SwAVHead", "feat_dim": 128},
     [".num_crops: the loss takes all views, which are 2"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "old", "new", "lines"), NETWORKS, ids=[old.split("'")[1] for _, old, _, _ in NETWORKS]
)
def test_networks(convert, part, old, new, lines):
    values, found = convert(V0, f"model['{part}'] = dict(type={old})")
    found = [line.partition(", got ")[0] for line in found if line.startswith("model")]
    check((values, found), {f"model.{part}": new}, [f"model.{part}{line}" for line in lines])


@pytest.mark.parametrize(
    ("old", "more", "momentum"),
    [
        ("type='MoCo', momentum=0.001", "", 0.001),
        ("type='MoCo', momentum=0.001", "default_scope = 'mmpretrain'", 0.999),
        ("type='mmpretrain.models.selfsup.MoCo', momentum=0.001", "", 0.999),
        ("type='mmselfsup.models.MoCo', momentum=0.99", "default_scope = 'mmpretrain'", 0.99),
        ("type='BYOL'", "", 0.996),
        ("type='mmpretrain.BYOL'", "", 0.996),
    ],
)
def test_momentum(convert, old, more, momentum):
    """MMPretrain states 1 minus it; the framework is that of the class, else that of the config."""
    model = convert(V0, f"model = dict({old})\n{more}")[0]["model"]
    assert model.get("momentum", model.get("base_momentum")) == momentum


HOOKS = [
    ("DenseCL", "type='DenseCLHook', x=1", {"loss_lambda_start_iters": 1000}, ["x: DenseCL has nothing like it here"]),
    ("BYOL", "type='BYOLHook', end_momentum=0.999", {"base_momentum": 0.996, "end_momentum": 0.999}, []),
    ("BYOL", "type='MomentumUpdateHook', update_interval=4, end_momentum=1.0", {"base_momentum": 0.996},
     ["update_interval: changed: the teacher moves once in a step here: every 1 backward passes"]),
    ("SwAV", "type='SwAVHook', priority='HIGH', batch_size=16, queue_length=64, epoch_queue_starts=3, interval=2, "
     "frozen_layers_cfg=dict(prototypes=7, neck=3)",
     {"queue_length": 64, "epoch_queue_starts": 3, "freeze_prototypes_iters": 7},
     ["frozen_layers_cfg.neck: only SwAV's prototypes can be frozen for some time; [[optimizer.paramwise]] has "
      "freeze_iters", "interval: left out: the queue is part of every checkpoint"]),
    ("DeepCluster", "type='DeepClusterHook', clustering=dict(type='Kmeans', k=10, pca_dim=64), unif_sampling=False, "
     "reweight=True, reweight_pow=0.7, initial=True, interval=3",
     {"pca_dim": 64, "uniform_sampling": False, "reweight": True, "reweight_power": 0.7},
     ["clustering.k: the head has 4 classes, one for each cluster",
      "interval: clusters are made anew before every epoch here"]),
    ("DeepCluster", "type='DeepClusterHook', clustering=dict(type='PIC', k=4, sigma=0.2)", {},
     ["clustering.sigma: there is nothing like it here", "clustering: there is no clustering PIC here, only k-means"]),
    ("ODC", "type='DeepClusterHook', clustering=dict(type='Kmeans', k=4), init_memory=True, interval=9", {},
     ["clustering.pca_dim: the first clusters are those of the features themselves",
      "interval: ODC makes its clusters from scratch only once"]),
    ("ODC", "type='ODCHook', centroids_update_interval=5, reweight=False, reweight_pow=0.5",
     {"centroids_update_interval": 5, "reweight_power": 0.0}, []),
    ("MoCo", "type='EMAHook', momentum=0.1", {}, [": there is no hook EMAHook here"]),
    ("MoCo", "type='EMAHook', enable=False", {}, [": left out: it is switched off"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "hook", "new", "lines"), HOOKS)
def test_hooks(convert, method, hook, new, lines):
    head = {"type": "ClsHead", "in_channels": 512, "num_classes": 4}
    values, found = convert(V0, f"model = dict(type='{method}', head={head})\ncustom_hooks = [dict({hook})]")
    found = [line for line in found if line.startswith("custom_hooks")]
    lines = [f"custom_hooks.0{line if line.startswith(':') else f'.{line}'}" for line in lines]
    assert {key: value for key, value in values["model"].items() if key not in ("type", "head")} == new
    check((values, found), {}, lines)


def test_a_variable_of_a_base_that_is_set_anew(convert, write):
    write("base_8xb16.py", "root = 'a'\n" + V0.replace("'p'", "root + '/images'"))
    imported = import_config(write("new_8xb16.py", "_base_ = 'base_8xb16.py'\nroot = 'b'"))
    assert tomllib.loads(imported.text)["data"]["source"]["data_prefix"] == "a/images"
    assert imported.report.lines() == [f"new_8xb16.py:2: root: not converted: {UNREAD}"]
