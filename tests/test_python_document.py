"""docs/python.md, followed by a user in an empty folder."""

import shlex
import sys

import numpy as np
from PIL import Image

import small_run
from documents import follow


def test_the_examples_work_in_an_empty_folder(tmp_path):
    roots = ":".join(str(small_run.ROOT / root) for root in ("engine", "kernels"))

    def in_this_environment(line: str) -> str:
        if line.startswith("python "):
            return f"PYTHONPATH={roots} {shlex.quote(sys.executable)} {line.removeprefix('python ')}"
        query = next((tmp_path / "data/shapes").rglob("*.jpg"), tmp_path)
        return line.replace("data/shapes/QUERY.jpg", str(query.relative_to(tmp_path)))

    follow(small_run.ROOT / "docs" / "python.md", tmp_path, in_this_environment)
    vectors, paths = np.load(tmp_path / "shapes.npy"), (tmp_path / "shapes.paths.txt").read_text().splitlines()
    with np.load(tmp_path / "shapes.npz") as arrays:
        assert arrays["paths"].tolist() == paths
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.allclose(arrays["vectors"], unit, atol=1e-5)
    with Image.open(tmp_path / "similar.png") as sheet:
        assert sheet.size[1] > 700
