"""Loaders that a user would pick instead, each in a process of its own with the peers' Python; see `../peer.py`.

The first line on stdin is a `job`: `side`, `paths`, `batch`, `threads`, `views` (the recipe's view groups, as in TOML)
and `lightly` (the name of lightly's transform for the recipe). Each further line, {"batches": n, "warm_up": m}, is
answered with the times of a pass over n batches.
"""

import functools
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from passes import RepeatedBatches, processor_s, timed_pass

Job = dict[str, Any]
Make = Callable[[int], Iterable[Any]]  # number of batches -> the batches


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    try:
        make = SIDES[job["side"]](job)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"ready": job["side"]}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = timed_pass(make(request["batches"]), request["warm_up"])
        wait_until_idle()
        print(json.dumps(answer), file=answers, flush=True)


def wait_until_idle() -> None:
    """Wait for workers that go on with batches nobody has asked for, so that they do not disturb who comes next."""
    before = -1.0
    while (now := processor_s() - time.process_time()) > before:
        before = now
        time.sleep(0.2)


def simplejpeg(job: Job) -> Make:
    """One thread reads and decodes the files, and does nothing else."""
    from simplejpeg import decode_jpeg

    paths = itertools.cycle(job["paths"])

    def make(batches: int) -> Iterable[Any]:
        for _ in range(batches):
            yield [decode_jpeg(Path(path).read_bytes()) for path in itertools.islice(paths, job["batch"])]

    return make


def lightly(job: Job) -> Make:
    """lightly's transform of the method and torchvision's in the workers of a DataLoader."""
    torch_without_torchvision_kernels()
    from PIL import Image

    transform = lightly_transform(job)

    class Images:
        def __getitem__(self, index: int) -> Any:
            with open(job["paths"][index], "rb") as file:
                return transform(Image.open(file).convert("RGB"))

    return data_loader(Images(), job)


def kornia(job: Job) -> Make:
    """PIL decodes and kornia augments whole batches, both in the workers of a DataLoader; all files have one size."""
    import numpy as np
    import torch
    from PIL import Image

    chains = [(group["num_views"], kornia_chain(group["transforms"])) for group in job["views"]]

    class Images:
        def __getitem__(self, index: int) -> Any:
            with open(job["paths"][index], "rb") as file:
                return torch.from_numpy(np.array(Image.open(file).convert("RGB")))

    def collate(images: list[Any]) -> list[Any]:
        pixels = torch.stack(images).permute(0, 3, 1, 2).float().div_(255)
        with torch.inference_mode():
            return [chain(pixels) for num_views, chain in chains for _ in range(num_views)]

    return data_loader(Images(), job, collate)


def litdata(job: Job) -> Make:
    """LitData's chunks of the same JPEGs, its DataLoader, and lightly's transform."""
    torch_without_torchvision_kernels()
    from litdata import StreamingDataLoader, StreamingDataset, optimize
    from PIL import Image

    transform = lightly_transform(job)
    folder = tempfile.TemporaryDirectory(prefix="litdata")
    optimize(content_of, job["paths"], output_dir=folder.name, chunk_bytes="64MB", num_workers=1)

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return transform(Image.open(io.BytesIO(super().__getitem__(index))).convert("RGB"))

    workers = {"num_workers": job["threads"], "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = StreamingDataLoader(Images(folder.name), batch_size=job["batch"], **workers)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def make(batches: int) -> Iterable[Any]:
        yield from itertools.islice(endless, batches)
        assert folder.name  # which holds the chunks as long as this function is there

    return make


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


def data_loader(images: Any, job: Job, collate: Callable[[list[Any]], Any] | None = None) -> Make:
    """Batches of a DataLoader whose workers persist between passes."""
    from torch.utils.data import DataLoader

    order = RepeatedBatches(len(job["paths"]), job["batch"])
    loader: Any = DataLoader(
        images,
        batch_sampler=order,  # type: ignore[arg-type]
        num_workers=job["threads"],
        persistent_workers=True,
        collate_fn=collate,
    )

    def make(batches: int) -> Iterable[Any]:
        order.count = batches
        return loader

    return make


def lightly_transform(job: Job) -> Any:
    """lightly's transform for the recipe, with lightly's own defaults."""
    from lightly import transforms

    return getattr(transforms, job["lightly"])()


def kornia_chain(transforms: list[dict[str, Any]], p: float = 1.0) -> Any:
    """The recipe's transforms as kornia has them."""
    import kornia.augmentation as K
    import torch

    made: list[Any] = []
    for table in transforms:
        kind, p_here = table["type"], p * table.get("p", 1.0)
        if kind == "RandomResizedCrop":
            size, scale = table["size"], tuple(table.get("scale", (0.08, 1.0)))
            crop = functools.partial(K.RandomResizedCrop, (size, size), scale=scale, cropping_mode="resample")
            made.append(crop(resample=table.get("interpolation", "bilinear")))
        elif kind == "RandomAppliedTrans":
            made.extend(kornia_chain(table["transforms"], p_here))
        elif kind == "ColorJitter":
            strengths = [table.get(name, 0.0) for name in ("brightness", "contrast", "saturation", "hue")]
            made.append(K.ColorJitter(*strengths, p=p_here))
        elif kind == "RandomGrayscale":
            made.append(K.RandomGrayscale(p=p_here))
        elif kind == "GaussianBlur":
            made.append(K.RandomGaussianBlur((23, 23), (table["sigma_min"], table["sigma_max"]), p=p_here))
        elif kind == "RandomHorizontalFlip":
            made.append(K.RandomHorizontalFlip(p=p_here))
        elif kind == "Normalize":
            made.append(K.Normalize(torch.tensor(table["mean"]), torch.tensor(table["std"])))
        else:
            raise ImportError(f"no counterpart of {kind} in kornia")
    return torch.nn.Sequential(*made)


def torch_without_torchvision_kernels() -> None:
    """Define the operators that torchvision registers fakes for: beside a torch of the CPU its own library fails."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
        library.define(name)
    torch_without_torchvision_kernels.kept = library  # type: ignore[attr-defined]


SIDES: dict[str, Callable[[Job], Make]] = {
    "simplejpeg": simplejpeg,
    "lightly": lightly,
    "kornia": kornia,
    "litdata": litdata,
}


if __name__ == "__main__":
    main()
