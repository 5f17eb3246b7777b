"""The verbs `publish`, `export` and `import-weights`."""

import argparse
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_allow_imports, add_overrides


def add(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    publish = verbs.add_parser(
        "publish",
        help="write a run's weights as one file, named by recipe, date and hash",
        description="Write the model of a run's newest good checkpoint as {config_name}_{date}-{hash}.pth, verify it, "
        "and print its path. `load_from` takes it, and so does torch.load with weights_only=True.",
    )
    publish.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    publish.add_argument("-o", dest="directory", metavar="DIR", help="where the file goes (the run folder)")
    publish.set_defaults(call=_publish)

    export = verbs.add_parser(
        "export",
        help="write a run's encoder for torchvision, timm, transformers, safetensors or ONNX",
        description="Write a trained backbone as other programs load it, with the preparation of images in the "
        "metadata. Before the file gets its name it is read back: names and shapes as published, outputs equal.",
        epilog=_formats,
    )
    export.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in one, or a file of weights")
    export.add_argument("--to", metavar="FORMAT", required=True, help="what other programs read: timm, onnx, ...")
    export.add_argument(
        "-o", dest="path", metavar="PATH", required=True, help=".safetensors, .pth, .onnx; for huggingface a folder"
    )
    export.add_argument("--force", action="store_true", help="replace PATH")
    add_overrides(export, "set one value of the run's recipe, such as eval.transforms; may be repeated")
    add_allow_imports(export)
    export.add_argument("--recipe", metavar="TOML", help="the recipe that a file of weights was trained by")
    export.set_defaults(call=_export)

    importing = verbs.add_parser(
        "import-weights",
        help="turn a foreign checkpoint into weights for load_from",
        description="Find the backbone in a checkpoint of MMSelfSup, VISSL, lightly, solo-learn, torchvision, timm, "
        "transformers or the authors of MoCo, DINO, MAE and others, by the names of its tensors, and write it under "
        "ours. Nothing in the file is executed.",
    )
    importing.add_argument(
        "file", metavar="FILE", help="a checkpoint (.pth, .pt, .ckpt, .tar, .safetensors) or a Hugging Face folder"
    )
    importing.add_argument("-o", dest="new", metavar="NEW.safetensors", required=True, help="the file to write")
    importing.add_argument("--prefix", metavar="PREFIX", help="prefix of the network to import, if there are several")
    importing.add_argument(
        "--heads",
        metavar="N",
        type=int,
        help="attention heads of a transformer, where the file and its width do not tell",
    )
    importing.add_argument(
        "--img-size", metavar="N", type=int, help="interpolate a transformer's positions for images of N pixels"
    )
    importing.add_argument("--force", action="store_true", help="replace NEW.safetensors")
    importing.set_defaults(call=_import)


def _formats() -> str:
    """The end of the help of `export`: the formats that ship."""
    from sslrun.config.schema_reader import classes, committed_schema, kinds

    names = ", ".join(name.lower() for name in classes(kinds(committed_schema())["formats"]))
    return (
        f"FORMAT is {names}, or your own class in the recipe's custom_imports. docs/weights.md has the lines of "
        "code that load each of them."
    )


def _publish(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.export.publish import publish
    from sslrun.runtime.log import start_logging

    start_logging()
    print(publish(Path(args.run), Path(args.directory) if args.directory is not None else None))
    return DONE


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.export.encoder import encoder_of
    from sslrun.export.export import export
    from sslrun.runtime.log import start_logging
    from sslrun.saved import open_saved

    start_logging()
    saved = open_saved(Path(args.run), overrides=args.overrides, recipe=args.recipe and Path(args.recipe))
    note = export(encoder_of(saved), args.to, Path(args.path), args.force)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    print(args.path)
    return DONE


def _import(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.export.import_weights import import_weights, write

    imported = import_weights(Path(args.file), args.prefix, args.heads, args.img_size)
    write(imported, Path(args.new), args.force)
    for line in imported.report(args.new):
        print(line, file=sys.stderr)
    print(args.new)
    return DONE
