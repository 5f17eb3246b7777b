"""Backbones of torchvision by name. The library is imported when such a backbone is built."""

from typing import Any

import torch
from torch import Tensor, nn

from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.library import created, imported, outputs_of, require_known
from sslrun.nn.norm import convert_batch_norms, group_norms

OWN_SIZE = 224  # height and width of the image that shows what a network returns
HEADS = ("fc", "classifier", "head", "heads")
# The parts of torchvision's networks before pooling and classifier; the first line of which a network has all.
_PARTS = (
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),  # ResNet, ResNeXt, wide ResNet
    ("features", "norm", "permute"),  # Swin
    ("features",),  # ConvNeXt, DenseNet, EfficientNet, MobileNet, VGG, ...
    ("stem", "trunk_output"),  # RegNet
    ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),  # ShuffleNet
    ("layers",),  # MNASNet
    ("conv_proj", "encoder"),  # the vision transformer
)


class torchvision(Backbone):  # the name of the class is the `type` in a recipe, and the library's
    """A network of torchvision, without its classifier and with random weights; nothing is downloaded.

    Its output is the feature map before the pooling; of a vision transformer, the class token behind the last norm. In
    a checkpoint the parameters have torchvision's names behind `backbone.net.`, and `load_from` takes a state dict of
    torchvision's (with load_strict = false).

    Args:
        name: the network, as in torchvision.models.list_models(): "resnet18", "convnext_tiny", "vit_b_16".
        in_channels: channels of the input images. The first convolution is a new one where they are not 3; its weights
            are drawn from a normal distribution of the same standard deviation.
        sync_bn: whether BatchNorm computes its statistics over the global batch (SyncBN) and not over groups of
            data.samples_per_gpu samples.
        model_args: further keyword arguments of the network's function in torchvision.models, such as
            `{ image_size = 96 }` of a vision transformer or `{ zero_init_residual = true }` of a ResNet.
    """

    def __init__(
        self, name: str, in_channels: int = 3, sync_bn: bool = False, model_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels)
        self.arguments = model_args or {}
        for argument in ("weights", "weights_backbone", "num_classes", "progress"):
            if argument in self.arguments:
                raise UsageError(f"model_args may not have {argument}: weights come from load_from")
        models = imported("torchvision").models
        require_known("torchvision", name, models.list_models(module=models))
        self.name, self.in_channels = name, in_channels
        self.net: Any = self.network()
        children = dict(self.net.named_children())
        self.parts = next((parts for parts in _PARTS if all(part in children for part in parts)), None)
        if self.parts is None or getattr(self.net, "aux_logits", False):
            raise UsageError(f"torchvision's {name} has no feature map that is known here; timm may have the network")
        self.is_transformer = self.parts == ("conv_proj", "encoder")
        self.ends_in_relu = type(self.net).__name__ == "DenseNet"  # in its forward, not in a part
        size = getattr(self.net, "image_size", OWN_SIZE)
        outputs = outputs_of(self.net, self.outputs, (in_channels, size, size))
        self.num_features = outputs.shapes[-1][1]
        if sync_bn:
            convert_batch_norms(self.net)
            for layer in group_norms(self.net):
                layer.sync = True

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.outputs(self.net, images)

    def layers(self) -> list[list[str]]:
        if self.is_transformer:
            first = ["net.class_token", "net.conv_proj", "net.encoder.pos_embedding"]
            return [first, *([f"net.encoder.layers.{name}"] for name, _ in self.net.encoder.layers.named_children())]
        assert self.parts is not None
        depths = []
        for part in self.parts:
            is_list = part in ("features", "layers")
            inner = self.net.get_submodule(part).named_children() if is_list else []
            depths += [f"net.{part}.{name}" for name, _ in inner] if is_list else [f"net.{part}"]
        return [[name] for name in depths if list(self.get_submodule(name).parameters())]

    def branches(self) -> list[nn.Module]:
        last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}
        found = []
        for module in self.net.modules():
            kind = type(module).__name__
            if kind == "StochasticDepth":
                found.append(module)
            elif kind in last:
                found.append(module.get_submodule(last[kind]))
        if not found:
            raise UsageError(f"torchvision's {self.name} does not show its residual branches, which drop_path needs")
        return found

    def network(self) -> nn.Module:
        """A new network of torchvision like this one, with random weights."""
        get_model = imported("torchvision").models.get_model
        net = created("torchvision", self.name, get_model, weights=None, **self.arguments)
        for head in HEADS:
            if hasattr(net, head):
                setattr(net, head, nn.Identity())
        if self.in_channels != 3:
            _replace_first_convolution(net, self.in_channels)
        return net

    def making(self) -> dict[str, Any]:
        """How torchvision makes this network: metadata of an export."""
        head = next(head for head in HEADS if hasattr(self.net, head))
        about = {"model_args": self.arguments, "classifier": f"none: set {head} to torch.nn.Identity()"}
        return about if self.in_channels == 3 else {**about, "in_channels": self.in_channels}

    def export_note(self) -> str | None:
        """What somebody who uses the network in torchvision would not notice."""
        if self.in_channels == 3:
            return None
        return f"torchvision's {self.name} takes 3 channels: give it a first convolution of {self.in_channels}"

    def outputs(self, net: Any, images: Tensor) -> list[Tensor]:
        """The backbone's outputs, of another network of this name."""
        if self.is_transformer:
            return [net(images)]  # its head is an Identity
        assert self.parts is not None
        x = images
        for part in self.parts:
            x = net.get_submodule(part)(x)
        return [x.relu() if self.ends_in_relu else x]


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    """Lets a network take images of another number of channels."""
    name, old = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    own = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **own)
    with torch.no_grad():
        new.weight.normal_(std=float(old.weight.std()))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, new)
