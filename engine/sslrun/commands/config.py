"""Verbs about recipes: `list` and `config ...`. None of them imports torch."""

import argparse
import os
import sys
from typing import Any

from sslrun.commands.arguments import DIFFERENT, DONE, FINDINGS, USAGE, add_config, add_overrides, fail, width
from sslrun.errors import UsageError


def add(verbs: Any) -> None:
    """Their parsers."""
    listing = verbs.add_parser(
        "list",
        help="what a config can name",
        description="The methods, backbones, necks, heads, transforms, sources, optimizers, schedules and norms that a "
        "config can name, and what each of them takes.",
    )
    listing.add_argument("kind", metavar="KIND", nargs="?", help="methods, backbones, ...; without it, all names")
    listing.add_argument("name", metavar="NAME", nargs="?", help="one of them, with its keys")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(call=_list)

    config = verbs.add_parser("config", help="look at a config without running it")
    config_verbs = config.add_subparsers(required=True, metavar="VERB")
    show = config_verbs.add_parser("print", help="the resolved config as TOML")
    add_config(show)
    show.set_defaults(call=_config_print)
    explain = config_verbs.add_parser("explain", help="values, what they mean, and the files and lines that set them")
    add_config(explain)
    explain.add_argument(
        "key", metavar="KEY", nargs="?", default="", help="such as data.views.0.num_views; without it, everything"
    )
    explain.add_argument("--all", action="store_true", help="every key below KEY, those that nothing sets too")
    explain.set_defaults(call=_config_explain)
    importing = config_verbs.add_parser(
        "import",
        help="a recipe from a config of MMSelfSup, 0.x or 1.x",
        description="Convert a Python config of MMSelfSup, with its bases, without executing it. What the recipe does "
        "not have as it was is listed, as FILE:LINE: KEY: MESSAGE, and stands at the head of the recipe too.",
    )
    importing.add_argument("old", metavar="OLD.py", help="a config of MMSelfSup")
    importing.add_argument("-o", dest="new", metavar="NEW.toml", required=True, help="the recipe to write")
    importing.add_argument("--force", action="store_true", help="replace NEW.toml")
    importing.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs that the batch is for, where OLD's name (8xb32) is silent"
    )
    importing.set_defaults(call=_config_import)
    diff = config_verbs.add_parser(
        "diff",
        help="in what two configs differ",
        description="In what two resolved configs differ: what a run would do, not what the files say. Exit code 0: in "
        "nothing, 1: they differ.",
    )
    diff.add_argument("old", metavar="A", help="a TOML recipe, or the config.toml of a run")
    diff.add_argument("config", metavar="B", nargs="?", help="another; without it, A again, for what --set changes")
    add_overrides(diff, "set one value of B, as a line of TOML merged last; may be repeated")
    diff.set_defaults(call=_config_diff)
    schema = config_verbs.add_parser("schema", help="the JSON Schema of recipes")
    schema.add_argument("--editor", action="store_true", help="the one for single files, for an editor's #:schema")
    schema.set_defaults(call=_config_schema)
    lint = config_verbs.add_parser(
        "lint",
        help="whether recipes do what their names say, and inherit without surprises",
        description="One finding per line, as FILE:LINE: MESSAGE. "
        "Exit codes: 0 nothing found, 1 findings, 2 a file that cannot be read as a config.",
        epilog="`sslrun config lint convention` prints the naming convention.",
    )
    lint.add_argument("files", metavar="FILES", nargs="+", help="configs and folders of them, or: convention")
    lint.set_defaults(call=_config_lint)


def _list(args: argparse.Namespace) -> int:
    from sslrun.config import listing
    from sslrun.config.schema_reader import committed_schema

    schema = committed_schema()
    if args.json:
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
        from sslrun.config.naming import convention

        print(convention(), end="")
        return DONE
    from sslrun.config.lint import lint, toml_files

    code, files = DONE, toml_files(args.files)
    for file in files:
        try:
            findings = lint(file)
        except UsageError as error:  # the others are checked all the same
            code = fail(error, USAGE)
            continue
        code = max(code, FINDINGS if findings else DONE)
        for finding in findings:
            print(finding)
    print(f"{len(files)} file{'s' if len(files) > 1 else ''} checked", file=sys.stderr)
    return code


def _config_import(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.config.importer import import_config
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
    return DONE


def _config_diff(args: argparse.Namespace) -> int:
    from sslrun.config import load
    from sslrun.config.diff import differences, render

    new = args.config or args.old
    found = differences(load(args.old), load(new, args.overrides))
    names = args.old, " ".join([new, *(f"--set {override}" for override in args.overrides)])
    is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(render(found, names, width(), is_colored) if found else "no difference")
    return DIFFERENT if found else DONE


def _config_schema(args: argparse.Namespace) -> int:
    from sslrun.config.editor import editor_schema
    from sslrun.config.schema_reader import as_text, committed_schema

    schema = committed_schema()
    print(as_text(editor_schema(schema) if args.editor else schema), end="")
    return DONE
