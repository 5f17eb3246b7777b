"""A folder that the transformers library loads: ResNetModel, ViTModel, or a model of DINOv2 or DINOv3."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sslrun.errors import UsageError
from sslrun.export import library_shapes
from sslrun.export.architecture import ResNetArchitecture, Shapes, VitArchitecture, shapes_of
from sslrun.export.encoder import ELSEWHERE, Encoder
from sslrun.export.export_format import ExportFormat
from sslrun.export.tensor_files import KEY, read_safetensors
from sslrun.export.tensor_names import from_transformers, to_transformers
from sslrun.export.transformer_forms import (
    from_transformers_form,
    periods_note,
    to_transformers_form,
    transformers_config,
    transformers_shapes,
)
from sslrun.export.verify import NotTheSame, difference, require_names, require_same
from sslrun.number_format import number
from sslrun.runtime.durable import write_file
from sslrun.runtime.safetensors_file import write_tensors

CONFIG, WEIGHTS, PROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"


class HuggingFace(ExportFormat):
    """A folder for transformers: config.json, model.safetensors, preprocessor_config.json and README.md."""

    folder_names = frozenset({CONFIG, WEIGHTS, PROCESSOR, CARD})

    def prepare(self, encoder: Encoder, path: Path) -> None:
        if path.is_file():
            raise UsageError(f"{path} is a file; --to huggingface writes a folder")
        self.name = path.name
        self.config = _config(encoder)
        self.form = _form(encoder)
        if self.form is None:
            theirs = to_transformers(_without_mask_token(encoder))
        else:
            theirs = to_transformers_form(encoder.tensors(), self.form)
            self.note = periods_note(self.form, encoder.tensors())
        self.tensors = {name: tensor.contiguous() for name, tensor in theirs.items()}
        self.metadata = encoder.metadata(target="huggingface", architecture=self.config["architectures"][0])
        wrong = difference(shapes_of(self.tensors), _expected(self.config))
        if wrong is not None:
            raise UsageError(f"these weights are not laid out as published: {wrong}")

    def write(self, encoder: Encoder, path: Path) -> None:
        path.mkdir()
        write_file(path / CONFIG, _json(self.config))
        write_file(path / PROCESSOR, _json(encoder.preprocessing.for_transformers()))
        write_file(path / CARD, _card(self.name, encoder, self.config["architectures"][0]).encode())
        write_tensors(path / WEIGHTS, self.tensors, {"format": "pt", KEY: self.metadata})

    def verify(self, encoder: Encoder, path: Path) -> None:
        config = json.loads((path / CONFIG).read_bytes())
        processor = json.loads((path / PROCESSOR).read_bytes())
        tensors, metadata = read_safetensors(path / WEIGHTS)
        if (config, processor) != (self.config, encoder.preprocessing.for_transformers()):
            raise NotTheSame("its configuration did not read back")
        if metadata != self.metadata:
            raise NotTheSame("its metadata did not read back")
        require_names(tensors, _expected(config))
        own = encoder.tensors()
        if self.form is None:
            ours = own | from_transformers(tensors, _without_mask_token(encoder))
        else:
            ours = from_transformers_form(tensors, own, self.form)
        require_same(encoder.backbone, ours, encoder.images())


def _card(name: str, encoder: Encoder, architecture: str) -> str:
    """README.md of the folder."""
    about = encoder.about
    length = "" if about["step"] is None else f", {about['step']} steps ({number(about['epoch'])} epochs)"
    arguments = ", add_pooling_layer=False" if architecture == "ViTModel" else ""
    feature = "pooler_output.flatten(1)" if architecture == "ResNetModel" else "last_hidden_state[:, 0]"
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
---

# {about["recipe"]}

An image encoder trained without labels: {about["method"]}{length}, by sslrun {about["sslrun"]}. It has no classifier.

```python
from transformers import AutoImageProcessor, {architecture}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}"{arguments})
features = model(**processor(image, return_tensors="pt")).{feature}
```
"""


def _config(encoder: Encoder) -> dict[str, Any]:
    """config.json; UsageError: transformers has no such network."""
    architecture = encoder.architecture_for("transformers")
    common = {"num_channels": 3, "dtype": "float32", "torch_dtype": "float32"}
    if isinstance(architecture, ResNetArchitecture):
        if (architecture.groups, architecture.width_per_group) != (1, 64):
            raise UsageError(f"transformers has no {architecture}: {ELSEWHERE}")
        expansion = 1 if architecture.depth < 50 else 4
        return {
            "architectures": ["ResNetModel"],
            "model_type": "resnet",
            "layer_type": "basic" if architecture.depth < 50 else "bottleneck",
            "embedding_size": architecture.base_width,
            "hidden_sizes": [architecture.base_width * expansion * 2**stage for stage in range(architecture.stages)],
            "depths": list(library_shapes.BLOCKS[architecture.depth][: architecture.stages]),
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            **common,
        }
    if not architecture.is_plain:
        return {**transformers_config(architecture), **common}
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": int(architecture.embed_dim * architecture.mlp_ratio),
        "image_size": architecture.img_size,
        "patch_size": architecture.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        **common,
    }


def _form(encoder: Encoder) -> VitArchitecture | None:
    """The architecture of a transformer with more parts than a ViTModel has; None for any other network."""
    architecture = encoder.architecture
    return architecture if isinstance(architecture, VitArchitecture) and not architecture.is_plain else None


def _without_mask_token(encoder: Encoder) -> dict[str, Tensor]:
    """The tensors of which the features depend."""
    return {name: tensor for name, tensor in encoder.tensors().items() if name != "mask_token"}


def _expected(config: dict[str, Any]) -> Shapes:
    of = {"resnet": library_shapes.transformers_resnet, "vit": library_shapes.transformers_vit}
    return of.get(config["model_type"], transformers_shapes)(config)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
