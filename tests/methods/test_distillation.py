"""Distillation's losses, written longhand in float64; the teacher stays as its file has it."""

import math

import pytest
import torch
from safetensors.torch import save_file
from steps import PROGRESS, assert_close, longhand_step, pieces, step
from torch import Tensor

import small_run
from small_run import call
from sslrun.contract import Batch
from sslrun.errors import UsageError
from sslrun.initial_weights import load_frozen_weights
from sslrun.methods.distillation import Distillation, DistillationHead, map_of
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer
from sslrun.optim.optimizers import SGD
from sslrun.randomness import step_rng
from sslrun.runtime import checkpoint
from sslrun.runtime.executor import LocalExecutor

TAU = 0.07
RESNET = {"depth": 18, "base_width": 2, "stem": "small"}
VIT = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 16, "patch_size": 4, "patch_tokens": True}


def small(mixup: bool = True, student: str = "resnet", **weights: float) -> Distillation:
    """A ResNet or a transformer that learns from a transformer."""
    torch.manual_seed(0)
    backbone = ResNet(**RESNET) if student == "resnet" else VisionTransformer(**VIT)
    teacher = VisionTransformer(**{**VIT, "embed_dim": 24})
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_(std=0.3)
    head = DistillationHead(16 if student == "resnet" else 12, 24, queue_len=6, temperature=TAU, **weights)
    return Distillation(backbone, teacher, head, mixup=mixup).double()


def random_batch(samples: int = 4, seed: int = 0) -> Batch:
    images = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch([images], torch.arange(samples), None)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def divergence(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """KL(p || q) of two softmaxes, number by number."""
    p, q = ([torch.exp(score / TAU) for score in scores] for scores in (teacher, student))
    p, q = ([number / sum(numbers) for number in numbers] for numbers in (p, q))
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def enlarged(maps: Tensor, rows: int, columns: int) -> Tensor:
    """(C, h, w) to (C, rows, columns), bilinear, at the centers of pixels."""

    def places(count: int, size: int) -> list[tuple[int, int, float]]:
        centers = [max((i + 0.5) * size / count - 0.5, 0.0) for i in range(count)]
        return [(int(c), min(int(c) + 1, size - 1), c - int(c)) for c in centers]

    _, height, width = maps.shape
    lines = [(1 - f) * maps[:, a] + f * maps[:, b] for a, b, f in places(rows, height)]
    whole = torch.stack(lines, dim=1)
    return torch.stack([(1 - f) * whole[:, :, a] + f * whole[:, :, b] for a, b, f in places(columns, width)], dim=2)


def longhand(method: Distillation, batch: Batch) -> Tensor:
    """One image after the other."""
    images, head = list(batch.views[0]), method.head
    if method.mixup:
        share = step_rng(PROGRESS.seed, PROGRESS.step).random()
        images = [share * image + (1 - share) * images[number ^ 1] for number, image in enumerate(images)]
    whole = torch.stack(images)
    theirs, ours = method.teacher.network.eval()(whole), method.backbone(whole)
    features = [unit(feature).detach() for feature in theirs[-1]]
    total = torch.zeros((), dtype=torch.float64)
    for number in range(len(images)):
        if head.similarities:
            output = ours[-1][number]
            pooled = output.mean(dim=(1, 2)) if output.dim() == 3 else output
            x = unit(head.projection.weight @ pooled + head.projection.bias)
            keys = [*head.queue.rows, *features]
            scores = ([(key * one).sum() for key in keys] for one in (features[number], x))
            total = total + head.similarities * divergence(*scores)
        if head.tokens or head.features:
            taught, (dim, rows, columns) = theirs[0][number].detach(), theirs[0][number].shape
            learned = enlarged(map_of(ours)[number], rows, columns)
            cells = [(r, c) for r in range(rows) for c in range(columns)]
            if head.tokens:
                for r, c in cells:
                    scores = [
                        [(unit(m[:, r, c]) * unit(m[:, i, j])).sum() for i, j in cells] for m in (taught, learned)
                    ]
                    total = total + head.tokens * divergence(*scores) / len(cells)
            if head.features:
                layer = head.map_projection
                for r, c in cells:
                    error = layer.weight @ learned[:, r, c] + layer.bias - taught[:, r, c]
                    total = total + head.features * error.square().sum() / (dim * len(cells))
    return total / len(images)


@pytest.mark.parametrize("student", ["resnet", "vit"])
@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"similarities": 0.0, "tokens": 2.0},
        {"similarities": 0.0, "features": 3.0},
        {"tokens": 0.5, "features": 0.5},
    ],
)
def test_a_step_is_the_formula(student: str, weights: dict[str, float]) -> None:
    method, twin = small(student=student, **weights), small(student=student, **weights)
    result = step(method, [random_batch()])
    assert_close(result, longhand_step(longhand(twin, random_batch()), twin), rtol=1e-8, atol=1e-11)
    assert not any(name.startswith("teacher") for name in result.gradients) and result.loss > 1e-3


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_are_the_whole_batch(size: int) -> None:
    weights = {"student": "vit", "tokens": 1.0, "features": 1.0}
    assert_close(step(small(**weights), pieces(random_batch(8), size)), step(small(**weights), [random_batch(8)]))


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    torch.manual_seed(0)
    head = DistillationHead(12, 12, queue_len=6, tokens=1.0, features=1.0)
    method = Distillation(VisionTransformer(**VIT), VisionTransformer(**VIT), head).double()
    method.backbone.load_state_dict(method.teacher.network.state_dict())
    with torch.no_grad():
        for layer in (head.projection, head.map_projection):
            layer.weight.copy_(torch.eye(12))
    assert step(method, [random_batch()]).loss == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        method.backbone.norm.weight[0] *= 2
    assert step(method, [random_batch()]).loss > 1e-3


def test_the_queue_gets_the_teachers_features_after_the_step() -> None:
    method = small()
    result = step(method, [random_batch()])
    before = method.head.queue.rows.clone()
    method.after_step(PROGRESS, result.carry)
    assert torch.equal(method.head.queue.rows[:4], result.carry["features"])
    assert torch.equal(method.head.queue.rows[4:], before[4:])
    torch.testing.assert_close(result.carry["features"].norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_the_teacher_is_always_in_evaluation_mode_without_gradient() -> None:
    torch.manual_seed(0)
    method = Distillation(ResNet(**RESNET), ResNet(**RESNET), DistillationHead(16, 16, queue_len=6)).double()
    before = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    method.train()
    step(method, [random_batch()])
    assert all(not module.training for module in method.teacher.modules()) and method.backbone.training
    assert all(torch.equal(before[name], tensor) for name, tensor in method.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_what_does_not_fit_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="feat_dim is 8, expected the teacher's 24 features"):
        Distillation(ResNet(**RESNET), VisionTransformer(**{**VIT, "embed_dim": 24}), DistillationHead(16, 8))
    with pytest.raises(ValueError, match="there is nothing to learn"):
        DistillationHead(16, 8, similarities=0.0)
    with pytest.raises(ValueError, match="3 samples at once: images are mixed in pairs"):
        step(small(), [random_batch(3)])
    with pytest.raises(UsageError, match="patch_tokens = true"):
        map_of([torch.zeros(2, 3)])
    method = small()
    optimizer = SGD(lr=0.1).create(method.named_parameters(), method.backbone)
    executor = LocalExecutor(method, optimizer, device=torch.device("cpu"))
    own = method.teacher.network.state_dict()
    state = {f"backbone.{name}": tensor.float().contiguous() for name, tensor in own.items()}
    before = executor.full_state()
    for wrong in (
        {"backbone.norm.weight": torch.zeros(3)},
        {"backbone.more": torch.zeros(3)},
        {"backbone.cls_token": None},
    ):
        content = {name: tensor for name, tensor in {**state, **wrong}.items() if tensor is not None}
        save_file(content, tmp_path / "w.safetensors")
        with pytest.raises(UsageError, match=r"w\.safetensors is not the weights of teacher\.network: 1 "):
            load_frozen_weights(executor, "teacher.network", tmp_path / "w.safetensors")
        assert all(torch.equal(before[name], tensor) for name, tensor in executor.full_state().items())


MODEL = """
[model]
type = "Distillation"
backbone = {{ type = "ResNet", depth = 18, base_width = 2, stem = "small" }}
teacher = {{ type = "ResNet", depth = 18, base_width = 4, stem = "small" }}
teacher_weights = "{weights}"
head = {{ type = "DistillationHead", in_channels = 16, feat_dim = 32, queue_len = 16 }}
"""


@pytest.mark.nightly  # three runs
def test_a_run_takes_its_teacher_from_a_file_and_a_resumed_one_from_its_checkpoint(trained, images, tmp_path, capsys):
    """The file is another run's."""
    theirs = checkpoint.load_weights(trained)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "teacher.safetensors")
    recipe = small_run.write_recipe(
        tmp_path, images, steps=4, model=MODEL.format(weights=tmp_path / "teacher.safetensors")
    )
    words = ["--set=data.views.0.num_views=1", "--set=checkpoint.interval=2"]
    assert call(capsys, recipe, *words)[0] == 0
    run = tmp_path / "runs/small"
    first, last = (checkpoint.load(run / f"checkpoints/step_{step:08d}")[0]["model"] for step in (2, 4))
    for name in (name for name in theirs if name.startswith("backbone.")):
        own = name.replace("backbone.", "teacher.network.")
        assert torch.equal(first[own], theirs[name]) and torch.equal(last[own], theirs[name])
    assert not torch.equal(first["backbone.conv1.weight"], last["backbone.conv1.weight"])
    (tmp_path / "teacher.safetensors").unlink()
    again = [*words, f"--resume={run}/checkpoints/step_00000002", "--work-dir", tmp_path / "again"]
    code, _, err = call(capsys, recipe, *again)
    assert code == 0, err
    resumed = checkpoint.load(tmp_path / "again/small/checkpoints/step_00000004")[0]["model"]
    assert all(torch.equal(resumed[name], last[name]) for name in last)
    code, _, err = call(capsys, recipe, *words, "--work-dir", tmp_path / "third")
    assert code == 2 and "teacher.safetensors" in err and "Traceback" not in err
    losses = [row["train/loss"] for row in small_run.metrics(run) if "train/loss" in row]
    assert losses and all(map(math.isfinite, losses))
