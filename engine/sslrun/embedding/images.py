"""The images to embed: those of a folder, of a list, or of a recipe; and the paths that stand beside their vectors."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sslrun.allowed_imports import require_allowed
from sslrun.config import load
from sslrun.config.paths import absolute, stated
from sslrun.config.recipes import located
from sslrun.data.sources import Source
from sslrun.data.sources.files import FileSource
from sslrun.data.sources.folders import EXTENSIONS, Walk
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError
from sslrun.saved import Saved


@dataclass(frozen=True)
class Images:
    """Opened images, and a path for each.

    Attributes:
        source: N images.
        paths: N paths: below a folder as the user wrote it, those of a list as they were given, those of a recipe as
            its source names them.
    """

    source: Source
    paths: Sequence[str]


Subject = str | Sequence[str] | Images


class Files(FileSource, listed=False):
    """Image files in sorted order below a folder, or in the order of a list.

    Args:
        folder: absolute path of a folder; "" for a list.
        files: absolute paths; None for all images below the folder.
        own: the encoder's own data.source, as which they are read: values beyond whole numbers from 0 to 255, channels.
    """

    def __init__(self, folder: str, files: Sequence[str] | None, own: Source | None) -> None:
        self.folder, self.files = folder, files
        self.range, self.channels = getattr(own, "range", "auto"), getattr(own, "channels", 3)

    def __repr__(self) -> str:
        return f"{len(self):,} images" if self._is_open else "images"

    def list_samples(self, key: str) -> Paths:
        if self.files is not None:
            return Paths("", self.files)
        walk = Walk(self.folder)
        paths = Paths(self.folder, sorted(walk.images()))
        if len(paths) == 0:
            others = f", only {walk.kinds}" if walk.kinds else ""
            raise UsageError(stated(self.folder, f" has no images ({', '.join(EXTENSIONS[:2])}, ...){others}"))
        self.remarks = [*walk.remarks(), *self.remarks_on_levels(paths)]
        return paths


def images_of(subject: Subject, saved: Saved) -> Images:
    """Opens the images that a user names.

    Args:
        subject: a folder, all images below which are taken in the order of their sorted paths; a recipe (a TOML file or
            a name that ships), whose data.source is taken in its own order, held-out images included; an image file; a
            list of paths, in its order; or what this function has returned.
        saved: the encoder. Files are read as those of its own data.source.

    Raises:
        UsageError: there are no images; one line.
    """
    if isinstance(subject, Images):
        return subject
    own = saved.recipe.data.source
    if isinstance(subject, str) and subject.lower().endswith(EXTENSIONS) and os.path.isfile(absolute(subject)):
        subject = [subject]
    if not isinstance(subject, str):
        if len(subject) == 0:
            raise UsageError("there are no images to embed: the list of paths is empty")
        listed = Files("", [absolute(path) for path in subject], own)
        listed.open("the list")
        return Images(listed, list(subject))
    if os.path.isdir(absolute(subject)):
        return in_folder(subject, own)
    return _of_recipe(subject)


def in_folder(folder: str, own: Source | None = None) -> Images:
    """Opens all images below a folder, in the order of their sorted paths.

    Args:
        folder: the folder.
        own: of `Files`.

    Raises:
        UsageError: there are none.
    """
    root = absolute(folder)
    if not os.path.isdir(root):
        raise UsageError(stated(folder, " is not a folder" if os.path.exists(root) else " does not exist"))
    files = Files(root, None, own)
    files.open(folder)
    return Images(files, [os.path.join(folder, name[len(root) :].lstrip(os.sep)) for name in files.names])


def _of_recipe(subject: str) -> Images:
    file = located(os.path.expanduser(subject))
    if not file.exists():
        raise UsageError(stated(subject, " does not exist: name a folder of images, or a recipe"))
    if file.suffix != ".toml":
        raise UsageError(stated(subject, " is neither a folder of images nor a recipe (.toml)"))
    config = load(file)
    require_allowed(config, is_for_training=True)
    if "source" not in config.values.get("data", {}):
        raise UsageError(f"{subject} names no images: data.source is not set")
    source: Source = config.build(Source, "data.source")
    source.open("data.source")
    return Images(source, source.names)
