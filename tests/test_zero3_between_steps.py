"""Under ZeRO 3, weights are gathered by steps, by measurements that are due, and by saves; none is kept whole."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import small_run
from ranks import run_ranks
from sslrun import cli, plan, training
from sslrun.evaluation.monitors.monitors import Monitors
from sslrun.rehearsal import StepMemory
from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor
from sslrun.runtime.executor import Executor

RANKS, STEPS, EPOCH, SAVED = 2, 6, 2, 3
MODEL = """
[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
momentum = 0.9
backbone = { type = "VisionTransformer", img_size = 24, patch_size = 8, embed_dim = 32, depth = 2, num_heads = 2 }
neck = { type = "MoCoV2Neck", in_channels = 32, hid_channels = 16, out_channels = 8, with_avg_pool = false }
head = { type = "ContrastiveHead", temperature = 0.2 }
"""


class Phase(NamedTuple):
    """What one rank did from the end of the phase before to the end of this one.

    Attributes:
        name: "step", "measurement" or "save".
        step: optimizer steps done at its end.
        gathered: elements of floating-point tensors that this phase gathered.
        before: the same, between the end of the phase before and its beginning.
        whole: names of the parameters, those of the teacher too, that are there whole at its end.
        kept_bytes: by how much all tensors that Python knows of have grown in it.
    """

    name: str
    step: int
    gathered: int
    before: int
    whole: list[str]
    kept_bytes: int


class Gathered(TorchDispatchMode):
    """Counts the elements of floating-point tensors that collectives gather."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def take(self) -> int:
        """The elements since the last call."""
        elements, self.elements = self.elements, 0
        return elements

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional") and "gather" in function.__name__:
            tensors = [each for each in torch.utils._pytree.tree_leaves(args[0]) if isinstance(each, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        return result


def live_bytes() -> int:
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def phases(words: list[str]) -> tuple[dict[str, int], list[Phase]]:
    """Trains, with parameters of any size in parts; returns the size of each parameter, and what each phase did."""
    found: list[Phase] = []
    sizes: dict[str, int] = {}
    gathered, config = Gathered(), DeepSpeedExecutor._config

    def watch(owner: Any, attribute: str, name: str, executor_of: Callable[[Any], Executor]) -> None:
        function = getattr(owner, attribute)

        def watched(*arguments: Any) -> Any:
            before, bytes_before = gathered.take(), live_bytes()
            result = function(*arguments)
            parameters: dict[Any, str] = executor_of(arguments).names
            sizes.update({each: parameter.ds_numel for parameter, each in parameters.items()})
            whole = [each for p, each in parameters.items() if p.ds_status.name != "NOT_AVAILABLE" or p.numel()]
            steps = sum(phase.name == "step" for phase in found) + (name == "step")
            found.append(Phase(name, steps, gathered.take(), before, whole, live_bytes() - bytes_before))
            return result

        setattr(owner, attribute, watched)

    in_parts = {"stage3_param_persistence_threshold": 0}  # else these small ones would be whole on every rank
    DeepSpeedExecutor._config = lambda self, options: config(self, in_parts | dict(options))  # type: ignore[method-assign]
    plan.rehearse = lambda *_: StepMemory(0, 0, 0, 0, 0)  # type: ignore[assignment]
    watch(training, "train_step", "step", lambda arguments: arguments[0])
    watch(Monitors, "measure", "measurement", lambda arguments: arguments[1])
    watch(training, "save", "save", lambda arguments: arguments[0].executor)
    with gathered:
        assert cli.main(words) == 0
    return sizes, found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, images: Path) -> list[tuple[dict[str, int], list[Phase]]]:
    recipe = small_run.write_recipe(tmp_path_factory.mktemp("zero3"), images, steps=STEPS, model=MODEL)
    text = recipe.read_text().replace("knn_interval = 1", "knn_interval = 2\nloss_interval = 2")
    text = text.replace("holdout = 0.2", "holdout = 0.5").replace("interval = 4\n", f"interval = {SAVED}\n")
    recipe.write_text(text)
    return run_ranks(phases, RANKS, [str(recipe), "--set", "engine.zero_stage=3"], timeout_s=900)


@pytest.mark.nightly
def test_no_weights_are_gathered_between_measurements(ranks: Any) -> None:
    for sizes, found in ranks:
        measured = [phase for phase in found if phase.name == "measurement"]
        assert [phase.step for phase in measured] == list(range(STEPS + 1))
        due = [phase for phase in measured if phase.step in (0, 2 * EPOCH, STEPS)]
        assert all(phase.gathered == 0 for phase in measured if phase not in due), measured
        between = [phase.before for phase in found[1:]]
        assert max(between) < sum(sizes.values()) / 100, between  # the numbers of a row of metrics
        backbone = sum(size for name, size in sizes.items() if name.startswith("backbone."))
        assert all(phase.gathered >= backbone for phase in due), due  # the count counts
        saved = [phase for phase in found if phase.name == "save"]
        assert [phase.step for phase in saved] == [3, 6]
        assert all(phase.gathered >= sum(sizes.values()) for phase in saved), saved


@pytest.mark.nightly
def test_nothing_is_kept_whole(ranks: Any) -> None:
    for rank, (sizes, found) in enumerate(ranks):
        assert {name.partition(".")[0] for name in sizes} == {"backbone", "neck", "key_backbone", "key_neck"}
        bytes_of_all = 4 * sum(sizes.values())
        for phase in found:
            assert phase.whole == [], phase
            if phase.name == "save" and rank == 0:  # it holds a copy until that is written
                assert phase.kept_bytes > bytes_of_all, phase
            elif phase.name != "step":  # the first ones make the state of the optimizer
                assert phase.kept_bytes < bytes_of_all / 20, phase
