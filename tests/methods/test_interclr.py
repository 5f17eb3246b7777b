"""InterCLR: a step against the paper written longhand, any cut of the batch, its draws, and ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import PROGRESS, assert_close, longhand_step, pieces, step
from torch import Tensor, nn

from ranks import run_ranks
from sslrun.contract import Batch, Progress
from sslrun.errors import UsageError
from sslrun.methods.interclr import InterCLR
from sslrun.nn.drawn_rows import uniform_indices
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import MoCoV2Neck
from sslrun.nn.norm import set_groups
from sslrun.nn.resnet import ResNet
from sslrun.runtime import distributed

START = Progress(step=0, total_steps=40, steps_per_epoch=4, seed=1)
SAMPLES, CLUSTERS = 48, 5


def small(neg_pool: int = 20, micro_batch: int = 16, **options) -> InterCLR:
    torch.manual_seed(0)
    method = InterCLR(
        ResNet(18, stem="small", base_width=4), MoCoV2Neck(32, 12, 6), ContrastiveHead(0.2), queue_len=16, feat_dim=6,
        num_clusters=CLUSTERS, neg_num=30, neg_pool=neg_pool, min_cluster=4, centroids_update_interval=2, **options,
    ).double()  # fmt: skip
    method.prepare(SAMPLES)
    method.clusters.double()
    method.before_epoch(START, features)
    set_groups(method, 4, micro_batch // 4)
    return method


def features(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    module.eval()
    with torch.no_grad():
        outputs = module(torch.randn(SAMPLES, 3, 16, 16, dtype=torch.float64, generator=generator))
    module.train()
    return outputs[distributed.share(SAMPLES)]


def batch_of(samples: int = 16) -> Batch:
    batch = two_views.random_batch(samples, 16)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))[:samples]
    return Batch([views.double() for views in batch.views], index, None)


def longhand(method: InterCLR, batch: Batch, progress: Progress) -> Tensor:
    """One query after the other; only the draws are the method's own."""
    (targets,) = method.targets([batch], progress)
    bank, labels = method.clusters.bank.rows, method.clusters.labels.tolist()
    queries = method.neck(method.backbone(batch.crops()[0])[-1])
    drawn, losses = uniform_indices(targets.draws, method.neg_num, method.neg_pool).tolist(), []
    for i, query in enumerate(queries):
        unit, own = query / query.norm(), labels[int(batch.index[i])]
        scores = [unit @ key / 0.2 for key in [targets.keys[i], *method.queue.rows]]
        intra = torch.logsumexp(torch.stack(scores), dim=0) - scores[0]
        assert labels[int(targets.positives[i])] == own
        others = [row for row in range(SAMPLES) if labels[row] != own]
        others.sort(key=lambda row: -float(unit.detach() @ bank[row]))
        chosen = [others[place] for place in drawn[i]]
        scores = [(unit @ bank[targets.positives[i]] + 0.5) / 0.2, *(unit @ bank[row] / 0.2 for row in chosen)]
        inter = torch.logsumexp(torch.stack(scores), dim=0) - scores[0]
        losses.append(0.75 * intra + 0.25 * inter)
    return torch.stack(losses).mean()


def test_a_step_is_the_paper():
    method, twin, batch = small(), small(), batch_of()
    actual = step(method, [batch])
    assert_close(actual, longhand_step(longhand(twin, batch, PROGRESS), twin))
    assert {name.split(".")[0] for name in actual.gradients} == {"backbone", "neck"}


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_any_cut_is_one_batch(micro_batch):
    batch = batch_of()
    whole = step(small(), [batch])
    cut = step(small(micro_batch=micro_batch), pieces(batch, micro_batch))
    assert_close(cut, whole)
    torch.testing.assert_close(cut.carry, whole.carry)


def test_positives_are_uniform_in_the_cluster():
    method, batch = small(), batch_of()
    seen: dict[int, list[int]] = {}
    for at in range(400):
        (targets,) = method.targets([batch], Progress(at, 400, 4, 1))
        for sample, positive in zip(batch.index.tolist(), targets.positives.tolist(), strict=True):
            seen.setdefault(sample, []).append(positive)
    labels = method.clusters.labels
    for sample, found in seen.items():
        members = (labels == labels[sample]).nonzero().flatten()
        assert set(found) == set(members.tolist())
        counts = torch.bincount(torch.tensor(found), minlength=SAMPLES)[members]
        assert float((counts - 400 / len(members)).abs().max()) < 5 * math.sqrt(400 / len(members))


def test_negatives_are_of_other_clusters_and_of_the_most_similar():
    """With `neg_pool` of all rows those of the own cluster do not count."""
    whole, batch = small(neg_pool=SAMPLES), batch_of()
    (targets,) = whole.targets([batch], PROGRESS)
    with torch.no_grad():
        before = whole(batch, PROGRESS, targets).metrics["inter_loss"]
        own = int(batch.index[0])
        mates = (whole.clusters.labels == whole.clusters.labels[own]).nonzero().flatten()
        whole.clusters.bank.rows[mates] = F.normalize(torch.randn(len(mates), 6, dtype=torch.float64), dim=1)
        again = whole(Batch(batch.views, batch.index, None), PROGRESS, targets).metrics["inter_loss"]
    assert not torch.equal(before, again)  # positives of that cluster, and negatives of the others
    hard, easy = small(neg_pool=5), small(neg_pool=40)
    with torch.no_grad():
        losses = [
            each(batch, PROGRESS, *each.targets([batch], PROGRESS)).metrics["inter_loss"] for each in (hard, easy)
        ]
    assert losses[0] > losses[1]


def test_the_bank_holds_the_newest_keys_and_labels_follow():
    method, batch = small(), batch_of()
    done = step(method, [batch])
    (targets,) = method.targets([batch], PROGRESS)
    method.after_step(Progress(PROGRESS.step + 1, 40, 4, 1), done.carry)
    torch.testing.assert_close(method.clusters.bank.rows[batch.index], targets.keys)
    torch.testing.assert_close(method.queue.rows, targets.keys)
    assert int(method.clusters.counts.sum()) == SAMPLES and int(method.clusters.counts.min()) > 0


def ranks_step() -> tuple[float, dict[str, Tensor]]:
    distributed.init(torch.device("cpu"))
    mine = pieces(batch_of(), 16 // distributed.world_size())[distributed.rank()]
    method = small(micro_batch=len(mine.index))
    done = step(method, [mine])
    method.after_step(Progress(PROGRESS.step + 1, 40, 4, 1), done.carry)
    distributed.shutdown()
    return done.loss, {**done.gradients, **dict(method.clusters.named_buffers())}


def test_two_ranks_are_one_process():
    alone = ranks_step()
    for loss, state in run_ranks(ranks_step, 2):
        assert loss == pytest.approx(alone[0], rel=1e-12)
        torch.testing.assert_close(state, alone[1], rtol=1e-9, atol=1e-12)


def test_too_few_samples_and_bad_arguments_are_named():
    with pytest.raises(UsageError, match="4 samples cannot be put into 5 clusters"):
        InterCLR(ResNet(18, base_width=4), MoCoV2Neck(32, 12, 6), ContrastiveHead(), 16, 6, num_clusters=5).prepare(4)
    with pytest.raises(ValueError, match="neg_num is 0"):
        InterCLR(ResNet(18, base_width=4), MoCoV2Neck(32, 12, 6), ContrastiveHead(), 16, 6, neg_num=0)
    with pytest.raises(ValueError, match="inter_weight is -1"):
        small(inter_weight=-1.0)


def test_the_recipe_is_as_published():
    recipe = two_views.recipe("interclr.toml")
    model = recipe.model
    assert (recipe.global_batch, recipe.epochs, recipe.optimizer.lr) == (256, 200, 0.03)
    assert (model.neg_num, model.neg_pool, model.margin, model.num_clusters) == (16384, 128000, -0.5, 10000)
    assert (model.intra_weight, model.inter_weight, model.bank_momentum) == (0.75, 0.25, 1.0)
    assert (model.head.temperature, len(model.queue.rows), model.min_cluster) == (0.2, 65536, 20)
