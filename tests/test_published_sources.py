"""ImageNet-100, Places205 and iNaturalist 2018 in their published layouts, and the presets of all data sets."""

import json
import os
import re
from pathlib import Path

import pytest

from sslrun.config import load
from sslrun.data.sources.imagenet100 import ImageNet100
from sslrun.data.sources.inaturalist2018 import INaturalist2018
from sslrun.data.sources.places205 import Places205
from sslrun.errors import UsageError
from sslrun.recipe import Recipe

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "configs/_base_/datasets"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def relative(source, root: Path) -> list[str]:
    source.open()
    return [os.path.relpath(path, root) for path in source.names]


def test_imagenet100_takes_the_listed_folders(tmp_path):
    touch(tmp_path, "n03/a.JPEG", "n01/c.JPEG", "n01/b.JPEG", "n02/x.JPEG", "n04/y.JPEG")
    classes = tmp_path / "classes.txt"
    classes.write_text("n03 a name\n\nn01\n")
    source = ImageNet100(str(tmp_path), str(classes))
    assert relative(source, tmp_path) == ["n01/b.JPEG", "n01/c.JPEG", "n03/a.JPEG"]
    assert source.labels.tolist() == [0, 0, 1] and source.class_names == ["n01", "n03"]
    classes.write_text("n03\nn08\nn09\n")
    with pytest.raises(UsageError, match=r"lacks 2 of the 3 class folders that .* the first of them n08"):
        ImageNet100(str(tmp_path), str(classes)).open()
    with pytest.raises(UsageError, match=r"gone.txt: No such file or directory: set data.source.class_file"):
        ImageNet100(str(tmp_path), str(tmp_path / "gone.txt")).open()


def test_places205_by_list_and_by_folder(tmp_path):
    touch(tmp_path, "a/abbey/1.jpg", "a/airport/2.jpg", "c/church/outdoor/3.jpg", "c/church/indoor/4.jpg")
    source = Places205(str(tmp_path))
    expected = ["a/abbey/1.jpg", "a/airport/2.jpg", "c/church/indoor/4.jpg", "c/church/outdoor/3.jpg"]
    assert relative(source, tmp_path) == expected
    assert source.labels.tolist() == [0, 1, 2, 3]
    assert source.class_names == ["a/abbey", "a/airport", "c/church/indoor", "c/church/outdoor"]
    listed = tmp_path / "train_places205.csv"
    listed.write_text("a/airport/2.jpg 7\na/abbey/1.jpg 0\n")
    source = Places205(str(tmp_path), str(listed))
    assert relative(source, tmp_path) == ["a/airport/2.jpg", "a/abbey/1.jpg"] and source.labels.tolist() == [7, 0]
    with pytest.raises(UsageError, match=r"gone.csv: No such file"):
        Places205(str(tmp_path), "gone.csv").open()


def test_inaturalist_by_json_list_and_folder(tmp_path):
    files = ["train_val2018/Aves/12/a.jpg", "train_val2018/Fungi/3/b.jpg", "train_val2018/Aves/12/val.jpg"]
    touch(tmp_path, *files)
    table = {
        "images": [{"id": 5, "file_name": files[1], "height": 1}, {"id": 9, "file_name": files[0]}],
        "annotations": [{"id": 0, "image_id": 9, "category_id": 12}, {"id": 1, "image_id": 5, "category_id": 3}],
    }
    published = tmp_path / "train2018.json"
    published.write_text(json.dumps(table))
    source = INaturalist2018(str(tmp_path), str(published))
    assert relative(source, tmp_path) == [files[1], files[0]] and source.labels.tolist() == [3, 12]
    listed = tmp_path / "train.txt"
    listed.write_text(f"{files[0]} 12\n")
    source = INaturalist2018(str(tmp_path), str(listed))
    assert relative(source, tmp_path) == [files[0]] and source.labels.tolist() == [12]
    source = INaturalist2018(str(tmp_path))
    assert relative(source, tmp_path) == [files[0], files[2], files[1]] and source.labels.tolist() == [0, 0, 1]
    for text, message in (("{", "is not an annotation file"), ('{"images": []}', "KeyError.'annotations'")):
        published.write_text(text)
        with pytest.raises(UsageError, match=message):
            INaturalist2018(str(tmp_path), str(published)).open()


def test_the_list_of_100_classes_is_one():
    names = (PRESETS / "imagenet100.txt").read_text().split()
    assert len(set(names)) == 100 and names == sorted(names)
    assert all(re.fullmatch(r"n\d{8}", name) for name in names)


@pytest.mark.parametrize(
    ("name", "size", "count", "blur"),
    [
        ("imagenet", 224, 1_281_167, True),
        ("imagenet100", 224, 126_689, True),
        ("places205", 224, 2_448_873, True),
        ("inat18", 224, 437_513, True),
        ("cifar10", 32, 50_000, False),
        ("cifar100", 32, 50_000, False),
        ("stl10", 96, 105_000, True),
    ],
)
def test_a_recipe_may_extend_any_preset(name, size, count, blur, tmp_path):
    recipe = tmp_path / "recipe.toml"
    parts = ["models/mocov2", f"datasets/{name}_mocov2", "schedules/sgd_coslr-200e_in1k"]
    recipe.write_text(
        f"extends = {[str(ROOT / 'configs/_base_' / f'{part}.toml') for part in parts]}\nglobal_batch = 256\n"
        "[model]\nbackbone = { depth = 18, base_width = 4 }\nneck = { in_channels = 32 }\nqueue_len = 16\n"
    )
    config = load(recipe)
    assert config.notes == []
    data = config.build(Recipe).data
    (group,) = data.views
    assert group.num_views == 2 and group.size == (size, size)
    assert data.source.nominal_size == count
    kinds = [type(transform).__name__ for transform in group.transforms]
    expected = ["RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur", "RandomHorizontalFlip"]
    assert kinds == [kind for kind in expected if blur or kind != "GaussianBlur"] + ["Normalize"]
    own_red = {"cifar10": 0.4914, "cifar100": 0.5071, "stl10": 0.4467}
    assert group.normalize.mean[0] == own_red.get(name, 0.485)
    if name.startswith("cifar"):
        assert type(data.holdout) is type(data.source) and data.holdout.split == "test"
