"""What the network will get: samples through the data path of a run, as an image and as the numbers behind it."""

from sslrun.preview.description import as_text, describe
from sslrun.preview.grid import draw, write
from sslrun.preview.samples import Samples, load_samples, pil_versions

__all__ = ["Samples", "as_text", "describe", "draw", "load_samples", "pil_versions", "write"]
