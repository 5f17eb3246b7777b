"""The schema of a recipe: its top-level keys, `[engine]` and `[log]`. Other tables are defined where they are used."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sslrun.config.paths import FilePath
from sslrun.contract import Method
from sslrun.data.data_config import DataConfig
from sslrun.errors import UsageError
from sslrun.evaluation.eval_config import EvalConfig
from sslrun.evaluation.monitors.config import MonitorConfig
from sslrun.optim import Optimizer, Schedule
from sslrun.runtime.checkpoint import CheckpointConfig
from sslrun.runtime.hooks.base import Hook
from sslrun.runtime.hooks.mlflow import MLflow
from sslrun.runtime.hooks.tensorboard import TensorBoard
from sslrun.runtime.hooks.wandb import WandB


@dataclass(frozen=True)
class EngineConfig:
    """The `[engine]` table: how the hardware is used.

    Apart from rounding, it does not change what a recipe computes, unless you allow it: where `micro_batch` is smaller
    than a rank's share of the global batch, split_sync_bn lets SyncBN normalize over the samples that are on the
    devices at once, and without gradient_cache (or with a method of your own that has no `embed`) a loss compares
    these alone. A warning says so at start.

    Attributes:
        device: device to train on; "auto" is CUDA if there is a CUDA device, else the CPU.
        precision: "bf16" computes in bfloat16 autocast with fp32 parameters; "auto" is bf16 on CUDA devices that
            support it, else fp32. "fp64" computes in float64 on the CPU, to compare runs where rounding cannot hide
            a difference; several processes then average their gradients without DeepSpeed, whatever the zero_stage.
        compile: whether torch.compile compiles the networks; "auto" is on for CUDA. The first start takes minutes
            longer, others less if the folder of compiled code is kept: the environment variable
            TORCHINDUCTOR_CACHE_DIR names it, and the log where it is.
        micro_batch: samples on a device at once, a multiple of data.samples_per_gpu; "auto" takes as many as fit, so a
            machine with less memory accumulates gradients.
        gradient_cache: whether a loss that compares the samples of a batch, such as those of SimCLR and VICReg,
            compares those of the whole global batch when gradients are accumulated. Each step then has a second forward
            pass (Gao et al. 2021, arXiv 2101.06983).
        split_sync_bn: whether SyncBN may normalize over one micro-batch of all processes where an optimizer step has
            several. Otherwise such a run does not start: statistics over the global batch would need all of its
            activations at once.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3, for runs with several processes.
        max_skipped_steps: number of successive steps with a non-finite loss or gradient that are skipped before the run
            stops. Above 0 the host waits for the device at every step.
        threads: CPU threads of one process; 0 divides the cores of a machine among its processes.
        tf32: whether float32 matrix products and convolutions use TensorFloat-32 on CUDA; "auto" is on where the
            precision is bf16.
        cudnn_benchmark: whether cuDNN times its algorithms at the start and takes the fastest; "auto" is on for CUDA,
            except with deterministic.
        deterministic: whether a run on CUDA is exact, so that a resumed run has the same bits. Slower; an operation
            without an exact form is an error. On the CPU every run is exact.
        cuda_graphs: whether compiled networks are replayed as CUDA graphs, which saves the time of launches. "auto" is
            on for CUDA with compile, in one process, without accumulation and without deterministic; "on" tries them in
            these cases too. If they are not used on CUDA, the log says why.
        checkpoint_activations: parts of the backbone whose activations are computed again in the backward pass instead
            of kept, which saves memory and takes time. Names are those of its submodules, with `*` for any part of a
            name: `["layer1", "layer2"]` for two stages of a ResNet, `["layer1.*"]` for the blocks of a stage,
            `["blocks.*"]` for the blocks of a vision transformer.
        timeout_s: seconds after which a run of several processes gives up on one that makes no progress (it hangs, or
            its storage does), or that does not start; it names the rank, its machine and the step, and all leave with
            exit code 1. Before the second step, and in a checkpoint, a rank has an hour at least. A process that has
            ended, or whose machine is cut off, is found out after 60 s (a tenth of this where that is longer), and
            after 10 s if it breaks a connection.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    micro_batch: int | Literal["auto"] = "auto"
    gradient_cache: bool = True
    split_sync_bn: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    max_skipped_steps: int = 0
    threads: int = 0
    tf32: Literal["auto", "on", "off"] = "auto"
    cudnn_benchmark: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    checkpoint_activations: list[str] = field(default_factory=list)
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.timeout_s < 1:
            raise UsageError(f"engine.timeout_s must be at least 1, not {self.timeout_s}")
        if self.deterministic and self.cudnn_benchmark == "on":
            raise UsageError(
                'engine.deterministic is set, and engine.cudnn_benchmark = "on" lets cuDNN take another algorithm in '
                'each run: leave it at "auto"'
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The `[log]` table: what a run logs.

    Attributes:
        interval: optimizer steps between two rows of metrics.jsonl, and between two lines on the console.
        hooks: other receivers of the rows: "tensorboard", "wandb", "mlflow", or tables with the `type` of a hook,
            including your own.
        level: least severe level of messages that are shown.
        tags: words that say what the run is for; the hooks get them, too.
        wandb: settings of the hook "wandb".
        mlflow: settings of the hook "mlflow".
    """

    interval: int = 50
    hooks: list[Literal["tensorboard", "wandb", "mlflow"] | Hook] = field(default_factory=list)
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    tags: list[str] = field(default_factory=list)
    wandb: WandB = field(default_factory=WandB)
    mlflow: MLflow = field(default_factory=MLflow)

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UsageError(f"log.interval must be at least 1, not {self.interval}")

    def all_hooks(self) -> list[Hook]:
        """The hooks, in the order of the recipe."""
        by_word = {"tensorboard": TensorBoard(), "wandb": self.wandb, "mlflow": self.mlflow}
        return [by_word[hook] if isinstance(hook, str) else hook for hook in self.hooks]


@dataclass
class Recipe:
    """A pre-training run.

    Attributes:
        model: the method and its networks.
        data: images, views and batches.
        optimizer: optimizer and parameter groups.
        lr: learning-rate schedule.
        global_batch: samples per optimizer step over all devices.
        epochs: length of the run in epochs; set either this or max_iters.
        max_iters: length of the run in optimizer steps; set either this or epochs.
        seed: seed of all random numbers: initial weights, sample order, crops, dropout.
        work_dir: folder in which run folders are created.
        load_from: checkpoint or file with the initial weights of a new run.
        load_strict: whether load_from must contain exactly the model's weights. If false, it must fill half of the
            backbone or more; missing weights keep their random values, a missing momentum encoder starts as a copy of
            its student, a VisionTransformer's positions are interpolated for another img_size, and the filters of the
            first convolution are averaged for another number of channels.
        resume_from: checkpoint to continue from if the run folder has none.
        custom_imports: Python modules with your own components, imported before anything is built.
        engine: device, precision, compilation, micro-batches.
        checkpoint: when checkpoints are saved and how many are kept.
        log: what is logged, and where.
        monitor: measurements during training.
        eval: measurements of a trained encoder, for `sslrun eval`.
        vars: your own variables, for references such as "${vars.name}".
    """

    model: Method
    data: DataConfig
    optimizer: Optimizer
    lr: Schedule
    global_batch: int
    epochs: int | None = None
    max_iters: int | None = None
    seed: int = 0
    work_dir: FilePath = "work_dirs"
    load_from: FilePath | None = None
    load_strict: bool = True
    resume_from: FilePath | None = None
    custom_imports: list[str] = field(default_factory=list)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    vars: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "max_iters"):
            length = getattr(self, name)
            if length is not None and length < 1:
                raise UsageError(f"{name} must be at least 1, not {length}")
