"""`sslrun config import` of methods that predict hidden patches.

The inputs in old_configs/masked are written for these tests, in the forms that MMSelfSup's own have.
"""

from pathlib import Path

import pytest
import torch

from sslrun.cli import main
from sslrun.config import load
from sslrun.importer import import_config
from sslrun.importer.old import Effect
from sslrun.recipe import Recipe

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).with_name("old_configs") / "masked"
SHIPPED = {path.stem: path for path in (ROOT / "configs/selfsup").rglob("*.toml")}
MAE, MASKFEAT = (
    "mae_vit-base-p16_8xb512-amp-coslr-800e_in1k",
    "maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k",
)
FILES = {MAE: MAE, MASKFEAT: MASKFEAT, "mae_0x": MAE, "maskfeat_0x": MASKFEAT}


def converted(path: Path, folder: Path) -> Path:
    imported = import_config(path, gpus=8)
    assert imported.missing == ""
    new = folder / f"{path.stem}.toml"
    new.write_text(imported.text)
    return new


def built(path: Path) -> Recipe:
    with torch.device("meta"):
        return load(path).build(Recipe)


@pytest.mark.parametrize("name", FILES)
def test_equals_what_ships(tmp_path, name):
    """Networks, arguments, views, masks, schedule and parameter groups."""
    path = converted(OLD / f"{name}.py", tmp_path)
    new, shipped = load(path).values, load(SHIPPED[FILES[name]]).values
    assert new["data"]["views"] == shipped["data"]["views"]
    for key in ("epochs", "global_batch"):
        assert new[key] == shipped[key]
    ours, theirs = built(path), built(SHIPPED[FILES[name]])
    assert str(ours.model) == str(theirs.model) and ours.lr == theirs.lr
    for key in ("norm_pix", "cell", "bins", "window"):
        assert getattr(ours.model, key, None) == getattr(theirs.model, key, None)
    for key in ("lr", "betas", "grad_clip"):
        assert getattr(ours.optimizer, key) == getattr(theirs.optimizer, key)
    groups = ours.optimizer.create(ours.model.named_parameters()).param_groups
    free = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    trained = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    assert free == {name for name, p in trained.items() if p.dim() == 1 or name.endswith(("_token", "pos_embed"))}


@pytest.mark.parametrize("name", FILES)
def test_says_what_it_could_not_convert(name):
    report = import_config(OLD / f"{name}.py", gpus=8).report
    assert report.findings(Effect.LOST) == [] == report.findings(Effect.CHANGED)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FILES)
def test_dry_run(tmp_path, capsys, name):
    assert main([str(converted(OLD / f"{name}.py", tmp_path)), "--dry-run"]) == 0


def imported(folder: Path, model: str, steps: str = "") -> tuple[str, Path]:
    """What is missing, and the file of the recipe."""
    old = folder / "old_8xb2.py"
    base = str(OLD / f"{MAE}.py")
    views = f"train_dataloader = dict(dataset=dict(pipeline=[{steps}]))" if steps else ""
    old.write_text(f"_base_ = {base!r}\nmodel = dict(_delete_=True, {model})\n{views}\n")
    result = import_config(old)
    new = folder / "new.toml"
    new.write_text(result.text)
    return result.missing, new


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("BEiT", "tokenizer"), ("CAE", "tokenizer"), ("MILAN", "CLIP, which others trained"), ("EVA", "CLIP"),
        ("mmpretrain.BEiT", "which others trained and this engine does not have"),
    ],
)  # fmt: skip
def test_methods_that_need_networks_of_others_are_refused_with_the_reason(tmp_path, method, reason):
    missing, _ = imported(tmp_path, f"type={method!r}, backbone=dict(type='VisionTransformer')")
    assert missing.startswith("no model: ") and reason in missing


def test_a_swin_transformer_is_refused_with_the_reason(tmp_path):
    model = "type='SimMIM', backbone=dict(type='SimMIMSwinTransformer', arch='base', window_size=6), "
    missing, _ = imported(tmp_path, model + "neck=dict(type='SimMIMNeck', in_channels=1024, encoder_stride=32)")
    assert missing == "no model: SimMIM has a vision transformer here, and SimMIMSwinTransformer is a Swin transformer"


def test_simmim_with_a_vision_transformer(tmp_path):
    model = (
        "type='SimMIM', backbone=dict(type='SimMIMViT', arch='b', img_size=192, layer_scale_init_value=0.1, "
        "drop_path_rate=0.1), neck=dict(type='SimMIMNeck', in_channels=768, encoder_stride=16), "
        "head=dict(type='SimMIMHead', patch_size=16, "
        "loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3))"
    )
    steps = (
        "dict(type='RandomResizedCrop', size=192, scale=(0.67, 1.0), backend='pillow'), "
        "dict(type='SimMIMMaskGenerator', input_size=192, mask_patch_size=32, model_patch_size=16, mask_ratio=0.6)"
    )
    missing, new = imported(tmp_path, model, steps)
    assert missing == ""
    values = load(new).values
    view = values["data"]["views"][0]
    assert view["mask"] == {"type": "RandomMask", "ratio": 0.6, "patch_size": 16, "cell_size": 32}
    assert view["transforms"][0] == {"type": "RandomResizedCrop", "size": 192, "scale": [0.67, 1.0]}
    backbone = values["model"]["backbone"]
    assert (backbone["img_size"], backbone["layer_scale"], backbone["drop_path"]) == (192, 0.1, 0.1)


def test_an_mae_without_a_decoder_says_so(tmp_path):
    """The line is that of the model, since the neck has none."""
    imported(tmp_path, "type='MAE', backbone=dict(type='MAEViT', arch='b', patch_size=16)")
    report = import_config(tmp_path / "old_8xb2.py").report
    line, *_ = (finding.line() for finding in report.findings(Effect.LOST) if "decoder" in finding.line())
    assert "old_8xb2.py:2: model.neck: " in line and line.endswith("there is no decoder without a type here")
