"""What the network will see: samples through the data path of a run, as an image and as the numbers behind it."""

from sslrun.preview.draws import as_text, describe
from sslrun.preview.grid import draw, write
from sslrun.preview.look import Look, look, pil_twins_of

__all__ = ["Look", "as_text", "describe", "draw", "look", "pil_twins_of", "write"]
