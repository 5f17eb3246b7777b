"""GroupBatchNorm against torch's BatchNorm on each group by itself; conversion of torch's layers."""

import copy
import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import native_norm
from ranks import run_ranks
from sslrun.errors import UsageError
from sslrun.nn import norm
from sslrun.nn.norm import BN, GroupBatchNorm, RunningStatistics, SyncBN, set_groups
from sslrun.runtime import distributed


def reference(x: torch.Tensor, num_views: int, groups: int, size: int) -> tuple[torch.Tensor, ...]:
    """Each group through a fresh torch BatchNorm: output rows, and the mean of the groups' running statistics."""
    rows = torch.arange(len(x)).view(num_views, groups, size)
    layers = [(nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1]).double() for _ in range(groups)]
    y = torch.cat([layer(x[rows[:, g].flatten()]) for g, layer in enumerate(layers)])
    inverse = rows.transpose(0, 1).flatten().argsort()
    mean = torch.stack([layer.running_mean for layer in layers]).mean(0)
    return y[inverse], mean, torch.stack([layer.running_var for layer in layers]).mean(0)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5,)])
@pytest.mark.parametrize(("num_views", "groups", "size"), [(1, 1, 6), (1, 4, 3), (2, 3, 4), (3, 1, 2)])
@pytest.mark.parametrize("formula", [False, True])
def test_each_group_has_its_own_statistics(monkeypatch, shape, num_views, groups, size, formula):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: formula)
    torch.manual_seed(0)
    x = torch.randn(num_views * groups * size, *shape, dtype=torch.float64, requires_grad=True)
    layer = GroupBatchNorm(shape[0]).double()
    layer.group_size, layer.num_groups = size, groups
    y = layer(x)
    twin = x.detach().requires_grad_()
    expected, mean, var = reference(twin, num_views, groups, size)
    torch.testing.assert_close(y, expected)
    assert float(layer.running_mean.abs().sum()) == 0, "running statistics move with the step, not with the pass"
    RunningStatistics(layer).commit()
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert int(layer.num_batches_tracked) == 1
    assert float(layer.pending.abs().sum()) == 0

    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, twin, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("channels", [5, 8])
def test_the_passes_of_a_step_keep_their_own_statistics(channels):
    """The second pass comes before the first one's gradient."""
    torch.manual_seed(0)
    passes = [torch.randn(6, channels, 3, 2, dtype=torch.float64) * scale + scale for scale in (1, 4)]
    xs, upstream = [x.clone().requires_grad_() for x in passes], torch.randn_like(passes[0])
    layer = GroupBatchNorm(channels).double()
    ys = [layer(x) for x in xs]
    sum((y * upstream).sum() for y in ys).backward()
    for x, y, ours in zip(passes, ys, xs, strict=True):
        twin = x.clone().requires_grad_()
        mean, var = twin.mean((0, 2, 3), keepdim=True), twin.var((0, 2, 3), correction=0, keepdim=True)
        expected = (twin - mean) / (var + layer.eps).sqrt()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.grad, *torch.autograd.grad((expected * upstream).sum(), twin))
    RunningStatistics(layer).commit()
    means, variances = ([getattr(x, name)((0, 2, 3)) for x in passes] for name in ("mean", "var"))
    torch.testing.assert_close(layer.running_mean, 0.1 * sum(means) / 2)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * sum(variances) / 2)


def test_micro_batches_move_the_running_statistics_like_one_batch():
    torch.manual_seed(0)
    x = torch.randn(12, 3, 2, 2)
    whole, pieces = GroupBatchNorm(3), GroupBatchNorm(3)
    whole.group_size, whole.num_groups = 4, 3
    whole(x)
    for part in x.split(4):
        pieces(part)
    RunningStatistics(whole).commit()
    RunningStatistics(pieces).commit()
    torch.testing.assert_close(whole.running_mean, pieces.running_mean)
    torch.testing.assert_close(whole.running_var, pieces.running_var)


def test_a_skipped_step_leaves_no_trace():
    layer = GroupBatchNorm(3)
    layer(torch.full((4, 3, 2, 2), float("nan")))
    statistics = RunningStatistics(layer)
    statistics.discard()
    statistics.commit()
    torch.testing.assert_close(layer.running_mean, torch.zeros(3))
    assert int(layer.num_batches_tracked) == 0


def test_all_layers_move_as_one_and_keep_their_names():
    """Layers of different widths and momenta, one of them used twice in a step, one not at all."""
    torch.manual_seed(0)
    once, twice, never = GroupBatchNorm(2, momentum=0.5), GroupBatchNorm(3), GroupBatchNorm(4)
    model = nn.Sequential(once, twice, never)
    for layer in model:
        layer.running_mean.uniform_(), layer.running_var.uniform_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = RunningStatistics(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, y, z = torch.randn(5, 2), torch.randn(6, 3), torch.randn(7, 3)
    once(x), twice(y), twice(z)
    statistics.commit()
    torch.testing.assert_close(once.running_mean, before["0.running_mean"].lerp(x.mean(0), 0.5))
    torch.testing.assert_close(once.running_var, before["0.running_var"].lerp(x.var(0), 0.5))
    torch.testing.assert_close(twice.running_mean, before["1.running_mean"].lerp((y.mean(0) + z.mean(0)) / 2, 0.1))
    torch.testing.assert_close(twice.running_var, before["1.running_var"].lerp((y.var(0) + z.var(0)) / 2, 0.1))
    assert torch.equal(never.running_mean, before["2.running_mean"])
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 1, 0]
    assert model.state_dict().keys() == before.keys()


def misaligned(model: nn.Module) -> list[str]:
    """Names of the buffers that begin within 16 bytes."""
    return [name for name, buffer in model.named_buffers() if buffer.data_ptr() % 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_begin_at_multiples_of_16_bytes(monkeypatch, dtype):
    """A compiler moves 16 bytes at once, and copies a buffer first that begins elsewhere."""
    model = nn.Sequential(*(GroupBatchNorm(width) for width in (5, 64, 3, 1)), nn.BatchNorm1d(7)).to(dtype)
    norm.convert_batch_norms(model)
    seen, batch_norm = [], torch.nn.functional.batch_norm
    set_groups(model, 2, 3)

    def watched(x, mean, var, *args, **options):
        seen.extend([mean.data_ptr() % 16, var.data_ptr() % 16])
        return batch_norm(x, mean, var, *args, **options)

    RunningStatistics(model).commit()
    assert misaligned(model) == []
    monkeypatch.setattr(torch.nn.functional, "batch_norm", watched)
    for layer in model:
        layer(torch.randn(6, layer.num_features, dtype=dtype))
    assert seen == [0] * 2 * 3 * 5


def test_a_buffer_that_begins_elsewhere_would_be_found():
    layer = GroupBatchNorm(3)
    layer.running_mean = torch.zeros(4)[1:]
    assert misaligned(layer) == ["running_mean"]


def test_evaluation_uses_the_running_statistics():
    layer = GroupBatchNorm(2).eval()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([4.0, 9.0]))
    x = torch.tensor([[3.0, 5.0]]).view(1, 2, 1, 1)
    torch.testing.assert_close(layer(x).flatten(), torch.ones(2), atol=1e-5, rtol=0)


def test_state_has_the_names_of_torch():
    assert set(GroupBatchNorm(3).state_dict()) == set(nn.BatchNorm2d(3).state_dict())
    assert set(BN(affine=False).layer(3).state_dict()) == set(nn.BatchNorm2d(3, affine=False).state_dict())


def test_groups_reach_every_layer():
    model = nn.Sequential(GroupBatchNorm(2), nn.Sequential(GroupBatchNorm(2)))
    set_groups(model, 4, 2)
    assert [(layer.group_size, layer.num_groups) for layer in norm.group_norms(model)] == [(4, 2), (4, 2)]
    with pytest.raises(AssertionError, match="not views of 8 samples"):
        model(torch.randn(9, 2, 1, 1))


ROWS = {2: [(6, 6), (1, 11)], 4: [(3, 3, 3, 3), (5, 1, 2, 4)]}  # of each rank, by number of ranks
FORMS = ("formula", "compiled", "kernels")


def synced(affine: bool = True) -> GroupBatchNorm:
    layer = SyncBN(affine=affine).layer(5).double()
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 5))
            layer.bias.copy_(torch.linspace(-1, 1, 5))
    return layer


def form_of(form: str) -> Any:
    """Makes a layer choose torch's CUDA kernels, or the formula."""
    return mock.patch.object(norm, "_is_for_kernels", lambda *_: form == "kernels")


def case(shape: tuple[int, ...] = (5, 3, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of 12 far from zero, and the gradient that comes in."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 12, *shape, generator=generator, dtype=torch.float64).mul(2).add(70).unbind()
    return x, upstream - 70


def forward_and_backward(
    form: str, layer: GroupBatchNorm, x: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Rows out of the layer and an activation that overwrites them, and the collectives of both directions."""
    layers = nn.Sequential(layer, nn.ReLU(inplace=True))
    if form == "compiled":
        forward, backward = [], []
        backend = native_norm.counting_compiler(forward, backward)
        y = torch.compile(layers, backend=backend, fullgraph=True, dynamic=False)(x)
        y.backward(upstream)
        return y.detach(), forward, backward
    with form_of(form), native_norm.Traffic() as traffic:
        y = layers(x)
    with native_norm.Traffic() as backward_traffic:
        y.backward(upstream)
    return y.detach(), traffic.collectives, backward_traffic.collectives


def each_form() -> dict[Any, tuple[list[torch.Tensor], list[str], list[str]]]:
    """For each form and division of the batch: rows out, gradients in and summed, statistics; and the collectives."""
    distributed.init(torch.device("cpu"))
    native_norm.register()
    results = {}
    layers = [((5, 3, 2), True), ((5,), True), ((5, 3, 2), False)]
    for rows, form, (shape, affine) in itertools.product(ROWS[distributed.world_size()], FORMS, layers):
        if form == "compiled" and (shape, affine) != layers[0]:
            continue  # a second to compile
        layer, (x, upstream) = synced(affine), case(shape)
        mine, mine_upstream = (part.split(rows)[distributed.rank()] for part in (x, upstream))
        mine = mine.clone().requires_grad_()
        y, *collectives = forward_and_backward(form, layer, mine, mine_upstream)
        RunningStatistics(layer).commit()
        learned = [distributed.all_reduce_sum_(p.grad) for p in layer.parameters()]
        values = [y, mine.grad, *learned, layer.running_mean, layer.running_var]
        results[rows, form, shape, affine] = values, *collectives
    distributed.shutdown()
    return results


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=[pytest.mark.nightly] * (ranks > 2)) for ranks in ROWS])
def test_sync_over_ranks_is_one_batch_on_one(ranks):
    parts = run_ranks(each_form, ranks)
    for key in parts[0]:
        _, form, shape, affine = key
        layer, (x, upstream) = synced(affine), case(shape)
        whole = x.clone().requires_grad_()
        y = layer(whole).relu()
        y.backward(upstream)
        RunningStatistics(layer).commit()
        learned = [p.grad for p in layer.parameters()]
        values = [y.detach(), whole.grad, *learned, layer.running_mean, layer.running_var]
        for index, expected in enumerate(values):
            result = torch.cat([part[key][0][index] for part in parts]) if index < 2 else parts[-1][key][0][index]
            torch.testing.assert_close(result, expected, msg=lambda text, key=key, index=index: f"{key} {index} {text}")
        gather, reduce = (
            ("allgather_base_", "allreduce_") if form == "kernels" else ("all_gather_into_tensor", "all_reduce")
        )
        assert all((part[key][1], part[key][2]) == ([gather], [reduce]) for part in parts), key


def traffic_of_each() -> dict[str, Any]:
    """Bytes that forward and backward of each form move, for a batch in bfloat16; the results, and the collectives."""
    distributed.init(torch.device("cpu"))
    native_norm.register()
    results = {}
    for form in ("torch", *FORMS[::2]):
        layer = SyncBN().layer(16)
        generator = torch.Generator().manual_seed(distributed.rank())
        x = (
            torch.randn(8, 16, 6, 6, generator=generator)
            .bfloat16()
            .to(memory_format=torch.channels_last)
            .requires_grad_()
        )
        with form_of(form), native_norm.Traffic(x.numel()) as traffic:
            torchs = functools.partial(native_norm.torchs_own, weight=layer.weight, bias=layer.bias, eps=layer.eps)
            y = (torchs if form == "torch" else layer)(x)
            y.square().sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
        results[form] = traffic.num_bytes, traffic.collectives, [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    distributed.shutdown()
    return results


def test_sync_by_the_cuda_kernels_moves_no_more_than_torchs_layer_and_computes_the_same():
    for result in run_ranks(traffic_of_each, 2):
        (moved, collectives, values), (torchs, torchs_collectives, expected) = result["kernels"], result["torch"]
        assert moved <= torchs and len(collectives) == len(torchs_collectives) == 2
        assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))
        assert result["formula"][0] > 2 * moved, "the count sees no difference"


def two_collectives() -> list[str]:
    distributed.init(torch.device("cpu"))
    with native_norm.Traffic() as traffic:
        mean = distributed.rank_sum(torch.ones(3))
        distributed.all_reduce_sum_(mean + 1)
    distributed.shutdown()
    return traffic.collectives


def test_a_second_collective_would_be_counted():
    assert run_ranks(two_collectives, 2) == [["all_reduce", "allreduce_"]] * 2


@pytest.mark.gpu
def test_torchs_cuda_kernels_do_what_the_tests_play():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 16, 5, 5, generator=generator).to(memory_format=torch.channels_last) for _ in range(2))
    played = native_norm.through(x, dy, torch.linspace(0.5, 2, 16), native_norm.KERNELS.__getitem__)
    done = native_norm.through(x.cuda(), dy.cuda(), torch.linspace(0.5, 2, 16).cuda(), torch.__dict__.__getitem__)
    for name, value in played.items():
        torch.testing.assert_close(done[name].cpu(), value, msg=lambda text, name=name: f"{name}: {text}")


def test_sync_ignores_the_groups_of_the_recipe():
    x = torch.randn(12, 3, 2, 2)
    synced, plain = SyncBN().layer(3), BN().layer(3)
    set_groups(nn.Sequential(synced), 4, 3)
    torch.testing.assert_close(synced(x), plain(x))


def test_sync_and_plain_layers_may_lack_scale_or_shift():
    for lacks in ("weight", "bias"):
        x = torch.randn(6, 3, dtype=torch.float64)
        layer, reference = GroupBatchNorm(3).double(), nn.BatchNorm1d(3).double()
        for each in (layer, reference):
            setattr(each, lacks, None)
        for by_formula in (False, True):
            with mock.patch.object(torch.compiler, "is_compiling", lambda value=by_formula: value):
                torch.testing.assert_close(layer(x), reference(x))


SHAPES = {nn.BatchNorm1d: [(6, 4), (6, 4, 5)], nn.BatchNorm2d: [(6, 4, 3, 2)], nn.BatchNorm3d: [(6, 4, 2, 3, 2)]}
OPTIONS = [
    {},
    {"affine": False},
    {"eps": 0.1, "momentum": 0.3},
    {"momentum": None},
    {"track_running_stats": False},
    {"track_running_stats": False, "affine": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("formula", [False, True])
def test_torchs_layers_are_converted_with_all_they_hold(monkeypatch, options, formula):
    """Two groups are two forward passes of torch's layer; with one group a converted layer is torch's."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: formula)
    torch.manual_seed(0)
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            reference = kind(4, **options).double()
            reference.train()(
                torch.randn(shape, dtype=torch.float64) + 1
            )  # so that its statistics are not the first ones
            for parameter in reference.parameters():
                nn.init.normal_(parameter)
            layer = copy.deepcopy(reference)
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            norm.convert_batch_norms(layer)
            layer.double()  # without weights and statistics it has no dtype to go by
            assert isinstance(layer, GroupBatchNorm) and isinstance(layer, kind)
            assert list(layer.state_dict()) == list(before)
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(layer.eval()(x), reference.eval()(x))
            set_groups(layer, 3, 2)
            y = layer.train()(x)
            twins = [copy.deepcopy(reference).train() for _ in range(2)]
            torch.testing.assert_close(y, torch.cat([twin(part) for twin, part in zip(twins, x.split(3), strict=True)]))
            assert not torch.allclose(y, copy.deepcopy(reference).train()(x)), "groups make no difference"
            state = {name: value.clone() for name, value in layer.state_dict().items()}
            assert all(torch.equal(value, before[name]) for name, value in state.items()), "before the step is applied"
            statistics = RunningStatistics(layer)
            statistics.discard()  # a step that is skipped
            statistics.commit()
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
            layer(x)
            statistics.commit()
            for name, value in layer.state_dict().items():
                ends = torch.stack([twin.state_dict()[name] for twin in twins])
                torch.testing.assert_close(value, ends.double().mean(0).to(value.dtype))


def test_a_converted_network_keeps_its_names_hooks_and_references():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.LayerNorm(2))
    names, seen = list(network.state_dict()), []
    norms = [layer for layer in network if isinstance(layer, nn.BatchNorm2d)]  # as a backbone may keep them
    network[1].register_forward_hook(lambda *_: seen.append(1))
    norm.convert_batch_norms(network)
    assert list(network.state_dict()) == names
    assert norm.converted_norms(network) == ["1", "3"] and norm.plain_norms(network) == []
    assert norms == [network[1]] and isinstance(network[1], GroupBatchNorm) and not network[1].sync
    assert isinstance(network[3], nn.SyncBatchNorm) and network[3].sync
    copied = copy.deepcopy(network)
    copied(torch.randn(4, 3, 2, 2))  # torch's SyncBatchNorm refuses the CPU
    assert seen == [1] and len(norm.group_norms(copied)) == 2
    classes = [type(layer) for layer in network]
    norm.convert_batch_norms(network)
    assert [type(layer) for layer in network] == classes
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), GroupBatchNorm(2))
    classes = [type(layer) for layer in plain]
    norm.convert_batch_norms(plain)
    assert [type(layer) for layer in plain] == classes and norm.converted_norms(plain) == []


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it."""

    __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def test_timms_norm_with_an_activation_is_converted_with_it():
    layer, reference, x = BatchNormAct2d(3), nn.BatchNorm2d(3), torch.randn(6, 3, 2, 2)
    norm.convert_batch_norms(layer)
    set_groups(layer, 2, 3)
    assert norm.converted_norms(layer) == [""]
    torch.testing.assert_close(layer(x), torch.cat([reference(part) for part in x.split(2)]).relu())
    assert bool((layer.running_mean == 0).all())
    torch.testing.assert_close(layer.eval()(x), x.relu() / (1 + 1e-5) ** 0.5)


def test_layers_with_a_forward_of_their_own_are_left_and_named():
    class NormAndActivation(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    class Renamed(nn.BatchNorm2d):
        pass

    network = nn.Sequential(NormAndActivation(2), Renamed(2))
    norm.convert_batch_norms(network)
    assert norm.plain_norms(network) == ["0"] and norm.converted_norms(network) == ["1"]
    with pytest.raises(UsageError, match=r"model\.0: LazyBatchNorm2d has no num_features yet"):
        norm.convert_batch_norms(nn.Sequential(nn.LazyBatchNorm2d()))
