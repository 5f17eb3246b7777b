"""DeepCluster: what it clusters and what it learns from, on one process and on two. (Resumes: test_methods.py.)"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from steps import assert_close, longhand_step, step
from torch import Tensor, nn

import small_run
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.errors import UsageError
from sslrun.methods.deepcluster import DeepCluster
from sslrun.nn.clustering import k_means, whitened
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import AvgPool2dNeck
from sslrun.nn.resnet import ResNet
from sslrun.nn.sobel import Sobel
from sslrun.runtime import checkpoint, distributed

PROGRESS = Progress(step=6, total_steps=30, steps_per_epoch=3, seed=1)
SAMPLES, CLUSTERS = 40, 5


def small(**options) -> DeepCluster:
    torch.manual_seed(0)
    method = DeepCluster(
        ResNet(18, stem="small", base_width=4), AvgPool2dNeck(32), ClsHead(32, CLUSTERS), pca_dim=8, **options
    )
    method.prepare(SAMPLES)
    return method


def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def features(module: nn.Module) -> Tensor:
    """What the engine hands a method: outputs of a module in evaluation mode for all samples."""
    module.eval()
    with torch.no_grad():
        outputs = module(images())
    module.train()
    return outputs[distributed.share(SAMPLES)]


def clustered(**options) -> DeepCluster:
    method = small(**options)
    for parameter, function in method.before_epoch(PROGRESS, features):
        parameter.data.copy_(function(parameter.data))
    return method


def weighted() -> DeepCluster:
    """Clustered by all ranks together, with a loss in which clusters weigh differently."""
    return clustered(reweight=True)


def batch_of(first: int, last: int) -> Batch:
    generator = torch.Generator().manual_seed(first)
    index = torch.arange(first, last).flip(0)
    return Batch([torch.randn(last - first, 3, 16, 16, generator=generator)], index, None)


def test_clusters_are_of_averaged_whitened_normalized_features():
    method = clustered()
    twin = small()
    twin.eval()
    with torch.no_grad():
        averaged = twin.backbone(images())[-1].mean(dim=(2, 3))
    rows = F.normalize(whitened(averaged, 8, torch.device("cpu")), dim=1)
    _, expected = k_means(rows, CLUSTERS, PROGRESS.generator())
    assert torch.equal(method.labels, expected) and len(expected.unique()) == CLUSTERS
    assert method.counts.tolist() == expected.bincount(minlength=CLUSTERS).tolist()
    assert torch.equal(method.sampling_labels(), expected)
    assert method.draws_clusters and not clustered(uniform_sampling=False).draws_clusters


def test_a_clustering_starts_the_head_anew_and_leaves_the_rest_alone():
    method = small()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    state = torch.get_rng_state()
    rewrites = method.before_epoch(PROGRESS, features)
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"labels", "counts"} and method.training
    assert {parameter for parameter, _ in rewrites} == {method.head.fc.weight, method.head.fc.bias}
    again = small().before_epoch(PROGRESS, features)
    for (parameter, function), (other, same) in zip(rewrites, again, strict=True):
        assert torch.equal(function(parameter.data), same(other.data))
    later = small().before_epoch(Progress(9, 30, 3, 1), features)
    assert not torch.equal(rewrites[0][1](rewrites[0][0].data), later[0][1](later[0][0].data))


@pytest.mark.parametrize("reweight", [False, True])
def test_loss_is_cross_entropy_with_the_samples_own_labels(reweight):
    """Eq. 1 of the paper with loops; with weights, the weighted mean of the batch, however it is cut."""
    method = clustered(reweight=reweight).double()
    method.eval()  # BatchNorm by running statistics: a sample does not see the others
    batches = [Batch([batch.views[0].double()], batch.index, None) for batch in (batch_of(0, 8), batch_of(20, 28))]
    assert len(set(method.counts.tolist())) > 1, "all clusters weigh the same"
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for batch in batches:
        pooled = method.backbone(batch.views[0])[-1].mean(dim=(2, 3))
        for row, sample in zip(pooled, batch.index.tolist(), strict=True):
            label = int(method.labels[sample])
            scores = method.head.fc.weight @ row + method.head.fc.bias
            weight = int(method.counts[label]) ** -0.5 if reweight else 1.0
            total = total - weight * torch.log(scores[label].exp() / scores.exp().sum())
            weights += weight
    expected = longhand_step(total / weights, method)
    assert all(gradient.any() for gradient in expected.gradients.values())
    assert_close(step(method, batches, PROGRESS), expected, rtol=1e-5, atol=1e-7)
    whole = Batch([torch.cat([b.views[0] for b in batches])], torch.cat([b.index for b in batches]), None)
    assert_close(step(method, [whole], PROGRESS), expected, rtol=1e-5, atol=1e-7)


def test_metrics_and_chance():
    method = clustered()
    (target,) = method.targets([batch_of(0, 8)], PROGRESS)
    metrics = method(batch_of(0, 8), PROGRESS, target).metrics
    assert metrics["clusters_in_use"] == CLUSTERS and 0 <= metrics["top1_pct"] <= 100
    assert method.chance_loss() is None  # a new head guesses, in every epoch: no sign of a collapse


def test_sobel_is_two_gradients_of_the_gray_image():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 7, 6)
    seen = []

    class Inner(ResNet):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    network = Sobel(Inner(18, stem="small", base_width=4, in_channels=2))
    assert network(images)[-1].shape[:2] == (2, network.num_features)
    gray = F.pad(images.double().sum(1) / 3, (1, 1, 1, 1))
    for n in range(2):
        for y in range(7):
            for x in range(6):
                p = gray[n, y : y + 3, x : x + 3]
                across = p[0, 0] + 2 * p[1, 0] + p[2, 0] - p[0, 2] - 2 * p[1, 2] - p[2, 2]
                down = p[0, 0] + 2 * p[0, 1] + p[0, 2] - p[2, 0] - 2 * p[2, 1] - p[2, 2]
                assert seen[0][n, :, y, x].tolist() == pytest.approx([float(across), float(down)], abs=1e-5)
    assert all(not name.startswith("kernels") for name, _ in network.named_parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="pca_dim is 33, expected 1 to 32"):
        DeepCluster(ResNet(18, base_width=4), AvgPool2dNeck(32), ClsHead(32, 5), pca_dim=33)
    with pytest.raises(ValueError, match="iterations is 0"):
        DeepCluster(ResNet(18, base_width=4), AvgPool2dNeck(32), ClsHead(32, 5), pca_dim=3, iterations=0)
    with pytest.raises(UsageError, match=r"4 samples cannot be put into 5 clusters \(num_classes\)"):
        DeepCluster(ResNet(18, base_width=4), AvgPool2dNeck(32), ClsHead(32, 5), pca_dim=3).prepare(4)


def test_the_recipes_are_the_published_ones():
    config = load(str(small_run.ROOT / "configs/deepcluster.toml"))
    assert config.name == "deepcluster_resnet50_8xb64-steplr-200e_in1k"
    values = config.values
    model = values["model"]
    clustering = ("pca_dim", "iterations", "uniform_sampling", "reweight", "reweight_power")
    assert [model[key] for key in clustering] == [256, 20, True, False, 0.5]
    assert model["backbone"]["norm_cfg"] == {"type": "BN"} and model["backbone"]["depth"] == 50
    assert model["head"] == {"type": "ClsHead", "in_channels": 2048, "num_classes": 10000}
    assert values["optimizer"] == {
        "type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-5,
        "paramwise": [{"match": r"^head\.", "momentum": 0.0}],
    }  # fmt: skip
    assert values["lr"] == {"policy": "Step", "step": [400], "gamma": 0.1, "by": "epoch"}
    assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (200, 512, 64)
    (view,) = values["data"]["views"]
    assert view["num_views"] == 1 and view["transforms"][:-1] == [
        {"type": "RandomResizedCrop", "size": 224},
        {"type": "RandomHorizontalFlip", "p": 0.5},
        {"type": "RandomRotation", "degrees": 2},
        {"type": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 1.0, "hue": 0.5},
        {"type": "RandomGrayscale", "p": 0.2},
    ]
    sobel = load(str(next((small_run.ROOT / "configs/selfsup/deepcluster").glob("deepcluster-sobel_*.toml")))).values
    inner = model["backbone"] | {"in_channels": 2}
    assert sobel == values | {"model": model | {"backbone": {"type": "Sobel", "backbone": inner}}}


MODEL = """
[model]
type = "DeepCluster"
pca_dim = 8
backbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small" }
neck = { type = "AvgPool2dNeck", in_channels = 32 }
head = { type = "ClsHead", in_channels = 32, num_classes = 6 }
"""


def test_two_processes_cluster_and_compute_what_one_does(tmp_path: Path, images: Path):
    """Each extracts and clusters its share, and the head that starts anew is in shards (ZeRO 3): one step is equal."""
    recipe = small_run.write_recipe(tmp_path, images, steps=1, model=MODEL)
    settings = ["data.views.0.num_views=1", "data.drop_last=true", "global_batch=64", "monitor.knn_interval=0"]

    def weights(ranks: int, *more: str) -> dict[str, Tensor]:
        options = [f"--set={setting}" for setting in (*settings, *more)]
        small_run.train(recipe, "--work-dir", str(tmp_path / str(ranks)), *options, ranks=ranks)
        return checkpoint.load(small_run.saved(tmp_path / str(ranks) / "small", 1))[0]["model"]

    one, two = weights(1), weights(2, "engine.zero_stage=3")
    assert torch.equal(one["labels"], two["labels"]) and len(one["labels"].unique()) > 1
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)
