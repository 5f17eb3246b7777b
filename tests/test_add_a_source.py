"""docs/add-a-source.md, followed by a user in an empty folder."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import small_run
from documents import follow, refusal
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.subset import Subset, split_holdout
from sslrun.data.transforms import Resize
from sslrun.data.views import ViewGroup

DOCUMENT = small_run.ROOT / "docs" / "add-a-source.md"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The reader's folder and what the commands printed."""
    folder = tmp_path_factory.mktemp("reader")
    return folder, follow(DOCUMENT, folder)


def rows(folder: Path, name: str) -> list[dict]:
    return small_run.metrics(folder / f"work_dirs/{name}")


def test_the_example_works_outside_the_tree(reader):
    folder, printed = reader
    assert len(re.findall(r"^done: .*work_dirs/(?:tar|arrays)", printed, re.MULTILINE)) == 2, "the runs"
    for name in ("tar", "arrays"):
        assert any("knn/top1_pct" in row for row in rows(folder, name)), (
            "held-out samples of the user's source were measured"
        )
    assert (folder / "grid.png").exists()


def tar_images(folder: Path, archive: str = "train.tar"):
    spec = importlib.util.spec_from_file_location("tar_images", folder / "tar_images.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tar_images"] = module  # its class stays in the registry of sources
    spec.loader.exec_module(module)
    source = module.TarImages(str(folder / archive))
    source.open()
    return source


def test_pixels_are_the_same_from_bytes_and_from_arrays(reader):
    """Both runs saw the same samples: what the method computed is the same, number by number."""
    losses = [[row["train/loss"] for row in rows(reader[0], name) if "train/loss" in row] for name in ("tar", "arrays")]
    assert losses[0] == losses[1] and len(losses[0]) > 0


def test_parts_of_a_source_of_ones_own(reader, tmp_path):
    source = tar_images(reader[0])
    train, held_out = split_holdout(source, 0.25)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(source.names[i].rpartition("/")[2] for i in (3, 5)))
    few = Fraction(source, names=str(names))
    few.open()
    for part in (train, held_out, few, Subset(train, np.arange(7, 3, -1))):
        ids = np.array([1, 0])
        assert [source.names[i] for i in few.ids] == list(few.names)
        whole = [source.names.index(part.names[i]) for i in ids]
        assert part.encoded(ids) == source.encoded(np.array(whole)) and part.labels[ids].tolist() == [
            source.labels[i] for i in whole
        ]
        assert part.sizes[ids].tolist() == source.sizes[whole].tolist() == [[80, 80]] * 2


def test_a_damaged_member_is_named_and_replaced(reader, tmp_path):
    source = tar_images(reader[0])
    content = bytearray(Path(source.archive).read_bytes())
    for sample in (2, 9):
        offset, size = source.places[sample].tolist()
        content[offset + size // 2 : offset + size] = bytes(size - size // 2)
        content[offset : offset + 4] = b"zero" if sample == 9 else content[offset : offset + 4]
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(content)
    (tmp_path / "tar_images.py").write_text((reader[0] / "tar_images.py").read_text())
    source, bad = tar_images(tmp_path, "damaged.tar"), BadSamples(max_bad_pct=50)
    loader = Loader(
        source, [ViewGroup(1, [Resize([8, 8])])], sampler=Sequential(len(source)), seed=0, batch_size=8, bad=bad
    )
    batches = list(loader.run([(0, np.arange(8)), (0, np.arange(8, 16))]))
    assert {sample for batch in batches for sample in batch.index.tolist()}.isdisjoint({9})
    assert bad.found.keys() == {9} and bad.found[9].startswith(f"{damaged}#")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.source.archive=none.tar", "none.tar: No such file or directory: data.source cannot be read"),
        ("data.source.archive=tar.toml", "set data.source.archive to an uncompressed tar archive"),
        ("data.source.archiv=train.tar", "unknown key of TarImages; did you mean archive"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, setting, expected):
    assert expected in refusal(DOCUMENT, tmp_path, "data", "check", "tar.toml", "--set", setting)
