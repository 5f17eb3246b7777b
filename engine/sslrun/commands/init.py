"""The verb `init`: a first recipe for a folder of images, and a batch script for Slurm."""

import argparse
import os
from pathlib import Path
from typing import Any

from sslrun.commands.arguments import DONE
from sslrun.errors import UsageError
from sslrun.started import program


def add(verbs: Any) -> None:
    """Adds the verb's parser."""
    init = verbs.add_parser(
        "init",
        help="write a first recipe for a folder of images",
        description="Look at a folder of images and at the machine, and write a recipe with the choices that follow. "
        "Image folders may hold one subfolder per class, or only images.",
    )
    init.add_argument("images", metavar="DIR", nargs="?", help="folder of images; omitted, --slurm takes the recipe")
    init.add_argument("-o", dest="recipe", metavar="RECIPE.toml", default="recipe.toml", help="file (recipe.toml)")
    init.add_argument("--slurm", action="store_true", help="also write RECIPE.sbatch, which trains the recipe by Slurm")
    init.add_argument("--force", action="store_true", help="replace files that exist")
    init.set_defaults(call=_init)


def _init(args: argparse.Namespace) -> int:
    recipe_file = Path(args.recipe)
    if recipe_file.suffix != ".toml":
        raise UsageError(f"{recipe_file}: a recipe is a TOML file; -o names one that ends with .toml")
    if args.images is None and not args.slurm:
        raise UsageError("init needs the folder of the images: init DIR")
    if args.images is None and not recipe_file.is_file():
        raise UsageError(f"{recipe_file} does not exist; init DIR --slurm writes it, and -o names another recipe")
    batch_file = recipe_file.with_suffix(".sbatch")
    files = ([recipe_file] if args.images is not None else []) + ([batch_file] if args.slurm else [])
    for file in files:
        if os.path.lexists(file) and not args.force:
            raise UsageError(f"{file} exists; --force replaces it")
    import torch

    from sslrun.first_recipe import look, recipe, slurm

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    texts = {}
    if args.images is not None:
        seen = look(Path(args.images), gpus, cores)
        texts[recipe_file] = recipe(seen, str(recipe_file))
    if args.slurm:
        texts[batch_file] = slurm(recipe_file, gpus)
    for file, text in texts.items():
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from None
        print(f"{file} is written; " + (f"submit it with: sbatch {file}" if file == batch_file else "to train:"))
        if file == recipe_file:
            print(f"  {program()} {recipe_file}")
    return DONE
