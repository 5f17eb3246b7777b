"""A part of a source: drawn class by class, the same in every run, or listed in a file."""

import numpy as np
import pytest

from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.errors import UsageError


def opened(images, **options) -> Fraction:
    fraction = Fraction(ImageFolder(str(images)), **options)
    fraction.open("eval.train")
    return fraction


def test_each_class_gives_its_share(images):
    tenth, half = opened(images, share=0.1), opened(images, share=0.5)
    assert np.bincount(tenth.labels).tolist() == [2] * 4 and np.bincount(half.labels).tolist() == [10] * 4
    assert set(tenth.ids) < set(half.ids)
    assert (np.diff(tenth.ids) > 0).all()
    assert [tenth.source.names[i] for i in tenth.ids] == list(tenth.names)
    assert tenth.labels.tolist() == tenth.source.labels[tenth.ids].tolist()


def test_the_seed_decides_and_nothing_else(images):
    first = opened(images, share=0.3).ids
    assert first.tolist() == opened(images, share=0.3).ids.tolist()
    assert first.tolist() != opened(images, share=0.3, seed=1).ids.tolist()


def test_no_class_is_left_without_a_sample(images):
    assert np.bincount(opened(images, share=0.001).labels).tolist() == [1] * 4


def test_without_classes_all_of_them_are_one(images):
    flat = opened(images / "class_0", share=0.25)
    assert len(flat) == 5 and flat.labels is None


def test_a_file_may_name_them(images, tmp_path):
    folder = tmp_path / "images"
    for name, label in (("a.jpg", "x"), ("b.jpg", "x"), ("c.jpg", "y")):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).symlink_to(images / "class_0/00.jpg")
    names = tmp_path / "names.txt"
    names.write_text("c.jpg\n\nx/a.jpg\n")
    named = opened(folder, names=str(names))
    assert (named.ids.tolist(), named.labels.tolist()) == ([0, 2], [0, 1])
    names.write_text("c.jpg\nz.jpg\n")
    with pytest.raises(UsageError, match=r"names 2 images, of which .* has 1"):
        opened(folder, names=str(names))
    with pytest.raises(UsageError, match=r"set eval.train.names to a file"):
        opened(folder, names="nowhere.txt")


@pytest.mark.parametrize("options", [{}, {"share": 0.1, "names": "x"}, {"share": 0}, {"share": 1.5}])
def test_what_cannot_be(images, options):
    with pytest.raises(ValueError, match="expected"):
        Fraction(ImageFolder(str(images)), **options)
