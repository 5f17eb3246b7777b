"""An ONNX file; the only place that knows onnx, onnxruntime and torch's exporter."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslrun.errors import UsageError
from sslrun.export.encoder import Encoder
from sslrun.export.export_format import ExportFormat
from sslrun.export.tensor_files import KEY
from sslrun.export.verify import NotTheSame, features, require_equal

NEEDS = "--to onnx needs onnx, onnxruntime and onnxscript: pip install 'sslrun[onnx]'"


class Onnx(ExportFormat):
    """Any backbone as an ONNX graph: images in, features out, and of a ResNet also the feature map.

    Its input is `images` (batch, 3, H, W), its outputs are `features` (batch, D) and `feature_map` (batch, D, H', W').
    """

    suffixes = (".onnx",)

    def prepare(self, encoder: Encoder, path: Path) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UsageError(NEEDS) from error
        self.network = _Network(encoder.backbone).eval()
        self.metadata = encoder.metadata(target="onnx")

    def write(self, encoder: Encoder, path: Path) -> None:
        try:
            program = self._translated(encoder.images())
        except Exception as error:  # whatever a user's own backbone does that torch cannot follow
            raise NotTheSame(f"torch cannot translate the backbone ({_first_line(error)})") from error
        program.model.metadata_props[KEY] = self.metadata
        program.save(str(path), external_data=False)

    def _translated(self, images: Tensor) -> Any:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about itself
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
            outputs = ["features", "feature_map"][: len(self.network(images))]
            return torch.onnx.export(
                self.network,
                (images,),
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )

    def verify(self, encoder: Encoder, path: Path) -> None:
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's have no base of their own
            raise NotTheSame(f"onnxruntime cannot read it ({_first_line(error)})") from error
        if session.get_modelmeta().custom_metadata_map.get(KEY) != self.metadata:
            raise NotTheSame("its metadata did not read back")

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

        for number in (1, 3):  # neither is the number that it was traced with
            require_equal(features(encoder.backbone), run, encoder.images(number))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class _Network(nn.Module):
    """A backbone with its features, and with the feature map that they are the mean of, where it has one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        last = self.backbone(images)[-1]
        return (last.mean(dim=(2, 3)), last) if last.dim() == 4 else (last,)
