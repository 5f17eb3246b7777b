"""The forms of the vision transformer: registers, positions, LayerScale, SwiGLU, stochastic depth, sizes of images."""

import pytest
import torch

from sslrun.export.foreign_network import deduce
from sslrun.export.tensor_names import with_our_parts
from sslrun.nn.library import imported as library
from sslrun.nn.momentum import teacher_of
from sslrun.nn.stochastic import RotaryPositions, StochasticDepth, rotated, with_branch
from sslrun.nn.vit import SIZES, SwiGlu, VisionTransformer, resized_positions

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
EVERYTHING = {"registers": 2, "layer_scale": 0.1, "mlp": "swiglu", "mask_token": True, "patch_tokens": True}


def small(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **options}).double()


@pytest.mark.parametrize("positions", ["sine-cosine", "learned", "rotary"])
def test_any_size_of_images(positions):
    """The class token and a map of the patches; the own size is what it was before there were others."""
    model = small(positions=positions, **EVERYTHING)
    for height, width in [(32, 32), (16, 40), (8, 8)]:
        patches, feature = model(torch.randn(2, 3, height, width, dtype=torch.float64))
        assert patches.shape == (2, 24, height // 8, width // 8) and feature.shape == (2, 24)
    with pytest.raises(ValueError, match=r"images of \(32, 30\) px do not consist of patches of 8 px"):
        model(torch.zeros(1, 3, 32, 30, dtype=torch.float64))


def test_the_map_has_the_patches_in_their_places():
    """Without blocks and positions a patch's output depends on that patch alone."""
    model = small(positions="rotary", registers=2, patch_tokens=True)
    model.blocks = type(model.blocks)()
    images = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1
    differs = (model(images)[0] != model(changed)[0]).any(dim=1)[0]
    assert differs.tolist() == [[False, False, False], [False, False, True]]


def test_learned_positions_of_another_size_are_interpolated_with_gradient():
    model = small(positions="learned")
    assert model.pos_embed.requires_grad and model.patch_embed.proj.weight.requires_grad
    resized = resized_positions(model.pos_embed, (2, 5))
    assert resized.shape == (1, 11, 24)
    grid = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (2, 5), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(resized[:, 1:], wanted) and torch.equal(resized[:, :1], model.pos_embed[:, :1])
    model(torch.randn(1, 3, 16, 40, dtype=torch.float64))[0].sum().backward()
    assert model.pos_embed.grad.any()


def test_rotary_positions_are_dinov3s_angles():
    """Longhand: the height turns the first half of the pairs, the width the second; pairs are i and i + d / 2."""
    waves = RotaryPositions(8, blocks=3, rescale=2.0).double().eval()(2, 3)
    assert waves.shape == (2, 1, 6, 8)
    x = torch.randn(1, 1, 7, 8, dtype=torch.float64)
    turned = rotated(x, waves[:, 0])
    assert torch.equal(turned[:, :, 0], x[:, :, 0]), "the class token stays"
    for row in range(2):
        for column in range(3):
            center = ((row + 0.5) / 2 * 2 - 1, (column + 0.5) / 3 * 2 - 1)
            token = 1 + 3 * row + column
            for pair in range(4):
                period = torch.tensor(100.0, dtype=torch.float64) ** (2 * (pair % 2) / 4)
                angle = 2 * torch.pi * center[pair // 2] / period
                a, b = x[0, 0, token, pair], x[0, 0, token, pair + 4]
                wanted = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
                torch.testing.assert_close(turned[0, 0, token, [pair, pair + 4]], wanted, rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_the_difference_of_places_alone():
    waves = RotaryPositions(8, blocks=1, rescale=1.0).double()(4, 4)[:, 0]
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, -1, 16, -1)
    scores = (rotated(query, waves) @ rotated(key, waves).transpose(-2, -1))[0, 0]
    torch.testing.assert_close(scores[0, 5], scores[10, 15])
    assert scores[0, 5] != pytest.approx(scores[0, 6].item())


def test_coordinates_are_rescaled_in_training_for_each_block_and_never_in_a_teacher():
    model = small(positions="rotary", rotary_rescale=2.0)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert model.rope_embed(4, 4).shape[1] == 2
    first, second = (model(images)[0] for _ in range(2))
    assert not torch.equal(first, second)
    teacher = teacher_of(model)
    assert teacher.training and torch.equal(teacher(images)[0], model.eval()(images)[0])


def test_stochastic_depth_keeps_a_part_and_its_mean():
    depth = StochasticDepth([0.6, 0.0]).double()
    x = torch.ones(5, 2, dtype=torch.float64)
    seen = []
    kept, whole = depth(5)
    out = with_branch(x, lambda rows: seen.append(len(rows)) or 3 * rows, kept)
    assert seen == [2] and whole is None, "two of five: 5 * 0.4"
    assert sorted(out[:, 0].tolist()) == pytest.approx([1, 1, 1, 8.5, 8.5])  # 1 + 3 * 5 / 2
    assert depth.eval()(5) == [None, None]
    assert torch.equal(with_branch(x, lambda rows: 3 * rows, None), 4 * x)
    model = small(drop_path=0.5)
    assert model.stochastic_depth.rates == [0.0, 0.0, 0.5, 0.5]
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(teacher_of(model)(images)[0], model.eval()(images)[0])


def test_a_masked_patch_does_not_reach_the_output():
    model = small(positions="learned", **EVERYTHING)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 5] = True
    changed = images.clone()
    changed[1, :, 8:16, 8:16] += 1  # patch 5: row 1, column 1
    assert torch.equal(model(images, mask)[1], model(changed, mask)[1])
    assert not torch.equal(model(images)[1][1], model(changed)[1][1])
    assert torch.equal(model(images, mask)[1][0], model(images)[1][0])
    with pytest.raises(ValueError, match="masked patches need mask_token"):
        small()(images, mask)


def test_sizes_and_bad_arguments():
    for arch, (width, blocks, heads) in SIZES.items():
        with torch.device("meta"):
            model = VisionTransformer(arch, depth=1)
        assert (model.num_features, model.blocks[0].attn.heads) == (width, heads) and blocks >= 12
    with torch.device("meta"):
        assert VisionTransformer("so400m", depth=1).blocks[0].mlp.fc1.out_features == 4304
    assert SwiGlu(1536, 6144).fc2.in_features == 4096, "as in DINOv2's g"
    for arguments, message in [
        ({"rotary_rescale": 0.5}, "rotary_rescale is 0.5, expected 1 or more"),
        ({"positions": "rotary", "embed_dim": 36, "num_heads": 6}, "a head has 6 numbers"),
        ({"registers": -1}, "registers is -1"),
        ({"drop_path": 1.0}, "drop_path is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**arguments)


@pytest.mark.parametrize("ratio", [None, 4.0, 34 / 9])
def test_a_size_with_another_mlp_is_told(ratio):
    """SO400m's MLP is narrower than four times the width, and DINOv3's of that width is another one."""
    with torch.device("meta"):
        model = VisionTransformer("so400m", mlp_ratio=ratio)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = deduce(shapes).arguments()
    assert table.pop("type") == "VisionTransformer" and table["arch"] == "so400m"
    with torch.device("meta"):
        twin = VisionTransformer(**table)
    assert {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()} == shapes


def test_the_published_networks_load():
    """DINOv2's and DINOv3's names and forms, of random weights: shapes are deduced, and the outputs are ours."""
    for options in (
        {"positions": "learned", "registers": 4, "layer_scale": 0.1},
        {"positions": "learned", "layer_scale": 0.1, "mlp": "swiglu"},
        {"positions": "rotary", "registers": 4, "layer_scale": 0.1, "mlp": "swiglu", "norm_eps": 1e-5},
    ):
        model = small(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        theirs = {"mask_token": torch.zeros(1, 24)}
        for name, tensor in model.state_dict().items():
            is_v3 = options["positions"] == "rotary"
            if name == "reg_token":
                name = "storage_tokens" if is_v3 else "register_tokens"
            if ".mlp.fc" in name and options.get("mlp") == "swiglu":
                if is_v3 and "fc1" in name:
                    theirs[name.replace("fc1", "w1")], theirs[name.replace("fc1", "w2")] = tensor.chunk(2)
                    continue
                name = name.replace("fc1", "w12").replace("fc2", "w3")
            theirs[name] = tensor.clone()
            if is_v3 and name.endswith("qkv.bias"):  # keys have no bias, whatever is stored
                theirs[f"{name}_mask"] = torch.ones_like(tensor)
                theirs[f"{name}_mask"][24:48] = tensor[24:48] = 0
        ours = with_our_parts(theirs)
        architecture = deduce({name: tuple(tensor.shape) for name, tensor in ours.items()})
        keys = {**architecture.arguments(), "num_heads": 3}
        if options["positions"] == "rotary":
            keys["img_size"] = 32
        assert keys.pop("type") == "VisionTransformer"
        twin = VisionTransformer(**keys).double()
        assert twin.load_state_dict(ours, strict=False).missing_keys == []
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(twin.eval()(images), model.eval()(images))


@pytest.mark.needs("timm")
def test_the_forms_are_those_of_timm():
    """The outputs of timm's DINOv2 (registers, LayerScale, SwiGLU) and DINOv3 (rotary positions), of random weights."""
    timm = library("timm")
    sizes = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    ours = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3, "layer_scale": 0.1}
    for name, options in [
        ("vit_small_patch14_reg4_dinov2", {"registers": 4}),
        ("vit_giant_patch14_dinov2", {"mlp": "swiglu"}),
    ]:
        theirs = timm.create_model(name, **sizes).double().eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.5)
        model = VisionTransformer(positions="learned", **ours, **options).double().eval()
        model.load_state_dict(with_our_parts(theirs.state_dict()))
        torch.testing.assert_close(model(images)[0], theirs.forward_features(images)[:, 0])


@pytest.mark.needs("timm")
def test_rotary_positions_are_those_of_timms_dinov3():
    timm = library("timm")
    theirs = timm.create_model(
        "vit_small_patch16_dinov3", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=0
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3, positions="rotary", registers=4,
        layer_scale=0.1, norm_eps=theirs.norm.eps,
    ).double().eval()  # fmt: skip
    renamed = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor
               for name, tensor in theirs.state_dict().items()}  # fmt: skip
    fixed = {name: tensor for name, tensor in model.state_dict().items() if name not in renamed}
    left = [name for name in fixed if not name.startswith("rope_embed") and not name.endswith("qkv.bias")]
    assert left == []
    for name in fixed:
        if name.endswith("qkv.bias"):  # timm's has one bias for queries and one for values, or none
            place = name.removesuffix("qkv.bias")
            parts = [renamed.get(f"{place}{part}_bias") for part in "qkv"]
            fixed[name] = torch.cat([torch.zeros(24) if part is None else part for part in parts]).double()
    model.load_state_dict({**{name: renamed[name] for name in model.state_dict() if name in renamed}, **fixed})
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    found = theirs.forward_features(images[..., :32])[:, 0]
    torch.testing.assert_close(model(images[..., :32])[0], found, rtol=1e-4, atol=1e-5)
