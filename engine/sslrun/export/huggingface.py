"""A folder that the transformers library loads: ResNetModel or ViTModel."""

import json
from pathlib import Path
from typing import Any

from sslrun.errors import UsageError
from sslrun.export import published
from sslrun.export.architecture import ResNetShape, Shapes
from sslrun.export.encoder import ELSEWHERE, Encoder
from sslrun.export.files import KEY, read_safetensors
from sslrun.export.layouts import from_transformers, to_transformers
from sslrun.export.verify import NotTheSame, difference, require_names, require_same, shapes
from sslrun.runtime.durable import write_file
from sslrun.runtime.safetensors_file import write_tensors

CONFIG, WEIGHTS, PROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"


class HuggingFaceFolder:
    """config.json, model.safetensors, preprocessor_config.json and README.md.

    Args:
        encoder: what to write.
        path: the folder.
    """

    note = None
    names = frozenset({CONFIG, WEIGHTS, PROCESSOR, CARD})

    def __init__(self, encoder: Encoder, path: Path) -> None:
        if path.is_file():
            raise UsageError(f"{path} is a file; --to huggingface writes a folder")
        self.encoder, self.name = encoder, path.name
        self.config = _config(encoder)
        self.tensors = {name: tensor.contiguous() for name, tensor in to_transformers(encoder.tensors()).items()}
        self.metadata = encoder.metadata(target="huggingface", architecture=self.config["architectures"][0])
        wrong = difference(shapes(self.tensors), _published(self.config))
        if wrong is not None:
            raise UsageError(f"these weights are not laid out as published: {wrong}")

    def write(self, path: Path) -> None:
        path.mkdir()
        write_file(path / CONFIG, _json(self.config))
        write_file(path / PROCESSOR, _json(self.encoder.preprocessing.for_transformers()))
        write_file(path / CARD, self._card().encode())
        write_tensors(path / WEIGHTS, self.tensors, {"format": "pt", KEY: self.metadata})

    def verify(self, path: Path) -> None:
        config = json.loads((path / CONFIG).read_bytes())
        processor = json.loads((path / PROCESSOR).read_bytes())
        tensors, metadata = read_safetensors(path / WEIGHTS)
        if (config, processor) != (self.config, self.encoder.preprocessing.for_transformers()):
            raise NotTheSame("its configuration did not read back")
        if metadata != self.metadata:
            raise NotTheSame("its metadata did not read back")
        require_names(tensors, _published(config))
        ours = from_transformers(tensors, self.encoder.tensors())
        require_same(self.encoder.backbone, ours, self.encoder.images())

    def _card(self) -> str:
        about, architecture = self.encoder.about, self.config["architectures"][0]
        length = "" if about["step"] is None else f", {about['step']} steps ({about['epoch']:.4g} epochs)"
        if architecture == "ViTModel":
            arguments = ", add_pooling_layer=False"
            feature = "last_hidden_state[:, 0]"
        else:
            arguments, feature = "", "pooler_output.flatten(1)"
        return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
---

# {about["recipe"]}

An image encoder trained without labels: {about["method"]}{length}, by sslrun {about["sslrun"]}. It has no classifier.

```python
from transformers import AutoImageProcessor, {architecture}

processor = AutoImageProcessor.from_pretrained("{self.name}")
model = {architecture}.from_pretrained("{self.name}"{arguments})
features = model(**processor(image, return_tensors="pt")).{feature}
```
"""


def _config(encoder: Encoder) -> dict[str, Any]:
    """config.json; UsageError: transformers has no such network."""
    shape = encoder.shape("transformers")
    common = {"num_channels": 3, "dtype": "float32", "torch_dtype": "float32"}
    if isinstance(shape, ResNetShape):
        if (shape.groups, shape.width_per_group) != (1, 64):
            raise UsageError(f"transformers has no {shape}: {ELSEWHERE}")
        expansion = 1 if shape.depth < 50 else 4
        return {
            "architectures": ["ResNetModel"],
            "model_type": "resnet",
            "layer_type": "basic" if shape.depth < 50 else "bottleneck",
            "embedding_size": shape.base_width,
            "hidden_sizes": [shape.base_width * expansion * 2**stage for stage in range(shape.stages)],
            "depths": list(published.BLOCKS[shape.depth][: shape.stages]),
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            **common,
        }
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": int(shape.embed_dim * shape.mlp_ratio),
        "image_size": shape.img_size,
        "patch_size": shape.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        **common,
    }


def _published(config: dict[str, Any]) -> Shapes:
    is_resnet = config["model_type"] == "resnet"
    return (published.transformers_resnet if is_resnet else published.transformers_vit)(config)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
