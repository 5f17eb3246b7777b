"""Small checkpoints as other programs save them, for the tests of import-weights."""

import argparse
import collections
import math

import numpy as np
import torch

from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer

VIT = {"embed_dim": 192, "depth": 2, "img_size": 32, "patch_size": 8, "mlp_ratio": 2.0}


def resnet(depth=18, seed=1, **keys) -> dict[str, torch.Tensor]:
    """Weights by torchvision's names; all elements differ."""
    torch.manual_seed(seed)
    tensors = ResNet(depth, base_width=4, **keys).state_dict()
    return {name: torch.randn(t.shape) if t.is_floating_point() else torch.tensor(seed) for name, t in tensors.items()}


def vit(seed=1, heads=3, **keys) -> dict[str, torch.Tensor]:
    """Weights by timm's names."""
    torch.manual_seed(seed)
    tensors = VisionTransformer(num_heads=heads, **{**VIT, **keys}).state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def linear(prefix, inputs=32, outputs=6):
    return {f"{prefix}.weight": torch.randn(outputs, inputs), f"{prefix}.bias": torch.randn(outputs)}


def sequential(tensors, first=4):
    """nn.Sequential of torchvision's children without the last: 0 conv1, 1 bn1, 2 relu, 3 maxpool, 4 to 7 layers."""
    number = {"conv1": 0, "bn1": 1, **{f"layer{stage}": first + stage - 1 for stage in (1, 2, 3, 4)}}
    return {f"{number[name.split('.')[0]]}.{name.split('.', 1)[1]}": tensor for name, tensor in tensors.items()}


def renamed(tensors, top, block):
    """A transformer with other names; the first entry of `block` is the prefix of a block's number."""
    theirs = {}
    for name, tensor in tensors.items():
        part, _, last = name.rpartition(".")
        if name.startswith("blocks."):
            _, index, *middle = part.split(".")
            theirs[f"{block['']}{index}.{block['.'.join(middle)].format(last)}"] = tensor
        else:
            theirs[top[part or name].format(last)] = tensor
    return theirs


def mmselfsup_vit(tensors):
    top = {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj": "patch_embed.projection.{}",
        "norm": "ln1.{}",
    }
    block = {"": "layers.", "norm1": "ln1.{}", "norm2": "ln2.{}", "attn.qkv": "attn.qkv.{}",
             "attn.proj": "attn.proj.{}", "mlp.fc1": "ffn.layers.0.0.{}", "mlp.fc2": "ffn.layers.1.{}"}  # fmt: skip
    return renamed(tensors, top, block)


def torchvision_vit(tensors):
    top = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj.{}",
        "norm": "encoder.ln.{}",
    }
    block = {"": "encoder.layers.encoder_layer_", "norm1": "ln_1.{}", "norm2": "ln_2.{}",
             "attn.qkv": "self_attention.in_proj_{}",
             "attn.proj": "self_attention.out_proj.{}", "mlp.fc1": "mlp.0.{}", "mlp.fc2": "mlp.3.{}"}  # fmt: skip
    return renamed(tensors, top, block)


def transformers_vit(tensors):
    """A ViTModel: query, key and value are tensors of their own."""
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection.{}",
        "norm": "layernorm.{}",
    }
    block = {"": "encoder.layer.", "norm1": "layernorm_before.{}", "norm2": "layernorm_after.{}",
             "attn.qkv": "attention.attention.qkv.{}", "attn.proj": "attention.output.dense.{}",
             "mlp.fc1": "intermediate.dense.{}", "mlp.fc2": "output.dense.{}"}  # fmt: skip
    theirs = {}
    for name, tensor in renamed(tensors, top, block).items():
        if ".qkv." in name:
            width = len(tensor) // 3
            for place, part in enumerate(("query", "key", "value")):
                theirs[name.replace("qkv", part)] = tensor[place * width : (place + 1) * width].clone()
        else:
            theirs[name] = tensor
    return theirs


def transformers_resnet(tensors):
    """A ResNetModel."""
    theirs = {}
    for name, tensor in tensors.items():
        *place, layer, last = name.split(".")
        if not place:
            theirs[f"embedder.embedder.{'convolution' if layer == 'conv1' else 'normalization'}.{last}"] = tensor
            continue
        stage, block = int(place[0][-1]) - 1, place[1]
        inner, kind = f"layer.{int(layer[-1]) - 1}", "convolution" if "conv" in layer else "normalization"
        if place[2:] == ["downsample"]:
            inner, kind = "shortcut", ["convolution", "normalization"][int(layer)]
        theirs[f"encoder.stages.{stage}.layers.{block}.{inner}.{kind}.{last}"] = tensor
    return theirs


def rows_then_columns(grid, width):
    """MoCo v3's positional embeddings, by its formula, patch by patch."""
    table = torch.zeros(1, 1 + grid * grid, width)
    for row in range(grid):
        for column in range(grid):
            for k in range(width // 4):
                frequency = 10000 ** (-k / (width // 4))
                place = table[0, 1 + row * grid + column]
                place[k], place[k + width // 4] = math.sin(row * frequency), math.cos(row * frequency)
                place[k + width // 2] = math.sin(column * frequency)
                place[k + width // 2 + width // 4] = math.cos(column * frequency)
    return table


def optimizer(tensors):
    """The state of torch's SGD in a checkpoint."""
    state = {index: {"momentum_buffer": torch.zeros(2)} for index in range(3)}
    return {"state": state, "param_groups": [{"lr": 0.03, "params": [0, 1, 2]}]}


class HistoryBuffer:
    """Takes the place of mmengine's class, which is in the files of MMSelfSup 1.x."""

    def __init__(self):
        self.history = np.arange(4.0)
        self.latest = np.float64(2.5)


NET, OTHER = resnet(), resnet(seed=2)
SMALL = resnet(stem="small")
TRANSFORMER = vit()
MOCO_V3 = {**vit(embed_dim=384), "pos_embed": rows_then_columns(4, 384)}

# name: (content, expected weights, expected origin, expected backbone table, words of the report)
CHECKPOINTS = {
    "MoCo": (
        {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {
                **under("module.encoder_q.", NET), **linear("module.encoder_q.fc.0"), **linear("module.encoder_q.fc.2"),
                **under("module.encoder_k.", OTHER), **linear("module.encoder_k.fc.0"),
                "module.queue": torch.randn(6, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            },
            "optimizer": optimizer(NET),
        },
        NET, "the MoCo authors', query encoder", {"depth": 18, "base_width": 4},
        ["module.encoder_q.fc (4)", "module.encoder_k", "module.queue (1)", "optimizer (3)", "missing: nothing"],
    ),
    "MoCo v3": (
        {
            "epoch": 300,
            "state_dict": {
                **under("module.base_encoder.", vit(embed_dim=384)), **linear("module.base_encoder.head.0"),
                **under("module.momentum_encoder.", vit(2, embed_dim=384)), **linear("module.predictor.0"),
            },
            "scaler": {"scale": 65536.0},
        },
        vit(embed_dim=384), "the MoCo v3 authors'", {"num_heads": 12, "embed_dim": 384, "depth": 2},
        ["module.momentum_encoder", "module.predictor", "heads"],
    ),
    "DINO transformer": (
        {
            "student": {**under("module.backbone.", vit(2)), **linear("module.head.mlp.0")},
            "teacher": {**under("backbone.", TRANSFORMER), **linear("head.mlp.0")},
            "optimizer": optimizer(NET),
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_tiny", lr=np.float64(5e-4), device=torch.device("cpu")),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        TRANSFORMER, "the DINO authors', teacher", {"num_heads": 3, "img_size": 32, "patch_size": 8},
        ["argparse.Namespace", "student (32)", "teacher.head (2)"],
    ),
    "DINO ResNet": (
        {
            "student": {**under("module.backbone.", OTHER), **linear("module.head.mlp.0")},
            "teacher": {**under("module.backbone.", NET), **linear("module.head.mlp.0")},
        },
        NET, "the DINO authors', teacher", {"depth": 18, "base_width": 4}, [],
    ),
    "MAE": (
        {
            "model": {
                **TRANSFORMER, "mask_token": torch.zeros(1, 1, 16), "decoder_pos_embed": torch.zeros(1, 17, 16),
                **under("decoder_", {k: v for k, v in vit(2).items() if k.startswith("blocks.0")}),
                **linear("decoder_embed"), **linear("decoder_norm"), **linear("decoder_pred"),
            },
            "epoch": 800,
            "args": argparse.Namespace(model="mae_vit"),
        },
        TRANSFORMER, "such as the MAE authors'", {"embed_dim": 192, "mlp_ratio": 2.0},
        ["model.decoder_blocks", "model.mask_token", "model.decoder_pred (2)"],
    ),
    "MMSelfSup 0.x": (
        {
            "meta": {"epoch": 200, "mmselfsup_version": "0.9.0", "mmcv_version": "1.5.0", "hook_msgs": {}},
            "state_dict": {
                **under("backbone.", NET), **under("encoder_q.0.", NET), **linear("encoder_q.1.mlp.0"),
                **under("encoder_k.0.", OTHER), "queue": torch.randn(6, 8),
            },
        },
        NET, "MMSelfSup's, 0.x", {"depth": 18}, ["encoder_q (122)", "encoder_k (120)", "queue"],
    ),
    "MMSelfSup 1.x": (
        {
            "meta": {"mmengine_version": "0.7.0", "experiment_name": "moco", "time": "2023"},
            "state_dict": {
                **under("backbone.", NET), **linear("neck.mlp.0"), **under("encoder_k.module.0.", OTHER),
                "encoder_k.steps": torch.tensor(3), "data_preprocessor.mean": torch.zeros(3, 1, 1),
            },
            "message_hub": {"log_scalars": collections.OrderedDict({"train/loss": HistoryBuffer()})},
        },
        NET, "MMSelfSup's, 1.x", {"depth": 18}, ["neck", "encoder_k", "data_preprocessor", "HistoryBuffer"],
    ),
    "MMSelfSup's transformer": (
        {
            "meta": {"mmengine_version": "0.7.0"},
            "state_dict": {
                **under("backbone.", mmselfsup_vit(TRANSFORMER)), "neck.mask_token": torch.zeros(1, 1, 8),
                **under("neck.decoder_", mmselfsup_vit(vit(2))),
            },
        },
        TRANSFORMER, "MMSelfSup's, 1.x", {"embed_dim": 192}, ["neck"],
    ),
    "MMSelfSup's extracted backbone": (
        {"state_dict": NET, "author": "MMSelfSup"}, NET, "such as MMSelfSup extracts", {"depth": 18},
        ["dropped: nothing"],
    ),
    "lightly, nn.Sequential": (
        {
            "epoch": 10, "global_step": 100, "pytorch-lightning_version": "2.1.0",
            "state_dict": {
                **under("backbone.", sequential(NET)), **linear("projection_head.layers.0"),
                **under("backbone_momentum.", sequential(OTHER)),
            },
            "loops": {"fit_loop": {"state_dict": {}}}, "hyper_parameters": {"lr": 0.1},
        },
        NET, "lightly's", {"depth": 18}, ["projection_head", "backbone_momentum"],
    ),
    "lightly's small ResNet": (
        {
            "pytorch-lightning_version": "1.9.0",
            "state_dict": under("backbone.", {
                name.replace("downsample", "shortcut"): tensor for name, tensor in SMALL.items()
            }),
        },
        SMALL, "lightly's", {"stem": "small", "depth": 18}, ["no max-pool"],
    ),
    "lightly's transformer": (
        {
            "pytorch-lightning_version": "2.1.0",
            "state_dict": {**under("backbone.vit.", TRANSFORMER), "backbone.mask_token": torch.zeros(1, 1, 192)},
        },
        TRANSFORMER, "lightly's", {"embed_dim": 192}, ["backbone.mask_token"],
    ),
    "lightly's DINO": (
        {
            "pytorch-lightning_version": "2.1.0",
            "state_dict": {
                **under("student_backbone.", sequential(OTHER)), **under("teacher_backbone.", sequential(NET)),
            },
        },
        NET, "lightly's, teacher", {"depth": 18}, ["student_backbone"],
    ),
    "solo-learn": (
        {
            "pytorch-lightning_version": "1.9.0",
            "state_dict": {
                **under("backbone.", SMALL), **linear("backbone.fc"), **linear("classifier"), **linear("projector.0"),
                **under("momentum_backbone.", resnet(seed=2, stem="small")),
            },
            "hyper_parameters": {"cfg": argparse.Namespace(name="x")},
        },
        SMALL, "solo-learn's", {"stem": "small"}, ["pads it by 2", "backbone.fc (2)", "classifier (2)"],
    ),
    "solo-learn's transformer": (
        {
            "pytorch-lightning_version": "1.9.0",
            "state_dict": {**under("backbone.", TRANSFORMER), **linear("classifier"), **linear("head.mlp.0")},
        },
        TRANSFORMER, "solo-learn's", {"embed_dim": 192}, ["classifier (2)"],
    ),
    "SimSiam": (
        {"state_dict": {**under("module.encoder.", NET), **linear("module.encoder.fc"), **linear("module.predictor")}},
        NET, "the SimSiam authors'", {"depth": 18}, ["module.predictor"],
    ),
    "Barlow Twins": (
        {"epoch": 1, "model": {**under("module.backbone.", NET), **linear("module.projector.0")}},
        NET, "the Barlow Twins or VICReg authors'", {"depth": 18}, ["module.projector"],
    ),
    "SwAV": (
        {**under("module.", NET), **linear("module.projection_head.0"), "module.prototypes.weight": torch.randn(4, 8)},
        NET, "such as the SwAV authors'", {"depth": 18}, ["module.projection_head", "module.prototypes"],
    ),
    "torchvision ResNet": ({**NET, **linear("fc")}, NET, "such as torchvision's", {"depth": 18}, ["fc (2)"]),
    "torchvision bottlenecks": (
        {**resnet(50, width_per_group=128), **linear("fc")}, resnet(50, width_per_group=128), "such as torchvision's",
        {"depth": 50, "width_per_group": 128}, [],
    ),
    "torchvision ResNeXt": (
        resnet(50, groups=4, width_per_group=32), resnet(50, groups=4, width_per_group=32), "such as torchvision's",
        {"depth": 50, "groups": 4, "width_per_group": 32}, ["ResNeXt-50"],
    ),
    "torchvision transformer": (
        {**torchvision_vit(TRANSFORMER), **linear("heads.head")}, TRANSFORMER, "such as torchvision's",
        {"embed_dim": 192}, ["heads (2)"],
    ),
    "torchvision's small ResNet, nn.Sequential": (
        {"state_dict": under("backbone.", sequential(SMALL, first=3)), "pytorch-lightning_version": "1.9.0"},
        SMALL, "lightly's", {"stem": "small", "depth": 18}, ["no max-pool"],
    ),
    "VISSL": (
        {
            "phase_idx": 2, "iteration": 5, "config": argparse.Namespace(a=1),
            "classy_state_dict": {"base_model": {"model": {
                "trunk": under("_feature_blocks.", NET), "heads": linear("0.clf.0"),
            }}},
        },
        NET, "VISSL's", {"depth": 18}, ["classy_state_dict.base_model.model.heads"],
    ),
    "a transformer of transformers": (
        {**under("vit.", transformers_vit(TRANSFORMER)), **linear("vit.pooler.dense"), **linear("classifier")},
        TRANSFORMER, "a network of transformers", {"embed_dim": 192, "num_heads": 3}, ["classifier (2)", "vit.pooler"],
    ),
    "a ResNet of transformers": (
        {**under("resnet.", transformers_resnet(resnet(50))), **linear("classifier.1")},
        resnet(50), "a network of transformers", {"depth": 50}, ["classifier"],
    ),
    "MSN": (
        {"target_encoder": under("module.", TRANSFORMER), "encoder": under("module.", vit(2)), "epoch": 1},
        TRANSFORMER, "the I-JEPA or MSN authors', target encoder", {"num_heads": 3}, ["encoder"],
    ),
    "torch.compile and FSDP": (
        {"model": under("_orig_mod.", {
            name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor for name, tensor in TRANSFORMER.items()
        })},
        TRANSFORMER, "a network under model.", {"depth": 2}, [],
    ),
    "DINOv2's chunks of blocks": (
        {"teacher": {**under("backbone.", {
            name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): tensor
            for name, tensor in TRANSFORMER.items()
        }), **linear("dino_head.mlp.0")}},
        TRANSFORMER, "teacher", {"depth": 2}, ["teacher.dino_head (2)"],
    ),
    "MoCo v3's small transformer in another wrapper": (
        {"state_dict": under("backbone.", MOCO_V3), "pytorch-lightning_version": "1.9.0"},
        MOCO_V3, "lightly's", {"num_heads": 12, "embed_dim": 384}, ["12 attention heads: as in the small"],
    ),
    "DINO's small transformer": (
        vit(embed_dim=384), vit(embed_dim=384), "such as", {"num_heads": 6, "embed_dim": 384}, ["6 attention heads"],
    ),
    "timm transformer": ({**TRANSFORMER, **linear("head")}, TRANSFORMER, "such as torchvision's", {}, ["head (2)"]),
}  # fmt: skip
