"""Matches the classes of images that are measured with those of the images that are learned from.

Each source numbers its classes by itself: a folder of `b` and `c` gives `b` the number that a folder of `a`, `b`, `c`
gives to `a`. Before labels of two sources are compared, those of the second get the first one's numbers, by name.
"""

import logging
from collections.abc import Iterable

import numpy as np

from sslrun.data.sources.base import Source
from sslrun.data.sources.subset import Subset

logger = logging.getLogger("sslrun")

_SHOWN = 3  # names in a message


class Matched(Subset, listed=False):
    """The images of a source whose class another source has too, with the other's class numbers.

    Args:
        source: opened, with labels.
        labels: (N,) int64 numbers of the other source; -1 for images that are left out. If all are, the source is kept
            whole, without labels.
        class_names: names of the other source.
    """

    def __init__(self, source: Source, labels: np.ndarray, class_names: list[str] | None) -> None:
        has_some = bool((labels >= 0).any())
        super().__init__(source, np.flatnonzero(labels >= 0) if has_some else np.arange(len(source)))
        self._labels, self.class_names = (labels[self.ids] if has_some else None), class_names

    @property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self._labels

    def labels_of(self, ids: np.ndarray) -> np.ndarray | None:
        return None if self._labels is None else self._labels[ids]

    def __repr__(self) -> str:
        return repr(self.source) if len(self) == len(self.source) else super().__repr__()


def matched(train: Source, test: Source, *, says: bool = True) -> Source:
    """The test images with labels that mean what the training images' labels mean.

    Classes are matched by name. If only one of the sources has names, and they are no numbers, or if none has, they are
    matched by number. Test images of a class without training images are left out: no classifier could get them right.

    Args:
        train: images that are learned from, opened.
        test: images that are measured, opened.
        says: whether to log a line about each kind of difference.

    Returns:
        `test` itself if its labels and images stay as they are, or if one of the sources has no labels.
    """
    result, remarks = _match(train, test)
    for level, text in remarks if says else []:
        logger.log(level, "%s", text)
    return result


def differences(train: Source, test: Source) -> list[str]:
    """What `matched` says of two sources."""
    return [text for _, text in _match(train, test)[1]]


def _match(train: Source, test: Source) -> tuple[Source, list[tuple[int, str]]]:
    if train.labels is None or test.labels is None:
        return test, []
    ours, theirs = np.unique(train.labels), np.unique(test.labels)
    remarks: list[tuple[int, str]] = []
    numbers = _numbers(train, test, theirs, remarks)
    is_known = np.isin(numbers, ours) & (numbers >= 0)
    labels = np.where(is_known, numbers, -1)[np.searchsorted(theirs, test.labels)]
    if not is_known.any():
        remarks.append((logging.WARNING, f"{test!r} and {train!r} have no class in common: labels are not used"))
    elif not is_known.all():
        remarks.append(
            (
                logging.WARNING,
                f"{test!r}: {np.count_nonzero(labels < 0):,} of {len(labels):,} images are left out, since {train!r} "
                f"has no images of their classes: {_some(name_of(test, label) for label in theirs[~is_known])}",
            )
        )
    if is_known.any() and len(lacking := np.setdiff1d(ours[ours >= 0], numbers)):
        some = _some(name_of(train, label) for label in lacking)
        remarks.append(
            (
                logging.INFO,
                f"{test!r} has no images of {len(lacking):,} of the {len(ours):,} classes of {train!r}: {some}",
            )
        )
    if np.array_equal(labels, test.labels) and (train.class_names == test.class_names or train.class_names is None):
        return test, remarks
    return Matched(test, labels, train.class_names), remarks


def num_left_out(test: Source) -> int:
    """How many images of a source `matched` has left out."""
    return len(test.source) - len(test) if isinstance(test, Matched) else 0


def name_of(source: Source, label: int) -> str:
    """Name of a class, its number if it has none."""
    names = source.class_names or ()
    return names[label] if 0 <= label < len(names) else str(label)


def _numbers(train: Source, test: Source, theirs: np.ndarray, remarks: list[tuple[int, str]]) -> np.ndarray:
    """The training images' number of each of the test images' classes `theirs`; -1 for one they do not have."""
    if train.class_names == test.class_names or not (train.class_names or test.class_names):
        return theirs
    if train.class_names and test.class_names:
        known = {name: number for number, name in reversed(list(enumerate(train.class_names)))}
        return np.array([known.get(name_of(test, label), -1) for label in theirs], dtype=np.int64)
    named = train if train.class_names else test
    names = named.class_names or []
    if all(name.isdecimal() and len(name) < 19 for name in names):  # folders that are called 0, 1, 10, 2, ...
        if named is test:
            return np.array([int(name_of(test, label)) for label in theirs], dtype=np.int64)
        known = {name: number for number, name in reversed(list(enumerate(map(str, map(int, names)))))}
        return np.array([known.get(str(label), -1) for label in theirs], dtype=np.int64)
    unnamed = test if named is train else train
    text = f"classes are matched by number, since {unnamed!r} has no names for them: 0 is {names[0]}"
    remarks.append((logging.INFO, text))
    return theirs


def _some(names: Iterable[str]) -> str:
    """The first of some names."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else "")
