"""configs/continue: from a file with published names to a run that first trains all but the backbone."""

import pytest
import torch
from safetensors.torch import load_file

import small_run
from foreign_checkpoints import linear, resnet, under, vit
from small_run import call
from sslrun.config import load
from sslrun.contract import Progress
from sslrun.nn.vit import resized_positions
from sslrun.optim import learning_rates
from sslrun.runtime import checkpoint
from sslrun.session import build

CONTINUE = small_run.ROOT / "configs/continue"
WIDTH = 24
SIZES = {"embed_dim": WIDTH, "depth": 2, "heads": 6, "mlp_ratio": 4.0, "mask_token": True}
DINO = [
    f"model.backbone.embed_dim={WIDTH}", "model.backbone.depth=2", "model.backbone.num_heads=6",
    f"model.neck.in_channels={WIDTH}", "model.neck.hid_channels=32", "model.neck.out_channels=8",
    "model.head.feat_dim=8", "model.head.num_prototypes=16",
]  # fmt: skip


def dinov2():
    """Trained on 5 x 5 patches, without registers."""
    return vit(patch_size=14, img_size=70, positions="learned", layer_scale=1.0, **SIZES)


def dinov3():
    own = vit(patch_size=16, img_size=64, positions="rotary", registers=4, layer_scale=1.0, norm_eps=1e-5, **SIZES)
    theirs = {name.replace("reg_token", "storage_tokens"): tensor for name, tensor in own.items()}
    masks = {f"{name}_mask": torch.ones_like(own[name]) for name in own if name.endswith("qkv.bias")}
    return theirs | masks


def mae():
    encoder = vit(patch_size=16, img_size=64, **SIZES | {"mask_token": False})
    decoder = vit(2, patch_size=16, img_size=64, **SIZES | {"embed_dim": 16, "heads": 4})
    return {"model": {**encoder, "mask_token": torch.zeros(1, 1, 16), **under("decoder_", decoder)}}


def torchvision():
    return {**resnet(50), **linear("fc", 128, 10)}


def sizes(*pixels):
    return [f"data.views.{view}.transforms.0.size={size}" for view, size in enumerate(pixels)]


CASES = {
    "dino_vit-small-p14_from-dinov2": (
        dinov2, ["--heads", "6"], [*DINO, "model.backbone.img_size=56", *sizes(56, 56, 28)],
    ),
    "dino_vit-base-p14_from-dinov2": (
        dinov2, ["--heads", "6"], [*DINO, "model.backbone.img_size=56", *sizes(56, 56, 28)],
    ),
    "dino_vit-small-p16_from-dinov3": (
        dinov3, ["--heads", "6"], [*DINO, "model.backbone.img_size=64", *sizes(64, 64, 32)],
    ),
    "mae_vit-base-p16_from-mae": (
        mae, ["--heads", "6"], [
            *DINO[:3], "model.backbone.img_size=64", f"model.decoder.in_channels={WIDTH}", "model.decoder.img_size=64",
            "model.decoder.embed_dim=16", "model.decoder.depth=1", "model.decoder.num_heads=4", *sizes(64),
        ],
    ),
    "mocov3_resnet50_from-torchvision": (
        torchvision, [], [
            "model.backbone.base_width=4", "model.neck.in_channels=128", "model.neck.hid_channels=16",
            "model.neck.out_channels=8", "model.head.predictor.in_channels=8", "model.head.predictor.hid_channels=16",
            "model.head.predictor.out_channels=8", *sizes(32),
        ],
    ),
}  # fmt: skip
DAILY = "dino_vit-small-p14_from-dinov2"


def test_every_recipe_is_tried():
    assert {path.stem for path in CONTINUE.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] * (n != DAILY)) for n in CASES])
def test_heads_learn_before_the_backbone_does(name, images, tmp_path, capsys):
    """Three steps, of which each is a third of an epoch: frozen, the ramp's first rate, which is 0, and half of it."""
    published, words, overrides = CASES[name]
    torch.save(published(), tmp_path / "published.pth")
    new = tmp_path / "new.safetensors"
    code, _, err = call(capsys, "import-weights", tmp_path / "published.pth", "-o", new, *words)
    assert code == 0 and "missing: nothing" in err, err
    config = load(str(CONTINUE / f"{name}.toml"))
    rules = config.values["optimizer"]["paramwise"]
    (frozen,) = [number for number, rule in enumerate(rules) if rule.get("match") == r"^backbone\."]
    assert (rules[frozen]["freeze_epochs"], rules[frozen]["ramp_epochs"]) == (7, 1)
    overrides = [
        *overrides, f"load_from={new}", f"data.source.data_prefix={images}", "data.samples_per_gpu=8",
        "global_batch=24", '_delete_=["epochs"]', "max_iters=3", "lr.warmup_epochs=0.01", "log.interval=1",
        f"optimizer.paramwise.{frozen}.freeze_epochs=0.34", f"optimizer.paramwise.{frozen}.ramp_epochs=0.67",
        "checkpoint.by=iter", "checkpoint.interval=1", "monitor={_delete_=true}", "engine.device=cpu",
        "engine.threads=1",
    ]  # fmt: skip
    given = [f"--set={each}" for each in overrides]
    code, _, err = call(capsys, CONTINUE / f"{name}.toml", "--work-dir", tmp_path, *given)
    assert code == 0 and "% of the backbone" not in err, err
    states = [checkpoint.load(tmp_path / name / f"checkpoints/step_{step:08d}")[0]["model"] for step in (1, 2, 3)]
    file = load_file(new)
    if name.endswith("dinov2"):
        file["backbone.pos_embed"] = resized_positions(file["backbone.pos_embed"], 4)
    trained = [n for n in file if n.startswith("backbone.") and n.endswith("weight")]
    for state in states[:2]:
        assert all(torch.equal(state[n], file[n]) for n in trained)
        assert all(torch.equal(state[n], file[n]) for n in file if "running" not in n and "num_batches" not in n)
    assert all(not torch.equal(states[2][n], file[n]) for n in trained)
    heads = [n for n in states[0] if n.split(".")[0] in ("neck", "decoder") and n.endswith("weight")]
    assert heads and all(not torch.equal(states[0][n], states[1][n]) for n in heads)
    if name.startswith("dino"):
        assert all(torch.equal(state["backbone.cls_token"], file["backbone.cls_token"]) for state in states)


def test_rates_of_the_authors_recipe():
    """DINOv3's for other domains, with the lengths of its 45 epochs."""
    with torch.device("meta"):
        recipe = build(load(str(CONTINUE / "dino_vit-small-p14_from-dinov2.toml")))
    groups = recipe.optimizer.create(recipe.model.named_parameters(), recipe.model.backbone).param_groups
    number = {name: at for at, group in enumerate(groups) for name in group["param_names"]}
    names = ["neck.mlp.0.weight", "head.prototypes.weight", "backbone.cls_token", "backbone.norm.weight"]
    names += [f"backbone.blocks.{block}.attn.qkv.weight" for block in (0, 11)]
    assert recipe.epochs == 45

    def rates(epoch: float) -> list[float | None]:
        place = Progress(round(epoch * 100), 4500, 100, 0)
        return [learning_rates(groups, recipe.lr, place)[number[name]] for name in names]

    assert rates(0.29)[1:] == [None] * 5 and rates(0.3)[1] is not None
    assert rates(6.99) == [5e-5, 5e-5, None, None, None, None]
    assert rates(7.5) == pytest.approx([5e-5, 5e-5, 0.0, 2.5e-5, 2.5e-5 * 0.9**12, 2.5e-5 * 0.9])
    for epoch in (8, 44):
        assert rates(epoch) == pytest.approx([5e-5, 5e-5, 0.0, 5e-5, 5e-5 * 0.9**12, 5e-5 * 0.9])
    decays = {name: groups[number[name]]["weight_decay"] for name in number}
    assert {decays[name] for name in decays if name.endswith(("bias", ".gamma", "norm1.weight", "cls_token"))} == {0.0}
    assert decays["backbone.blocks.0.mlp.fc1.weight"] == 0.04
    parts = recipe.optimizer.grad_clip.parts(list(number))
    assert [{name.split(".")[0] for name in part} for part in parts] == [{"backbone"}, {"neck", "head"}]
