"""Crops of several sizes in one pass: the same as one pass for each size."""

import pytest
import torch
import torch.nn.functional as F

from sslrun.nn import packing, self_distillation
from sslrun.nn.checkpointing import checkpoint_activations
from sslrun.nn.packing import Layout
from sslrun.nn.resnet import ResNet
from sslrun.nn.self_distillation import outputs_of_sizes
from sslrun.nn.vit import VisionTransformer
from sslrun.randomness import Phase
from sslrun.runtime.network_draws import begin, drawing_parts

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 16, "patch_size": 4}
NETWORKS = {
    "plain": {},
    "drop path": {"drop_path": 0.4},
    "uniform drop path": {"drop_path": 0.3, "drop_path_uniform": True, "layer_scale": 0.5},
    "rotary": {"positions": "rotary", "rotary_rescale": 2.0, "registers": 2, "drop_path": 0.2},
    "learned": {"positions": "learned", "registers": 1, "mlp": "swiglu", "global_pool": "avg"},
    "maps": {"positions": "learned", "mask_token": True, "patch_tokens": True},
}
MASK = torch.rand(6, 16, generator=torch.Generator().manual_seed(2)) < 0.3


def network(**changes):
    torch.manual_seed(0)
    return VisionTransformer("tiny", **SMALL | changes).double().train()


def crops(*counts_and_sizes):
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, 3, size, size, dtype=torch.float64, generator=random) for count, size in counts_and_sizes
    ]


THREE_SIZES = crops((6, 16), (12, 8), (3, 12))


def outputs_and_gradients(model, function):
    begin(drawing_parts(model), seed=1, step=2, phase=Phase.FORWARD, micro_batch=0)
    outputs = function()
    model.zero_grad()
    sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients


def by_bounds(query, key, value, bounds, key_bounds, longest, longest_key):
    """What the kernel computes: each sequence from one bound to the next."""
    assert bounds.dtype == torch.int32 and bounds is key_bounds and longest == longest_key == int(bounds.diff().max())
    assert bounds[0] == 0 and bounds[-1] == len(query)
    parts = []
    for start, end in bounds.unfold(0, 2, 1).tolist():
        triple = (each[start:end].transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*triple).squeeze(0).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kernel", [False, True], ids=["call for each size", "varlen"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_one_pass_for_each_size(name, kernel, monkeypatch):
    monkeypatch.setattr(packing, "has_varlen_attention", lambda images: kernel)
    monkeypatch.setattr(packing, "varlen_attn", by_bounds)
    model = network(**NETWORKS[name])
    first, *others = THREE_SIZES
    masked = {"mask": MASK} if model.mask_token is not None else {}
    apart = outputs_and_gradients(model, lambda: [*model(first, **masked), *(model(each)[-1] for each in others)])
    together = outputs_and_gradients(model, lambda: model(first, **masked, others=others))
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    assert len(apart[1]) >= 20


def test_patches_that_the_first_size_shows():
    model = network(positions="learned")
    first, *others = THREE_SIZES
    visible = torch.tensor([1, 4, 7, 15]).expand(6, -1)
    apart = outputs_and_gradients(
        model, lambda: [*model(first, visible=visible), *(model(each)[-1] for each in others)]
    )
    together = outputs_and_gradients(model, lambda: model(first, visible=visible, others=others))
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["blocks", "blocks.1", "blocks.*.attn"])
def test_activations_may_be_computed_again(part):
    model = network(**NETWORKS["rotary"])
    first, *others = THREE_SIZES
    kept = outputs_and_gradients(model, lambda: model(first, others=others))
    assert checkpoint_activations(model, [part], "key")
    torch.testing.assert_close(outputs_and_gradients(model, lambda: model(first, others=others)), kept)


def test_widths_that_the_kernel_cannot_take(monkeypatch):
    monkeypatch.setattr(packing, "has_varlen_attention", lambda images: True)
    monkeypatch.setattr(packing, "varlen_attn", lambda *_: pytest.fail("heads of 6 numbers"))
    model = network(embed_dim=12, num_heads=2)
    first, *others = THREE_SIZES
    assert len(model(first, others=others)) == 3


def test_bounds_are_the_first_token_of_each_image():
    layout = Layout.of([(2, 5), (3, 2)], torch.device("cpu"))
    assert layout.bounds.tolist() == [0, 5, 10, 12, 14, 16]
    assert [part.shape for part in layout.split(torch.zeros(16, 7))] == [(2, 5, 7), (3, 2, 7)]


def test_processors_compute_each_size_by_itself(monkeypatch):
    model = network()
    calls = []
    monkeypatch.setattr(packing, "attention", lambda *_: pytest.fail("packed"))
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    outputs = outputs_of_sizes(model, THREE_SIZES)
    assert [len(output) for output in outputs] == [6, 12, 3] and len(calls) == 3


def test_convolutions_compute_each_size_by_itself(monkeypatch):
    monkeypatch.setattr(self_distillation, "has_varlen_attention", lambda images: True)
    model = ResNet(18, base_width=4)
    outputs = outputs_of_sizes(model, [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)])
    assert [output.shape[:2] for output in outputs] == [(2, 32), (4, 32)]


def test_transformers_compute_all_sizes_in_one_pass_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(self_distillation, "has_varlen_attention", lambda images: True)
    model = network()
    calls = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    outputs_of_sizes(model, THREE_SIZES)
    assert len(calls) == 1


def test_is_compiled_as_one_graph():
    model = network(**NETWORKS["rotary"])
    first, *others = THREE_SIZES
    expected = outputs_and_gradients(model, lambda: model(first, others=others))
    whole = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(outputs_and_gradients(model, lambda: whole(first, others=others)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["drop path", "rotary", "maps"])
def test_kernel_equals_one_pass_for_each_size(name):
    """bfloat16, and the gradients, which differ by roundings of 2^-8 in each of the blocks."""
    model = network(**NETWORKS[name] | {"embed_dim": 48}).float().cuda()
    first, *others = [each.float().cuda() for each in crops((8, 16), (16, 8))]
    with torch.autocast("cuda", torch.bfloat16):
        apart = outputs_and_gradients(model, lambda: [*model(first), *(model(each)[-1] for each in others)])
        together = outputs_and_gradients(model, lambda: model(first, others=others))
    for ours, theirs in zip(together[0], apart[0], strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    for key in apart[1]:
        assert (together[1][key] - apart[1][key]).norm() <= 0.05 * apart[1][key].norm() + 1e-6
