"""Backbones of timm by name. The library is imported when such a backbone is built."""

from typing import Any

from torch import Tensor, nn

from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.library import created, imported, outputs_of, require_known
from sslrun.nn.norm import convert_batch_norms, group_norms

OWN_SIZE = 224  # of the image that shows what a network returns, where timm states none
# Keyword arguments of timm.create_model that are keys here, or would load weights.
_NOT_ARGUMENTS = {
    "in_chans": "in_channels",
    "img_size": "img_size",
    "drop_path_rate": "drop_path",
    **dict.fromkeys(("num_classes", "global_pool", "features_only", "out_indices", "scriptable", "exportable"), ""),
    **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"), ""),
}


class timm(Backbone):  # the name of the class is the `type` in a recipe, and the library's
    """A network of timm (Wightman 2019), without its classifier and with random weights; nothing is downloaded.

    Its output is timm's `forward_features` if that is a feature map, and otherwise (vision transformers) what the
    network returns with `num_classes = 0`: the class token, or a mean of tokens. Parameters that this output does not
    depend on, such as a norm behind the pooling, are not trained. In a checkpoint the parameters have timm's names
    behind `backbone.net.`, and `load_from` takes a state dict of timm's (with load_strict = false).

    Args:
        name: the network, as in timm.list_models(): "resnet18", "convnext_atto", "vit_small_patch16_224".
        in_channels: channels of the input images.
        img_size: height and width of the images in pixels, for networks that must know it (vision transformers); by
            default the network's own.
        drop_path: highest rate of stochastic depth; by default the network's own, which mostly is 0.
        out_indices: feature maps to return, as timm's `forward_intermediates` counts them; by default the last output
            alone. Methods use the last one in the list.
        sync_bn: whether BatchNorm computes its statistics over the global batch (SyncBN) and not over groups of
            data.samples_per_gpu samples.
        model_args: further keyword arguments of timm.create_model, such as `{ dynamic_img_size = true }`.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        img_size: int | None = None,
        drop_path: float | None = None,
        out_indices: list[int] | None = None,
        sync_bn: bool = False,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels)
        _require_other(model_args or {})
        require_known("timm", name, imported("timm").list_models())
        given = {"in_chans": in_channels, "img_size": img_size, "drop_path_rate": drop_path, **(model_args or {})}
        self.name, self.arguments = name, {key: value for key, value in given.items() if value is not None}
        self.net: Any = self.network()
        self.out_indices = out_indices
        self.is_channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        patches = getattr(self.net, "patch_embed", None)
        is_fixed = getattr(patches, "strict_img_size", False) and not getattr(self.net, "dynamic_img_size", False)
        self.fixed_size = getattr(patches, "img_size", None) if is_fixed else None
        expected = (getattr(self.net, "default_cfg", None) or {}).get("input_size", (3, OWN_SIZE, OWN_SIZE))
        size = (img_size, img_size) if img_size else expected[1:]
        self.has_map = out_indices is None
        outputs = outputs_of(self.net, self.outputs, (in_channels, *size))
        if self.has_map and [len(shape) for shape in outputs.shapes] != [4]:
            self.has_map = False
            outputs = outputs_of(self.net, self.outputs, (in_channels, *size))
        if len(outputs.shapes[-1]) not in (2, 4):
            raise UsageError(
                f"timm's {name} returns {outputs.shapes[-1]}, which is neither a feature map nor a feature"
            )
        self.num_features = outputs.shapes[-1][1]
        self.unused = outputs.unused
        for parameter in self.unused:
            self.net.get_parameter(parameter).requires_grad_(False)
        if sync_bn:
            convert_batch_norms(self.net)
            for layer in group_norms(self.net):
                layer.sync = True

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.fixed_size is not None and images.shape[-2:] != self.fixed_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} px, but img_size is {self.fixed_size[0]}")
        return self.outputs(self.net, images)

    def layers(self) -> list[list[str]]:
        if not hasattr(self.net, "group_matcher"):
            return super().layers()
        group_parameters = imported("timm").models.group_parameters
        groups = group_parameters(self.net, self.net.group_matcher(coarse=False))
        return [[f"net.{name}" for name in groups[depth]] for depth in sorted(groups)]

    def branches(self) -> list[nn.Module]:
        last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}  # of its ResNets, which have no module there at a rate of 0
        found = []
        for name, module in self.net.named_modules():
            if name.rpartition(".")[2] in ("drop_path", "drop_path1", "drop_path2"):  # Identity at a rate of 0
                found.append(module)
            elif getattr(module, "drop_path", self) is None and type(module).__name__ in last:
                found.append(module.get_submodule(last[type(module).__name__]))
        if not found:
            raise UsageError(f"timm's {self.name} does not show its residual branches: set drop_path of the backbone")
        return found

    def network(self) -> nn.Module:
        """A new network of timm like this one, with random weights."""
        return created("timm", self.name, imported("timm").create_model, num_classes=0, **self.arguments)

    def making(self) -> dict[str, Any]:
        """How timm makes this network: metadata of an export."""
        arguments = {key: value for key, value in self.arguments.items() if (key, value) != ("in_chans", 3)}
        return {"model_args": {"num_classes": 0, **arguments}}

    def export_note(self) -> str | None:
        """What somebody who uses the network in timm would not notice."""
        if not self.unused or not self.has_map:
            return None
        return f"its features are the mean of model.forward_features(images); {self.unused[0]} behind it is not trained"

    def outputs(self, net: Any, images: Tensor) -> list[Tensor]:
        """The backbone's outputs, of another network of this name."""
        if self.out_indices is not None:
            return net.forward_intermediates(
                images, indices=self.out_indices, intermediates_only=True, output_fmt="NCHW"
            )
        if not self.has_map:
            return [net(images)]
        last = net.forward_features(images)
        if not isinstance(last, Tensor):  # several outputs; then there is no map
            return list(last)
        return [last.permute(0, 3, 1, 2) if self.is_channels_last and last.dim() == 4 else last]


def _require_other(model_args: dict[str, Any]) -> None:
    """Raises UsageError if an argument has a key of its own, or would load weights."""
    for argument in model_args:
        if argument in _NOT_ARGUMENTS:
            own = _NOT_ARGUMENTS[argument]
            hint = f"set {own} of the backbone" if own else "weights come from load_from, and there is no classifier"
            raise UsageError(f"model_args may not have {argument}: {hint}")
