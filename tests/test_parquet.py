"""Parquet files as a source: images and labels as Hugging Face stores them, read in groups of rows."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from photographs import jpeg
from shards import opened as opened_shards
from small_run import call, write_recipe
from sslrun.data import outage
from sslrun.data.reading import read_all
from sslrun.data.sources import parquet as parquet_module
from sslrun.data.sources.parquet import Parquet
from sslrun.errors import UsageError

PICTURES = [jpeg(np.full((8 + number, 12, 3), 20 * number, dtype=np.uint8)) for number in range(7)]
LABELS = [2, 0, 1, 0, 2, 2, 0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def write(
    path: Path, pictures: list, labels: list | None = None, has_metadata: bool = True, bare: bool = False
) -> Path:
    """Groups of three rows, snappy, as `datasets` writes them."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": one, "path": f"{number}.jpg"} for number, one in enumerate(pictures)]
    columns = {"image": pyarrow.array(pictures if bare else images, pyarrow.binary() if bare else struct)}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "elk", "none"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if has_metadata else None
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path, row_group_size=3)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "data/train-0.parquet", PICTURES[:4], LABELS[:4])
    write(tmp_path / "data/train-1.parquet", PICTURES[4:], LABELS[4:])
    return tmp_path / "data"


def opened(files: Path | str, **options: str) -> Parquet:
    source = Parquet(str(files), **options)
    source.open()
    return source


@pytest.mark.needs("pyarrow")
def test_images_labels_and_names(folder, monkeypatch):
    for files in (folder, f"{folder}/train-{{0..1}}.parquet"):
        source = opened(files)
        assert [name.rpartition("/")[2] for name in source.names] == [
            f"train-{file}.parquet#{row}" for file, row in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
        ]
        assert source.labels.tolist() == LABELS and source.class_names == ["cat", "dog", "elk", "none"]
        ids = np.array([6, 0, 3, 6, 2])
        assert source.encoded(ids) == [PICTURES[i] for i in ids]
        assert source.sizes.tolist() == [[8 + i, 12] for i in range(7)]
    monkeypatch.setattr(parquet_module, "_KEPT", 1)
    few = opened(folder)
    assert [few.encoded(np.array([i]))[0] for i in (0, 6, 3, 0)] == [PICTURES[i] for i in (0, 6, 3, 0)]
    assert len(few._groups._kept) == 1, "no more is kept than is allowed, but for the last one"


@pytest.mark.needs("pyarrow")
def test_groups_in_use_are_read_once(folder, monkeypatch):
    read, seen = Parquet._read_group, []
    monkeypatch.setattr(Parquet, "_read_group", lambda self, group: seen.append(group) or read(self, group))
    source = opened(folder)
    assert source.encoded(np.array([5, 0, 1, 4, 2, 3, 6])) and sorted(seen) == [0, 1, 2]


@pytest.mark.needs("pyarrow")
def test_other_forms(tmp_path):
    bare = opened(
        write(tmp_path / "a.parquet", PICTURES, [f"class {label}" for label in LABELS], has_metadata=False, bare=True)
    )
    assert bare.labels.tolist() == LABELS and bare.class_names == ["class 0", "class 1", "class 2"]
    assert bare.encoded(np.array([4])) == [PICTURES[4]]
    assert opened(tmp_path / "a.parquet", label="none").labels is None
    numbers = opened(write(tmp_path / "b.parquet", PICTURES, LABELS, has_metadata=False))
    assert numbers.labels.tolist() == LABELS and numbers.class_names is None
    assert opened(write(tmp_path / "c.parquet", PICTURES)).labels is None


@pytest.mark.needs("pyarrow")
@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("none.parquet", {}, "none.parquet does not exist.*set data.source.files to a .parquet file"),
        ("data", {"image": "picture"}, "has no images in picture, but image, label: set data.source.image"),
        ("data", {"label": "class"}, "has no column class, but image, label: set data.source.label"),
        ("data", {"label": "image"}, "labels are numbers or names, not struct.*set data.source.label"),
        ("text.parquet", {}, "text.parquet is damaged, cut short, or no Parquet file"),
        ("cut.parquet", {}, "cut.parquet is damaged, cut short, or no Parquet file"),
        ("gap.parquet", {}, "1 rows have no label: set data.source.label"),
        ("hf://datasets/a/b.parquet", {}, "copy the files to a disk"),
    ],
)
def test_what_is_wrong_is_one_line(folder, monkeypatch, files, options, message):
    monkeypatch.chdir(folder.parent)
    Path("text.parquet").write_text("no parquet" * 20)
    Path("cut.parquet").write_bytes((folder / "train-0.parquet").read_bytes()[:-50])
    write(Path("gap.parquet"), PICTURES[:2], [1, None])
    with pytest.raises(UsageError, match=message) as error:
        opened(files, **options)
    assert "\n" not in str(error.value)


@pytest.mark.needs("pyarrow")
def test_a_damaged_group_and_a_missing_image_are_no_outage(folder, tmp_path):
    path = write(tmp_path / "none.parquet", [PICTURES[0], None, PICTURES[2]])
    reads = read_all(opened(path), np.arange(3))
    assert reads[1] == outage.Unreadable("the row has no bytes") and reads[2].tobytes() == PICTURES[2]
    source = opened(folder / "train-0.parquet")
    path = folder / "train-0.parquet"
    content, at = path.read_bytes(), path.stat()
    path.write_bytes(content[:4] + bytes(16) + content[20:])  # the header of the first page
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    first, last = read_all(source, np.array([0, 3]))
    assert isinstance(first, outage.Unreadable) and not first.is_outage and last.tobytes() == PICTURES[3]
    path.write_bytes(content[:-1])
    (changed,) = read_all(source, np.array([1]))
    assert changed == outage.Unreadable("the file has changed since it was listed")


@pytest.mark.needs("pyarrow")
def test_shards_packed_from_parquet(capsys, folder, tmp_path):
    recipe = write_recipe(tmp_path, folder)
    recipe.write_text(recipe.read_text().replace('"ImageFolder", data_prefix', '"Parquet", files'))
    code, _, err = call(capsys, "data", "pack", recipe, tmp_path / "out", "--shard-size", "20k")
    assert code == 0, err
    source, packed = opened(folder), opened_shards(tmp_path / "out")
    assert packed.encoded(np.arange(7)) == source.encoded(np.arange(7))
    assert packed.labels.tolist() == LABELS and packed.class_names == source.class_names
    assert packed.names[5].endswith("#train-1-00000001.jpg")
    assert call(capsys, "data", "pack", folder / "train-1.parquet", tmp_path / "one")[0] == 0
    assert opened_shards(tmp_path / "one").encoded(np.arange(3)) == PICTURES[4:]
    code, out, err = call(capsys, "data", "check", recipe, "--min-side", "4", "--workers", "1")
    assert code == 0 and "Parquet" in out and "before a training, `sslrun data pack` makes shards" in out, err


def test_a_missing_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow \(pip install 'sslrun\[parquet\]'\)"):
        opened(tmp_path)
