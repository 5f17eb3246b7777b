"""sslrun: self-supervised pre-training of image encoders.

`train`, `load` and `evaluate` are the Python API. A user's own component is a class in a module named by
`custom_imports`; its base classes are exported here. All of it is imported on first use, so that `import sslrun` and
the config verbs do not pay for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sslrun.started import limit_spinning

if TYPE_CHECKING:  # for editors and type checkers
    from sslrun.config.paths import FilePath as FilePath
    from sslrun.contract import Backbone as Backbone
    from sslrun.contract import Batch as Batch
    from sslrun.contract import Loss as Loss
    from sslrun.contract import Method as Method
    from sslrun.contract import Pooled as Pooled
    from sslrun.contract import Progress as Progress
    from sslrun.data.sources import Source as Source
    from sslrun.data.transforms import Transform as Transform
    from sslrun.embedding.encoder import Encoder as Encoder
    from sslrun.errors import Diverged as Diverged
    from sslrun.errors import RunFailed as RunFailed
    from sslrun.errors import UsageError as UsageError
    from sslrun.evaluation.evaluation import Evaluation as Evaluation
    from sslrun.evaluation.frozen_encoder import FrozenEncoder as FrozenEncoder
    from sslrun.evaluation.monitors.monitor import Monitor as Monitor
    from sslrun.evaluation.monitors.monitor import Snapshot as Snapshot
    from sslrun.export.export_format import ExportFormat as ExportFormat
    from sslrun.nn.heads import Head as Head
    from sslrun.nn.necks import Neck as Neck
    from sslrun.nn.norm import Norm as Norm
    from sslrun.optim import Optimizer as Optimizer
    from sslrun.optim import Schedule as Schedule
    from sslrun.python_api import TrainedRun as TrainedRun
    from sslrun.python_api import evaluate as evaluate
    from sslrun.python_api import images as images
    from sslrun.python_api import load as load
    from sslrun.python_api import train as train
    from sslrun.runtime.hooks.base import Hook as Hook

__version__ = "0.1.0"

_EXPORTS = {
    "Backbone": "sslrun.contract",
    "Batch": "sslrun.contract",
    "Diverged": "sslrun.errors",
    "Encoder": "sslrun.embedding.encoder",
    "Evaluation": "sslrun.evaluation.evaluation",
    "ExportFormat": "sslrun.export.export_format",
    "FilePath": "sslrun.config.paths",
    "FrozenEncoder": "sslrun.evaluation.frozen_encoder",
    "Head": "sslrun.nn.heads",
    "Hook": "sslrun.runtime.hooks.base",
    "Loss": "sslrun.contract",
    "Method": "sslrun.contract",
    "Monitor": "sslrun.evaluation.monitors.monitor",
    "Neck": "sslrun.nn.necks",
    "Norm": "sslrun.nn.norm",
    "Optimizer": "sslrun.optim",
    "Pooled": "sslrun.contract",
    "Progress": "sslrun.contract",
    "RunFailed": "sslrun.errors",
    "Schedule": "sslrun.optim",
    "Snapshot": "sslrun.evaluation.monitors.monitor",
    "Source": "sslrun.data.sources",
    "TrainedRun": "sslrun.python_api",
    "Transform": "sslrun.data.transforms",
    "UsageError": "sslrun.errors",
    "evaluate": "sslrun.python_api",
    "images": "sslrun.python_api",
    "load": "sslrun.python_api",
    "train": "sslrun.python_api",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sslrun' has no attribute {name!r}")
    limit_spinning()  # most of them import torch
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
