"""The verbs `list` and `config ...`. None of them imports torch."""

import argparse
import os
import sys
from typing import Any

from sslrun.commands.arguments import (
    DIFFERENT,
    DONE,
    FAILED,
    FINDINGS,
    USAGE,
    add_allow_imports,
    add_config,
    add_overrides,
    fail,
    width,
)
from sslrun.errors import UsageError


def add(verbs: Any) -> None:
    """Adds the parsers of these verbs."""
    listing = verbs.add_parser(
        "list",
        help="list the components that a config can name",
        description="List the methods, backbones, necks, heads, transforms, sources, optimizers, schedules and norms "
        "that a config can name, and their keys; or the recipes that ship.",
    )
    listing.add_argument(
        "kind",
        metavar="KIND",
        nargs="?",
        help="methods, backbones, ..., or recipes, or the NAME of a component; all kinds if omitted",
    )
    listing.add_argument("name", metavar="NAME", nargs="?", help="one component, with its keys")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(call=_list)

    config = verbs.add_parser("config", help="inspect, compare, check and convert configs")
    config_verbs = config.add_subparsers(required=True, metavar="VERB")
    show = config_verbs.add_parser("print", help="print the resolved config as TOML")
    add_config(show)
    show.set_defaults(call=_config_print)
    explain = config_verbs.add_parser("explain", help="show values, their meaning, and the lines that set them")
    add_config(explain)
    explain.add_argument(
        "key", metavar="KEY", nargs="?", default="", help="key such as data.views.0.num_views; all keys if omitted"
    )
    explain.add_argument("--all", action="store_true", help="show every key below KEY, including unset ones")
    explain.set_defaults(call=_config_explain)
    importing = config_verbs.add_parser(
        "import",
        help="convert a config of MMSelfSup, MMPretrain or OpenSelfSup",
        description="Convert a Python config of MMSelfSup (0.x, 1.x), MMPretrain or OpenSelfSup and its bases to a "
        "recipe, without executing them. Everything that the recipe does not reproduce is listed as "
        "FILE:LINE: KEY: MESSAGE, also at its head. Exit codes: 0 the recipe can be run, 1 it lacks something, such as "
        "a model whose method does not exist here, 2 OLD.py cannot be read.",
    )
    importing.add_argument("old", metavar="OLD.py", help="config of MMSelfSup, MMPretrain or OpenSelfSup")
    importing.add_argument("-o", dest="new", metavar="NEW.toml", required=True, help="recipe to write")
    importing.add_argument("--force", action="store_true", help="overwrite NEW.toml")
    importing.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="number of GPUs of the batch, unless OLD's name states it (8xb32)",
    )
    importing.set_defaults(call=_config_import)
    diff = config_verbs.add_parser(
        "diff",
        help="compare two configs",
        description="Compare two resolved configs: what runs would do, not what the files contain. The defaults of "
        "your own classes are known if --allow-imports names their modules. Exit codes: 0 no difference, 1 "
        "differences.",
    )
    diff.add_argument("old", metavar="A", help="TOML recipe, or the config.toml of a run")
    diff.add_argument("config", metavar="B", nargs="?", help="another one; if omitted, A with --set applied")
    add_overrides(diff, "set one value of B, like a line of TOML merged last; may be repeated")
    add_allow_imports(diff)
    diff.set_defaults(call=_config_diff)
    schema = config_verbs.add_parser(
        "schema",
        help="print the JSON Schema of recipes",
        description="Print the JSON Schema of whole recipes. With --editor, print the path of the schema for single "
        "files: a recipe whose first line is `#:schema PATH` is completed and checked by editors.",
    )
    schema.add_argument(
        "--editor",
        action="store_true",
        help="print the path of the schema for single files, for the #:schema line that editors read",
    )
    schema.set_defaults(call=_config_schema)
    lint = config_verbs.add_parser(
        "lint",
        help="check that configs do what their names say and inherit without surprises",
        description="Print one finding per line as FILE:LINE: MESSAGE. Exit codes: 0 no findings, 1 findings, 2 a file "
        "that is not a valid config.",
        epilog="`sslrun config lint convention` prints the naming convention.",
    )
    lint.add_argument(
        "files", metavar="FILES", nargs="+", help="configs and folders of configs, or the word: convention"
    )
    lint.set_defaults(call=_config_lint)


def _list(args: argparse.Namespace) -> int:
    from sslrun.config import listing
    from sslrun.config.schema_reader import committed_schema

    schema = committed_schema()
    if args.kind is not None and args.name is None:
        args.kind, args.name = listing.found(schema, args.kind)
    if args.kind == "recipes":
        print(listing.list_recipes(args.name, width(), args.json))
    elif args.json:
        print(listing.as_json(schema, args.kind, args.name))
    elif args.name:
        print(listing.list_component(schema, args.kind, args.name, width()))
    elif args.kind:
        print(listing.list_kind(schema, args.kind, width()))
    else:
        print(listing.list_kinds(schema, width()))
    return DONE


def _config_print(args: argparse.Namespace) -> int:
    from sslrun.config import dump, load

    config = load(args.config, args.overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    print(dump(config.values), end="")
    return DONE


def _config_explain(args: argparse.Namespace) -> int:
    from sslrun.config import load
    from sslrun.config.explain import explain, explain_all

    show = explain_all if args.all or not args.key else explain
    print(show(load(args.config, args.overrides), args.key, width=width()))
    return DONE


def _config_lint(args: argparse.Namespace) -> int:
    if args.files == ["convention"]:
        from sslrun.config.naming import CONVENTION_PATH

        print(CONVENTION_PATH.read_text(encoding="utf-8"), end="")
        return DONE
    from sslrun.config.lint import lint, toml_files

    code, files = DONE, toml_files(args.files)
    for file in files:
        try:
            findings = lint(file)
        except UsageError as error:  # the other files are still checked
            code = fail(error, USAGE)
            continue
        code = max(code, FINDINGS if findings else DONE)
        for finding in findings:
            print(finding)
    print(f"{len(files)} file{'s' if len(files) > 1 else ''} checked", file=sys.stderr)
    return code


def _config_import(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.importer import import_config
    from sslrun.runtime.durable import replace_file

    new = Path(args.new)
    if os.path.exists(new) and os.path.exists(args.old) and os.path.samefile(new, args.old):
        raise UsageError(f"{new} is what is to be imported; -o names another file")
    if os.path.lexists(new) and not args.force:
        raise UsageError(f"{new} exists; --force replaces it")
    if new.is_dir():
        raise UsageError(f"{new}: is a folder, not a file")
    imported = import_config(Path(args.old), args.gpus)
    try:
        replace_file(new, imported.text.encode())
    except OSError as error:
        raise UsageError(f"{new}: {error.strerror}") from None
    for line in imported.report.lines():
        print(line, file=sys.stderr)
    print(f"{new}: {imported.report.count()}")
    if imported.missing:
        return fail(UsageError(f"{new} cannot be run: {imported.missing}"), FAILED)
    return DONE


def _config_diff(args: argparse.Namespace) -> int:
    from sslrun.config import load
    from sslrun.config.diff import differences, render

    new = args.config or args.old
    changes = differences(load(args.old), load(new, args.overrides))
    names = args.old, " ".join([new, *(f"--set {override}" for override in args.overrides)])
    is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(render(changes, names, width(), is_colored) if changes else "no difference")
    return DIFFERENT if changes else DONE


def _config_schema(args: argparse.Namespace) -> int:
    from sslrun.config.editor import EDITOR_PATH
    from sslrun.config.schema_reader import as_text, committed_schema

    print(EDITOR_PATH if args.editor else as_text(committed_schema()).rstrip("\n"))
    return DONE
