"""sslrun: self-supervised pre-training of image encoders.

A user's own component is a class in a module named by `custom_imports`; its base classes are exported here and imported
on first use, so that `import sslrun` and the config verbs do not pay for torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Backbone": "sslrun.contract",
    "Batch": "sslrun.contract",
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
    "Schedule": "sslrun.optim",
    "Snapshot": "sslrun.evaluation.monitors.monitor",
    "Source": "sslrun.data.sources",
    "Transform": "sslrun.data.transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sslrun' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
