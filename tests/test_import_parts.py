"""What becomes of each part of an old config: networks, images, training, one by one."""

import time
import tomllib

import pytest

from sslrun.config import load
from sslrun.importer import import_config
from sslrun.importer.old import Effect

MOCO = """
model = dict(
    type='MoCo',
    backbone=dict(type='ResNet', depth=18, out_indices=[4]),
    neck=dict(type='MoCoV2Neck', in_channels=512, hid_channels=512, out_channels=128),
    head=dict(type='ContrastiveHead'))
"""
TRAINING = """
optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
lr_config = dict(policy='fixed')
runner = dict(type='EpochBasedRunner', max_epochs=10)
"""
NOTHING = "there is nothing like it here"
CV2 = "backend: resized as PIL does, which filters before it shrinks; OpenCV does not"
WEIGHTS = "first weights are those that our class draws; load_from takes those of a checkpoint"
TAKEN = "this pattern is taken as it is; our names of parameters may be others"
POOLED = "with_avg_pool: feature maps are averaged here, and vectors left alone"
LEARNED = "model.backbone: positions are fixed sines and cosines here, as in MoCo v3; there they are learned"


def data_0x(steps, **source):
    """`data` with one pipeline and another source."""
    origin = {"type": "ImageNet", "data_prefix": "p", **source}
    return (
        f"data = dict(samples_per_gpu=16, drop_last=True, train=dict(type='MultiViewDataset', data_source={origin!r}, "
        f"num_views=[2], pipelines=[[{steps}, dict(type='ToTensor')]]))"
    )


def data_1x(steps, **dataset):
    """`train_dataloader` with a pipeline and another data set."""
    kept = {"type": "mmcls.ImageNet", "data_root": "d/", "data_prefix": {"img_path": "train/"}, **dataset}
    pairs = ", ".join(f"{key}={value!r}" for key, value in kept.items() if value is not None)
    return (
        "train_dataloader = dict(batch_size=16, drop_last=True, dataset=dict("
        f"{pairs}, pipeline=[dict(type='LoadImageFromFile'), {steps}]))"
    )


CROP = data_0x("dict(type='RandomResizedCrop', size=32)")
CROP_1X = data_1x("dict(type='RandomResizedCrop', size=32, backend='pillow')")


@pytest.fixture
def convert(write):
    """(resolved values, findings without their places) of a small old config with something changed."""

    def converted(model=MOCO, data=CROP, training=TRAINING, more="", name="moco_8xb16.py", gpus=None):
        imported = import_config(write(name, model + data + training + more), gpus)
        new = write("new.toml", imported.text)
        lines = [finding.line().split(": ", 1)[1] for effect in Effect for finding in imported.report.findings(effect)]
        assert bool(imported.missing) == any(" is missing; " in line for line in lines)
        return tomllib.loads(imported.text) if imported.missing else load(new).values, lines

    return converted


class TestTraining:
    """Optimizers, schedules, batches and lengths."""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("policy='fixed'", {"policy": "Constant"}),
            ("policy='Step', step=[3, 6], gamma=0.5, min_lr=0.1",
             {"policy": "Step", "step": [3, 6], "gamma": 0.5, "min_lr": 0.1}),
            ("policy='CosineAnnealing', min_lr_ratio=0.01, by_epoch=False",
             {"policy": "CosineAnnealing", "min_lr_ratio": 0.01, "by": "iter"}),
            ("policy='cyclic', cyclic_times=2", {"policy": "Cyclic", "cyclic_times": 2, "by": "iter"}),
            ("policy='StepFixCosineAnnealing', min_lr=0., warmup='exp', warmup_iters=4, warmup_by_epoch=True, "
             "warmup_ratio=0.2, by_epoch=False",
             {"policy": "CosineAnnealing", "min_lr": 0.0, "by": "iter", "warmup": "exp", "warmup_epochs": 4,
              "warmup_ratio": 0.2, "after_warmup": True}),
        ],
    )  # fmt: skip
    def test_lr_config(self, convert, old, new):
        values, lines = convert(training=TRAINING.replace("policy='fixed'", old))
        assert values["lr"] == {"by": "epoch", **new} and lines == []

    @pytest.mark.parametrize(
        ("old", "new", "lines"),
        [
            ("dict(type='CosineAnnealingLR', T_max=10, eta_min=0.01, begin=0, end=10)",
             {"policy": "CosineAnnealing", "min_lr": 0.01}, []),
            ("dict(type='mmengine.optim.LinearLR', start_factor=0.01, end=2, convert_to_iter_based=True), "
             "dict(type='CosineAnnealingLR', T_max=8, begin=2, end=10, convert_to_iter_based=True)",
             {"policy": "CosineAnnealing", "by": "iter", "warmup": "linear", "warmup_epochs": 2, "warmup_ratio": 0.01,
              "after_warmup": True}, []),
            ("dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500), "
             "dict(type='MultiStepLR', milestones=[3, 6], gamma=0.2)",
             {"policy": "Step", "step": [3, 6], "gamma": 0.2, "warmup": "linear", "warmup_iters": 500,
              "warmup_ratio": 0.1}, []),
            ("dict(type='ConstantLR', factor=0.5, begin=0, end=1)",
             {"policy": "Constant", "warmup": "constant", "warmup_epochs": 1, "warmup_ratio": 0.5, "by": None},
             ["param_scheduler.0: a warm-up goes by iteration here, not by epoch"]),
            ("dict(type='CosineAnnealingLR', T_max=4, end=4), dict(type='ConstantLR', factor=1, begin=4, end=10)",
             {"policy": "CosineAnnealing"},
             ["param_scheduler.1: ConstantLR: only a warm-up from the start and one policy after it can be said here",
              "param_scheduler.0: it lasts to the end of the run here, not to 4"]),
            ("dict(type='CosineAnnealingLR', T_max=5, begin=2)", {"policy": "CosineAnnealing"},
             ["param_scheduler.0: it begins where the warm-up ends, or with the run",
              "param_scheduler.0.T_max: half a cosine lasts from the begin to the end here, not for 5"]),
            ("dict(type='MultiStepLR', milestones=[3, 6], begin=2)", {"policy": "Step", "step": [3, 6]},
             ["param_scheduler.0: it counts from the start of the run here, not from 2"]),
        ],
    )  # fmt: skip
    def test_param_scheduler(self, convert, old, new, lines):
        values, found = convert(data=CROP_1X, training=TRAINING.replace("lr_config = dict(policy='fixed')", ""),
                                more=f"param_scheduler = [{old}]")  # fmt: skip
        assert {"by": "epoch", **values["lr"]} == {"by": "epoch"} | {k: v for k, v in new.items() if v is not None}
        assert found == lines

    def test_unknown_optimizers_and_policies(self, convert):
        values, lines = convert(training=TRAINING.replace("'fixed'", "'zigzag'").replace("SGD", "RAdam"))
        assert [line for line in lines if "is missing" not in line] == [
            "optimizer: there is no optimizer RAdam here", "lr_config: there is no policy zigzag here",
        ]  # fmt: skip
        assert values["epochs"] == 10 and "lr" not in values and "optimizer" not in values

    @pytest.mark.parametrize(
        ("more", "name", "gpus", "batch", "lines"),
        [
            ("", "moco_r18_16xb16-coslr-1e_in1k.py", None, 256, []),
            ("", "moco_8xb16.py", 2, 32, []),
            ("gpu_ids = range(0, 4)", "moco.py", None, 64, []),
            ("auto_scale_lr = dict(base_batch_size=4096)", "moco.py", None, 4096, []),
            ("", "r18_bs256_ep200.py", None, 256, []),
            ("", "moco.py", None, 16,
             ["data.samples_per_gpu: nothing says for how many GPUs this batch is: global_batch is that of one; "
              "--gpus N says it"]),
            ("", "moco_8xb64.py", None, 128, ["data.samples_per_gpu: the name says 8xb64, the batch on a GPU is 16"]),
            ("auto_scale_lr = dict(enable=True, base_batch_size=128)", "moco_8xb16.py", None, 128,
             ["auto_scale_lr.enable: a learning rate belongs to a batch here: nothing scales it"]),
        ],
    )  # fmt: skip
    def test_global_batch(self, convert, more, name, gpus, batch, lines):
        values, found = convert(more=more, name=name, gpus=gpus)
        assert values["global_batch"] == batch and "engine" not in values and found == lines

    @pytest.mark.parametrize(
        "form", ["update_interval=4", "type='GradientCumulativeOptimizerHook', cumulative_iters=4"]
    )
    def test_accumulation(self, convert, form):
        """An iteration is a backward pass there, a step here."""
        values, lines = convert(
            more=f"optimizer_config = dict({form})\ncheckpoint_config = dict(interval=40, by_epoch=False)\n"
            "log_config = dict(interval=50)\n"
            "lr_config = dict(policy='step', by_epoch=False, step=[400, 801], warmup='linear', warmup_iters=100)\n"
            "runner = dict(type='IterBasedRunner', max_iters=1000)"
        )
        assert values["global_batch"] == 8 * 16 * 4 and values["engine"] == {"micro_batch": 16}
        assert values["checkpoint"] == {"interval": 10, "by": "iter", "max_keep_ckpts": -1}
        assert values["log"] == {"interval": 13} and values["max_iters"] == 250 and "epochs" not in values
        assert values["lr"]["step"] == [100, 201] and values["lr"]["warmup_iters"] == 25
        assert lines == ["lr_config.step.1: 801 iterations are 200.25 steps of 4; rounded up"]

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("max_norm=5., norm_type=2", {"max_norm": 5.0}),
            ("max_norm=5., norm_type=1", {"max_norm": 5.0, "norm_type": 1}),
        ],
    )
    def test_clipping(self, convert, old, new):
        values, lines = convert(more=f"optimizer_config = dict(grad_clip=dict({old}))")
        assert values["optimizer"]["grad_clip"] == new and lines == []

    @pytest.mark.parametrize(
        ("old", "new", "lines"),
        [
            ("'bn': dict(weight_decay=0.), 'downsample.1': dict(weight_decay=0.)",
             [{"kind": ["norm"], "weight_decay": 0.0}], []),
            ("'\\Aneck.': dict(lr_mult=10, momentum=0), 'neck': dict(weight_decay_mult=0.1)",
             [{"match": "\\Aneck.", "lr_mult": 10, "momentum": 0}, {"match": "neck", "weight_decay_mult": 0.1}], []),
            ("'bn1': dict(weight_decay=0.), 'bias': dict(weight_decay=0.)",
             [{"match": "bn1|bias", "weight_decay": 0.0}], [f"bn1: {TAKEN}"]),
            ("'(bn|gn)(\\\\d+)?.(weight|bias)': dict(weight_decay=0.), 'bias': dict(weight_decay=0.)",
             [{"match": r"bn\d*\.|mlp\.[147]\.|bias", "weight_decay": 0.0}], []),
            ("'bn': dict(lr=1.), 'bias': dict(lr=1.), 'downsample.1': dict(lr=1.)",
             [{"kind": ["norm", "bias"], "lr": 1.0}], []),
            ("'neck': dict(lars_exclude=True, fix_lr=True, color=3, lr=1.)", [{"match": "neck", "lr": 1.0}],
             [f"neck.color: {NOTHING}", "neck.fix_lr: without SimSiamHook nothing there fixes the rate",
              "neck.lars_exclude: SGD has no lars_exclude"]),
            ("'(a+)+$': dict(lr=1.)", [{"match": "(a+)+$", "lr": 1.0}], [f'"(a+)+$": {TAKEN}']),
        ],
    )  # fmt: skip
    def test_paramwise_options(self, convert, old, new, lines):
        values, found = convert(training=TRAINING.replace("momentum=0.9", f"paramwise_options={{{old}}}"))
        assert values["optimizer"].get("paramwise") == new
        assert sorted(line.removeprefix("optimizer.paramwise_options.") for line in found) == sorted(lines)

    def test_paramwise_cfg(self, convert):
        """The longest part of a name decides alone there, which is reported where it matters."""
        keys = "{'neck': dict(decay_mult=2.), 'bn1': dict(lr_mult=0.5, decay_mult=0.)}"
        more = f"""
optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale='dynamic', clip_grad=dict(max_norm=3.), accumulative_counts=2,
    optimizer=dict(type='SGD', lr=0.1), paramwise_cfg=dict(norm_decay_mult=0., custom_keys={keys}))
"""
        values, lines = convert(data=CROP_1X, more=more)
        assert values["optimizer"]["paramwise"] == [
            {"match": "neck", "weight_decay_mult": 2.0}, {"match": "bn1", "lr_mult": 0.5, "weight_decay": 0.0},
        ]  # fmt: skip
        assert values["optimizer"]["grad_clip"] == {"max_norm": 3.0} and values["global_batch"] == 256
        assert [line.removeprefix("optim_wrapper.paramwise_cfg.").split(": ")[0] for line in lines[:3]] == [
            "norm_decay_mult", "custom_keys", "custom_keys.bn1",
        ]  # fmt: skip

    def test_the_fixed_rate_of_a_predictor(self, convert):
        """SimSiamHook puts the rate back to a number of its own."""
        neck = "dict(type='NonLinearNeck', in_channels=128, hid_channels=64, out_channels=128)"
        model = MOCO.replace("'MoCo'", "'SimSiam'").replace("MoCoV2Neck", "NonLinearNeck")
        model = model.replace("type='ContrastiveHead'", f"type='LatentPredictHead', predictor={neck}")
        training = TRAINING.replace("momentum=0.9", "paramwise_options={'predictor': dict(fix_lr=True)}")
        for rate, expected in ((0.1, {}), (0.05, {"lr": 0.05})):
            hook = f"custom_hooks = [dict(type='SimSiamHook', fix_pred_lr=True, lr={rate})]"
            values, lines = convert(model=model, training=training, more=hook)
            assert values["optimizer"]["paramwise"] == [{"match": "predictor", "fix_lr": True, **expected}]
            assert lines == []

    def test_seed_weights_and_resuming(self, convert):
        values, lines = convert(
            more="seed = 3\nload_from = 'a.pth'\nresume_from = 'b.pth'\nwork_dir = 'runs/{{fileBasenameNoExtension}}'\n"
            "workflow = [('train', 1), ('val', 1)]\nfp16 = dict(loss_scale=512.)\nema = 3\n"
            "custom_imports = dict(imports=['mine'])\nmomentum_config = dict(policy='x')"
        )
        assert (values["seed"], values["load_from"], values["load_strict"]) == (3, "a.pth", False)
        assert values["resume_from"] == "b.pth" and values["work_dir"] == "runs/moco_8xb16"
        assert [line.split(": ")[0] for line in lines] == [
            "workflow", "ema", "custom_imports", "momentum_config", "load_from", "resume_from", "work_dir", "fp16",
        ]  # fmt: skip
        assert convert(more="resume = True\nload_from = 'a.pth'")[0]["resume_from"] == "a.pth"
        assert convert(more="resume = True")[1] == ["resume: --resume goes on from a run's newest checkpoint"]
        assert convert(more="resume = False\nload_from = None") == convert()
        _, lines = convert(more="custom_imports = dict(imports=['mmselfsup.models', 'mmcls.models'])")
        assert lines == ["custom_imports: the old framework's own modules, whose classes are known here"]

    def test_thousands_of_findings(self, convert):
        """Thousands of mistakes are reported at once, and the file stays one that loads."""
        started = time.process_time()
        values, lines = convert(
            data=data_0x(", ".join(["dict(type='CenterCrop', size=32, odd=1)"] * 3000)),
            training=TRAINING.replace("momentum=0.9", f"paramwise_options={ {f'bn{i}': {} for i in range(3000)} }"),
            more="custom_hooks = [dict(type='" + "X" * 9999 + "')]",
        )
        assert len(values["data"]["views"][0]["transforms"]) == 3000 and len(lines) == 3000 + 2800 + 1
        assert max(map(len, lines)) < 1100 and time.process_time() - started < 20

    def test_variables(self, convert, write):
        """A variable whose value was used is left out; one that is not is reported, as a base's that is set anew."""
        _, lines = convert(more="used = 3\nidle = 4\nextended = []\nextended.append(used)\ncrop = dict(size=32)\n"
                           "data['train']['pipelines'][0][0]['ratio'] = [1, 1]\nratio = [1, 1]")  # fmt: skip
        text = "nothing here reads it: a key that has no counterpart, or a variable"
        assert lines == [*(f"{name}: {text}" for name in ("idle", "extended", "crop")),
                         "ratio: a variable, whose value stands where it was used"]  # fmt: skip
        write("base_8xb16.py", "root = 'a'\n" + MOCO + CROP.replace("'p'", "root + '/images'") + TRAINING)
        imported = import_config(write("new_8xb16.py", "_base_ = 'base_8xb16.py'\nroot = 'b'"))
        assert tomllib.loads(imported.text)["data"]["source"]["data_prefix"] == "a/images"
        assert imported.report.lines() == [f"new_8xb16.py:2: root: not converted: {text}"]

    def test_saving_and_logging(self, convert):
        values, lines = convert(
            more="checkpoint_config = dict(interval=2, max_keep_ckpts=5, save_optimizer=True)\nlog_level = 'DEBUG'\n"
            "log_config = dict(interval=7, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook'), "
            "dict(type='WandbLoggerHook', init_kwargs=dict(project='x')), dict(type='PaviLoggerHook')])"
        )
        assert values["checkpoint"] == {"interval": 2, "by": "epoch", "max_keep_ckpts": 5}
        assert values["log"] == {"interval": 7, "hooks": ["tensorboard", "wandb"], "level": "DEBUG"}
        assert sorted(lines) == [
            "checkpoint_config.save_optimizer: a checkpoint holds all that a run needs to go on",
            "log_config.hooks.2.init_kwargs: log.hooks names places, without arguments",
            'log_config.hooks.3: PaviLoggerHook: there are "tensorboard" and "wandb" here',
        ]
        values, lines = convert(
            more="default_hooks = dict(logger=dict(type='LoggerHook', interval=9), timer=dict(type='mmengine.hooks."
            "IterTimerHook'), checkpoint=dict(interval=-1), other=dict(type='X'), visualization=dict(type="
            "'VisualizationHook', enable=False), off=dict(type='Y', enable=False), none=None)\n"
            "custom_hooks = [dict(type='EMAHook', enable=False)]\n"
            "visualizer = dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')], name='x')\n"
            "log_level = 'CRITICAL'"
        )
        assert values["log"] == {"interval": 9, "hooks": ["tensorboard"]}
        assert values["checkpoint"] == {"max_keep_ckpts": -1}
        assert sorted(lines) == [
            "custom_hooks.0: it is switched off",
            "default_hooks.checkpoint.interval: every so many epochs or iterations, at least 1",
            "default_hooks.off: it is switched off",
            "default_hooks.other: there is no hook X here",
            "default_hooks.visualization: it is switched off",
            'log.level: expected "DEBUG", "INFO", "WARNING" or "ERROR", got the string "CRITICAL"',
        ]


class TestImages:
    """Sources, views and transforms."""

    @pytest.mark.parametrize(
        ("form", "old", "new", "lines"),
        [
            (data_0x, "RandomResizedCrop', size=96, scale=(0.05, 0.14), ratio=(1, 1), interpolation=3",
             {"type": "RandomResizedCrop", "size": 96, "scale": [0.05, 0.14], "ratio": [1, 1],
              "interpolation": "bicubic"}, []),
            (data_0x,
             "RandomResizedCrop', size=(96, 64), interpolation=1", {"type": "RandomResizedCrop", "size": [96, 64]},
             ['interpolation: there are "bilinear" and "bicubic" here']),
            (data_0x, "Resize', size=[32, 48]", {"type": "Resize", "size": [32, 48]}, []),
            (data_0x, "RandomCrop', size=32, padding=4", {"type": "RandomCrop", "size": 32},
             ["padding: images are not padded here"]),
            (data_0x, "RandomHorizontalFlip", {"type": "RandomHorizontalFlip", "p": 0.5}, []),
            (data_0x, "RandomGrayscale", {"type": "RandomGrayscale"}, []),
            (data_0x, "GaussianBlur', sigma_min=0.1, sigma_max=1.0",
             {"type": "GaussianBlur", "sigma_min": 0.1, "sigma_max": 1.0, "p": 0.5}, []),
            (data_0x, "Solarization", {"type": "Solarization", "p": 0.5}, []),
            (data_0x, "RandomRotation', degrees=2, expand=True", {"type": "RandomRotation", "degrees": 2},
             ["expand: a turned image keeps its size, with black corners"]),
            (data_0x, "ColorJitter', brightness=0.4, color=1", {"type": "ColorJitter", "brightness": 0.4},
             ["color: ColorJitter has nothing like it here"]),
            (data_0x, "RandomAppliedTrans', transforms=[dict(type='RandomGrayscale', p=0.5)]",
             {"type": "RandomGrayscale", "p": 0.25}, []),
            (data_0x,
             "RandomAppliedTrans', transforms=[dict(type='ColorJitter', hue=0.1), dict(type='RandomGrayscale', p=1.)]",
             {"type": "RandomAppliedTrans", "p": 0.5, "transforms": [
                 {"type": "ColorJitter", "hue": 0.1}, {"type": "RandomGrayscale", "p": 1.0}]}, []),
            (data_0x, "RandomAppliedTrans', transforms=[dict(type='Lighting')]", None,
             ["transforms.0: there is no transform Lighting here"]),
            (data_1x,
             "RandomResizedCrop', scale=96, crop_ratio_range=(0.2, 1.), aspect_ratio_range=(1, 1), backend='pillow'",
             {"type": "RandomResizedCrop", "size": 96, "scale": [0.2, 1.0], "ratio": [1, 1]}, []),
            (data_1x, "RandomResizedCrop', size=96, interpolation='bicubic'",
             {"type": "RandomResizedCrop", "size": 96, "interpolation": "bicubic"}, [CV2]),
            (data_1x, "Resize', scale=(48, 32), backend='pillow'", {"type": "Resize", "size": [32, 48]}, []),
            (data_1x,
             "mmcls.ResizeEdge', scale=48, edge='short', backend='pillow'", {"type": "Resize", "size": 48}, []),
            (data_1x, "CenterCrop', crop_size=32", {"type": "CenterCrop", "size": 32}, []),
            (data_1x, "RandomFlip', direction='vertical'", {"type": "RandomHorizontalFlip", "p": 0.5},
             ["direction: images are only flipped left to right"]),
            (data_1x, "RandomGrayscale', prob=0.2, keep_channels=True, channel_weights=(0.114, 0.587, 0.2989)",
             {"type": "RandomGrayscale", "p": 0.2}, []),
            (data_1x, "RandomGrayscale', keep_channels=True", {"type": "RandomGrayscale", "p": 0.5},
             ["channel_weights: gray is weighed as PIL does: [0.114, 0.587, 0.2989] of blue, green and red"]),
            (data_1x, "mmcls.GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=0.7",
             {"type": "GaussianBlur", "sigma_min": 0.1, "sigma_max": 2.0, "p": 0.7}, []),
            (data_1x, "mmcls.Solarize', thr=100", {"type": "Solarization", "threshold": 100, "p": 0.5}, []),
            (data_1x, "torchvision/RandomSolarize', threshold=100, prob=0.3",
             {"type": "Solarization", "threshold": 100, "p": 0.3}, []),
            (data_1x, "BEiTMaskGenerator', input_size=14", None, [": there is no transform BEiTMaskGenerator here"]),
        ],
    )  # fmt: skip
    def test_transforms(self, convert, form, old, new, lines):
        values, found = convert(data=form(f"dict(type='{old if chr(39) in old else old + chr(39)})"))
        assert [step for view in values["data"]["views"] for step in view["transforms"]] == ([new] if new else [])
        key = "data.train.pipelines.0.0" if form is data_0x else "train_dataloader.dataset.pipeline.1"
        assert [line.removeprefix(key).removeprefix(".") for line in found if line.startswith(key)] == lines

    @pytest.mark.parametrize(
        ("form", "old", "new", "lines"),
        [
            (data_0x, {"ann_file": "m.txt"}, {"type": "ImageNet", "data_prefix": "p", "ann_file": "m.txt"}, []),
            (data_0x, {"type": "ImageList"}, {"type": "ImageFolder", "data_prefix": "p"}, []),
            (data_0x, {"type": "Places205", "data_prefix": "/"}, {"type": "Places205", "data_prefix": "/"}, []),
            (data_0x, {"type": "CIFAR10", "data_prefix": "c/", "ann_file": "m.txt"},
             {"type": "CIFAR10", "data_prefix": "c"},
             ["ann_file: its files have fixed names, and it reads no list of images"]),
            (data_0x, {"data_prefix": None, "root": "r", "list_file": "m.txt", "memcached": True},
             {"type": "ImageNet", "data_prefix": "r", "ann_file": "m.txt"},
             ["memcached: images are read from the disk"]),
            (data_0x, {"file_client_args": {"backend": "petrel"}, "color_type": "grayscale", "zoom": 1, "classes": 3},
             {"type": "ImageNet", "data_prefix": "p"},
             ["classes: labels are not read for training", "color_type: images are read in color",
              "file_client_args.backend: images are files here", "zoom: ImageNet has nothing like it here"]),
            (data_1x, {"ann_file": "m.txt"}, {"type": "ImageNet", "data_prefix": "d/train", "ann_file": "d/m.txt"}, []),
            (data_1x, {"data_prefix": "x/"}, {"type": "ImageNet", "data_prefix": "d/x"}, []),
            (data_1x, {"data_prefix": {"img": "x", "seg_path": "y"}}, {"type": "ImageNet", "data_prefix": "d/x"},
             [f"data_prefix.seg_path: {NOTHING}"]),
            (data_1x, {"data_prefix": None, "split": "train"}, {"type": "ImageNet", "data_prefix": "d/train"}, []),
            (data_1x, {"type": "mmcls.CustomDataset", "ann_file": "/a/m.txt"},
             {"type": "ImageList", "data_prefix": "d/train", "ann_file": "/a/m.txt"}, []),
            (data_1x, {"type": "mmpretrain.datasets.CIFAR100", "ann_file": "meta/train.txt"},
             {"type": "CIFAR100", "data_prefix": "d/train"},
             ["ann_file: its files have fixed names, and it reads no list of images"]),
        ],
    )  # fmt: skip
    def test_sources(self, convert, form, old, new, lines):
        step = "dict(type='CenterCrop', size=32)" if form is data_0x else "dict(type='CenterCrop', crop_size=32)"
        values, found = convert(data=form(step, **old))
        assert values["data"]["source"] == new
        key = "data.train.data_source." if form is data_0x else "train_dataloader.dataset."
        assert sorted(line.removeprefix(key) for line in found if key in line) == lines

    def test_unknown_sources(self, convert):
        _, lines = convert(data=data_0x("dict(type='CenterCrop', size=32)", type="VOC"))
        assert "data.train.data_source: there is no source VOC here; one's own is made known by custom_imports" in lines
        _, lines = convert(data="data = dict(samples_per_gpu=8, train=dict(type='RepeatDataset', dataset=dict()))")
        assert any("there is no data set RepeatDataset here" in line for line in lines)

    def test_normalize(self, convert):
        """Of numbers from 0 to 255 or from 0 to 1, in the pipeline or beside the model."""
        crop, numbers = "dict(type='CenterCrop', size=32)", "mean=[127.5] * 3, std=[51] * 3"
        for data in (
            data_0x(f"{crop}, dict(type='Normalize', mean=[0.5] * 3, std=[0.2] * 3)"),
            data_1x(f"{crop}, dict(type='Normalize', {numbers}, to_rgb=True)"),
            data_1x(crop) + f"\nmodel['data_preprocessor'] = dict(type='SelfSupDataPreprocessor', {numbers})",
            data_1x(crop) + f"\ndata_preprocessor = dict({numbers}, bgr_to_rgb=True)",
            data_0x(crop).replace("num_views", "prefetch=True, num_views") + f"\nimg_norm_cfg = dict({numbers})",
        ):
            values, lines = convert(data=data)
            assert values["data"]["views"][0]["transforms"][-1] == {
                "type": "Normalize", "mean": [0.5] * 3, "std": [0.2] * 3,
            }  # fmt: skip
            assert values["vars"] == {"mean": [0.5] * 3, "std": [0.2] * 3} and lines == []

    def test_groups_of_views(self, convert):
        views = "dict(type='MultiView', num_views=[1, 3], transforms=[[dict(type='CenterCrop', crop_size=48)], " \
            "[dict(type='RandomResizedCrop', size=32, backend='pillow')]])"  # fmt: skip
        values, lines = convert(data=data_1x(f"dict(type='Resize', scale=64, backend='pillow'), {views}"))
        resize = {"type": "Resize", "size": [64, 64]}
        assert values["data"]["views"] == [
            {"num_views": 1, "transforms": [resize, {"type": "CenterCrop", "size": 48}]},
            {"num_views": 3, "transforms": [resize, {"type": "RandomResizedCrop", "size": 32}]},
        ]
        assert lines == []
        _, lines = convert(data=data_1x(f"dict(type='RandomFlip', prob=0.5), {views.replace('[1, 3]', '[1]')}"))
        assert lines == ["train_dataloader.dataset.pipeline.2.transforms: 2 pipelines for 1 numbers of views"]

    def test_loader_options(self, convert):
        more = "num_workers=3, pin_memory=True, sampler=dict(type='Odd', shuffle=False), collate_fn=dict(type='other')"
        values, lines = convert(data=CROP_1X.replace("drop_last=True", more))
        assert values["data"]["workers_per_gpu"] == 3 and values["data"]["drop_last"] is False
        assert [line.split(": ")[0].removeprefix("train_dataloader.") for line in lines] == [
            "sampler.type", "sampler.shuffle", "collate_fn.type", "pin_memory",
        ]  # fmt: skip


RESNET, VIT = {"type": "ResNet", "depth": 18}, {"type": "VisionTransformer", "frozen_patch_embed": False}
NECK = {"in_channels": 512, "hid_channels": 64, "out_channels": 128}
SIZES = "in_channels=512, hid_channels=64, out_channels=128"
MLP = {"type": "NonLinearNeck", **NECK, "with_bias": True, "with_last_bn": False, "with_last_bias": True}


class TestModels:
    """Methods, networks and the hooks that belong to them."""

    @pytest.mark.parametrize(
        ("part", "old", "new", "lines"),
        [
            ("backbone", "'ResNet', depth=18, out_indices=4, norm_cfg=dict(type='SyncBN', requires_grad=True)",
             {**RESNET, "out_indices": [4], "norm_cfg": {"type": "SyncBN"}}, []),
            ("backbone", "'ResNeXt', depth=50", {**RESNET, "depth": 50, "groups": 32, "width_per_group": 4}, []),
            ("backbone", "'openselfsup.ResNeXt', depth=50, groups=8, base_width=6",
             {**RESNET, "depth": 50, "groups": 8, "width_per_group": 6}, []),
            ("backbone", "'ResNet_CIFAR', depth=18, out_indices=(3,)",
             {**RESNET, "stem": "small", "out_indices": [4], "zero_init_residual": True}, []),
            ("backbone", "'mmcls.ResNet', depth=18, base_channels=128, stem_channels=128, with_cp=True",
             {**RESNET, "base_width": 128, "zero_init_residual": True},
             ["with_cp: it only trades memory for time; memory is engine.micro_batch here"]),
            ("backbone", "'mmpretrain.models.ResNet', depth=18, out_indices=(0, 3), zero_init_residual=False",
             {**RESNET, "out_indices": [1, 4], "zero_init_residual": False}, []),
            ("backbone", "'ResNet', depth=18, norm_cfg=dict(type='GN', num_groups=32), style='caffe', deep_stem=True, "
             "norm_eval=True, strides=(1, 2, 2, 1), pretrained='x.pth'", {**RESNET, "norm_eval": True},
             ["deep_stem: our ResNet has no such variant", "norm_cfg: there is no norm GN here; the default stands",
              f"pretrained: {WEIGHTS}", "strides: the stages are those of the paper here",
              "style: the stride is in the 3x3 convolution here"]),
            ("backbone", "'ResNet', depth=77", {"type": "ResNet"}, None),
            ("backbone", "'SwinTransformer'", None, None),
            ("backbone", "'MoCoV3ViT', img_size=224, patch_size=16",
             {**VIT, "arch": "base", "img_size": 224, "patch_size": 16}, []),
            ("backbone", "'VisionTransformer', arch='deit-small', stop_grad_conv1=True, drop_path_rate=0.1",
             {**VIT, "arch": "small", "num_heads": 6, "frozen_patch_embed": True},
             ["drop_path_rate: our VisionTransformer has nothing like it"]),
            ("backbone", "'mmcls.VisionTransformer', arch='small'",
             {**VIT, "embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0}, [LEARNED]),
            ("backbone", "'VisionTransformer', arch='giant'", VIT, ['arch: the string "giant" is no size of our ViT']),
            ("neck", "'LinearNeck', in_channels=512, out_channels=128, with_avg_pool=True",
             {"type": "LinearNeck", "in_channels": 512, "out_channels": 128}, []),
            ("neck", "'mmpretrain.models.LinearNeck', in_channels=512, out_channels=128",
             {"type": "LinearNeck", "in_channels": 512, "out_channels": 128},
             ["norm_cfg: LinearNeck has nothing like it here"]),
            ("neck", f"'NonLinearNeck', {SIZES}, with_avg_pool=False", {"type": "NonLinearNeck", **NECK}, [POOLED]),
            ("neck", f"'NonLinearNeckSimCLR', {SIZES}, sync_bn=False, with_bias=True, with_last_bn=False",
             {**MLP, "norm_cfg": {"type": "BN"}}, []),
            ("neck", f"'NonLinearNeckV2', {SIZES}", {**MLP, "norm_cfg": {"type": "BN"}}, []),
            ("neck", "'AvgPool2dNeck', output_size=2", {"type": "AvgPool2dNeck", "in_channels": 512},
             ["output_size: the whole map is averaged here"]),
            ("neck", f"'DenseCLNeck', {SIZES}, num_grid=7", {"type": "DenseCLNeck", **NECK},
             ["num_grid: the dense branch keeps all cells of the map here"]),
            ("neck", f"'SwAVNeck', {SIZES}, with_l2norm=False", {**MLP, "num_layers": 2},
             ["with_l2norm: embeddings are normalized here"]),
            ("neck", "'MAEPretrainDecoder', depth=8", None, None),
            ("head", "'ContrastiveHead', temperature=0.2, loss=dict(type='mmcls.CrossEntropyLoss', loss_weight=0.5)",
             {"type": "ContrastiveHead", "temperature": 0.2},
             ["loss.loss_weight: the weight of this loss is 1.0 here"]),
            ("head", "'ContrastiveHead', loss=dict(type='FocalLoss', gamma=2)", {"type": "ContrastiveHead"},
             ["loss: the loss of this head is CrossEntropyLoss here", f"loss.gamma: {NOTHING}"]),
            ("head", "'ClsHead', num_classes=4, init_cfg=dict(type='Normal', std=0.1, layer='Linear')",
             {"type": "ClsHead", "in_channels": 2048, "num_classes": 4, "init_std": 0.1}, []),
            ("head", "'ClsHead', init_cfg=dict(type='Xavier', layer='Linear')",
             {"type": "ClsHead", "in_channels": 2048, "num_classes": 1000}, [f"init_cfg: {WEIGHTS}"]),
            ("head", "'LatentCrossCorrelationHead', in_channels=128, lambd=0.01",
             {"type": "LatentCrossCorrelationHead", "lambd": 0.01}, []),
            ("head", "'LatentCrossCorrelationHead', in_channels=9, loss=dict(type='CrossCorrelationLoss', lambd=0.02)",
             {"type": "LatentCrossCorrelationHead", "lambd": 0.02}, ["in_channels: the neck gives 128 channels"]),
            ("head", "'MoCoV3Head', temperature=0.5, predictor=dict(type='LinearNeck', in_channels=128, "
             "out_channels=128), loss=dict(type='CrossEntropyLoss', loss_weight=3)",
             {"type": "MoCoV3Head", "temperature": 0.5,
              "predictor": {"type": "LinearNeck", "in_channels": 128, "out_channels": 128}},
             ["loss.loss_weight: the weight of this loss is 1.0 here"]),
            ("head", "'SwAVHead', feat_dim=128, num_crops=[2, 6]", {"type": "SwAVHead", "feat_dim": 128},
             ["num_crops: the loss takes all views, which are 2"]),
            ("head", "'MAEPretrainHead'", None, None),
        ],
    )  # fmt: skip
    def test_networks(self, convert, part, old, new, lines):
        parts = {"backbone": "'ResNet', depth=18, out_indices=[4]", "head": "'ContrastiveHead'",
                 "neck": "'MoCoV2Neck', in_channels=512, hid_channels=512, out_channels=128"}  # fmt: skip
        values, found = convert(model=MOCO.replace(f"dict(type={parts[part]})", f"dict(type={old})"))
        assert values["model"].get(part) == new
        if lines is not None:
            found = [line.removeprefix(f"model.{part}.") for line in found if line.startswith("model")]
            assert sorted(found) == sorted(lines)

    def test_unknown_arguments(self, convert):
        more = "type='MoCo', queue_len=4096, shuffle=False, train_cfg=dict(), test_cfg=dict(a=1)"
        values, lines = convert(model=MOCO.replace("type='MoCo'", more))
        assert values["model"]["queue_len"] == 4096
        assert lines == [f"model.{key}: MoCo has nothing like it here" for key in ("shuffle", "test_cfg")]

    @pytest.mark.parametrize(
        ("old", "more", "momentum"),
        [
            ("type='MoCo', momentum=0.001", "", 0.001),
            ("type='MoCo', momentum=0.001", "default_scope = 'mmpretrain'", 0.999),
            ("type='mmpretrain.models.selfsup.MoCo', momentum=0.001", "", 0.999),
            ("type='mmpretrain.MoCo'", "", None),
            ("type='mmselfsup.models.MoCo', momentum=0.99", "", 0.99),
            ("type='mmselfsup.models.MoCo', momentum=0.99", "default_scope = 'mmpretrain'", 0.99),
            ("type='BYOL'", "", 0.996),
            ("type='mmpretrain.BYOL'", "", 0.996),
            ("type='mmpretrain.models.selfsup.BYOL', base_momentum=0.01", "", 0.99),
            ("type='MoCoV3'", "", None),
            ("type='mmpretrain.MoCoV3'", "", None),
        ],
    )
    def test_momentum(self, convert, old, more, momentum):
        """MMPretrain states 1 minus it; the framework is that of the class, else that of the config."""
        model = convert(model=MOCO.replace("type='MoCo'", old), more=more)[0]["model"]
        assert model.get("momentum", model.get("base_momentum")) == momentum

    def test_openselfsup(self, convert):
        """Two equal views of a single pipeline, a blur that is always on, an edge filter."""
        data = CROP.replace("MultiView", "Contrastive").replace("samples", "imgs").replace("num_views=[2], ", "")
        data = data.replace("pipelines=[[", "pipeline=[dict(type='GaussianBlur', sigma_min=0.1, sigma_max=2.), ")
        model = MOCO.replace("'MoCo'", "'MOCO'").replace("MoCoV2Neck", "NonLinearNeckV1")
        values, lines = convert(model=model, data=data.replace("]]", "]"), more="prefetch = False")
        assert values["model"]["type"] == "MoCo" and values["model"]["neck"]["type"] == "MoCoV2Neck"
        (views,) = values["data"]["views"]
        assert views["num_views"] == 2 and views["transforms"][0]["p"] == 1.0
        assert lines == ["prefetch: images are decoded and normalized ahead of the step anyway"]

    @pytest.mark.parametrize(
        ("method", "hook", "new", "lines"),
        [
            ("DenseCL", "dict(type='DenseCLHook', x=1)", {"loss_lambda_start_iters": 1000},
             ["custom_hooks.0.x: DenseCL has nothing like it here"]),
            ("BYOL", "dict(type='BYOLHook', end_momentum=0.999)", {"base_momentum": 0.996, "end_momentum": 0.999}, []),
            ("BYOL", "dict(type='MomentumUpdateHook', update_interval=4)", {"base_momentum": 0.996},
             ["custom_hooks.0.update_interval: the teacher moves once in a step here: every 1 backward passes"]),
            ("MoCoV3", "dict(type='MomentumUpdateHook', end_momentum=0.9)", {},
             ["custom_hooks.0.end_momentum: the momentum ends at 1 here"]),
            ("SwAV", "dict(type='SwAVHook', priority='HIGH', batch_size=16, queue_length=64, epoch_queue_starts=3, "
             "frozen_layers_cfg=dict(prototypes=7, neck=3), interval=2)",
             {"queue_length": 64, "epoch_queue_starts": 3, "freeze_prototypes_iters": 7},
             ["custom_hooks.0.frozen_layers_cfg.neck: only SwAV's prototypes can be frozen for some time; "
              "[[optimizer.paramwise]] has freeze_iters",
              "custom_hooks.0.interval: the queue is part of every checkpoint"]),
            ("DeepCluster", "dict(type='DeepClusterHook', clustering=dict(type='Kmeans', k=10, pca_dim=64), "
             "unif_sampling=False, reweight=True, reweight_pow=0.7, initial=True, interval=3)",
             {"pca_dim": 64, "uniform_sampling": False, "reweight": True, "reweight_power": 0.7},
             ["custom_hooks.0.clustering.k: the head has 4 classes, one for each cluster",
              "custom_hooks.0.interval: clusters are made anew before every epoch here"]),
            ("DeepCluster", "dict(type='DeepClusterHook', clustering=dict(type='PIC', k=4, sigma=0.2))", {},
             ["custom_hooks.0.clustering: there is no clustering PIC here, only k-means",
              f"custom_hooks.0.clustering.sigma: {NOTHING}"]),
            ("ODC", "dict(type='DeepClusterHook', clustering=dict(type='Kmeans', k=4), init_memory=True)", {},
             ["custom_hooks.0.clustering.pca_dim: the first clusters are those of the features themselves"]),
            ("ODC", "dict(type='ODCHook', centroids_update_interval=5, deal_with_small_clusters_interval=2, "
             "reweight=False, reweight_pow=0.5)",
             {"centroids_update_interval": 5, "deal_with_small_clusters_interval": 2, "reweight_power": 0.0}, []),
            ("MoCo", "dict(type='EMAHook', momentum=0.1), dict(type='EMAHook')", {},
             ["custom_hooks.1: a second EMAHook", "custom_hooks.0: there is no hook EMAHook here"]),
        ],
    )  # fmt: skip
    def test_hooks(self, convert, method, hook, new, lines):
        model = f"model = dict(type='{method}', head=dict(type='ClsHead', in_channels=512, num_classes=4))\n"
        values, found = convert(model=model, more=f"custom_hooks = [{hook}]")
        assert {key: value for key, value in values["model"].items() if key not in ("type", "head")} == new
        assert sorted(line for line in found if line.startswith("custom_hooks")) == sorted(lines)
