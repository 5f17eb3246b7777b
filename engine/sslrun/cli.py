"""The command line: verbs to calls, errors to one line and an exit code. Help and config verbs never import torch."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import NoReturn

from sslrun.commands import config, data, evaluation, runs, weights
from sslrun.commands.arguments import DIVERGED, DONE, FAILED, INTERRUPTED, USAGE, add_config, fail
from sslrun.errors import Diverged, RunFailed, UsageError


def start() -> NoReturn:
    """`main` as a process.

    One of several ranks leaves without tearing down what C++ libraries keep in global variables: of runs on two gloo
    ranks that were done and saved, one in ten aborted there (a thread that nobody joined), which a launcher takes for a
    failure of the run.
    """
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    parser, verbs = _parser()
    words = _normalized(sys.argv[1:] if argv is None else argv, verbs)
    try:
        _check_pairs(words)
        args = parser.parse_args(words)
        args.command = shlex.join(["bin/sslrun", *(word for word in words if not word.startswith("--resume="))])
        return args.call(args)
    except UsageError as error:  # the same on every rank: one per machine says it
        return fail(error, USAGE) if os.environ.get("LOCAL_RANK", "0") == "0" else USAGE
    except RunFailed as error:
        return fail(error, FAILED)
    except Diverged as error:
        return fail(error, DIVERGED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `sslrun config print ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _normalized(argv: Sequence[str], verbs: Collection[str]) -> list[str]:
    """`sslrun CONFIG` is `sslrun train CONFIG`; launchers put --local_rank=N first; a bare --resume takes no value."""
    words = [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]
    words = ["--resume=" if word == "--resume" else word for word in words]
    if words and words[0] not in verbs and not {"-h", "--help", "--version"} & set(words[:1]):
        words.insert(0, "train")
    return words


def _check_pairs(words: Sequence[str]) -> None:
    """Refuses `--set A=1 B=2` and MMSelfSup's `--cfg-options A=1 B=2` with the form that works. Raises UsageError."""
    for place, word in enumerate(words):
        option, has_value, value = word.partition("=")
        if option not in ("--set", "--cfg-options", "--options"):
            continue
        pairs = [value] if has_value else []
        pairs += takewhile(_is_pair, words[place + 1 :])
        if option == "--set" and len(pairs) < 2:
            continue
        rule = (
            "each --set takes one KEY=VALUE" if option == "--set" else f"{option} is written --set, once for each key"
        )
        raise UsageError(f"{rule}: {' '.join(f'--set {shlex.quote(pair)}' for pair in pairs) or '--set KEY=VALUE'}")


def _is_pair(word: str) -> bool:
    return re.match(r"[\w.\"'-]+=", word) is not None and not word.startswith("-") and not os.path.exists(word)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, as all other errors are."""

    def error(self, message: str) -> NoReturn:
        self.exit(fail(f"{message}; see {self.prog} --help", USAGE))


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of the verbs."""
    parser = _Parser(
        prog="sslrun",
        description="Self-supervised pre-training of image encoders from TOML recipes.",
        epilog="`sslrun CONFIG` is short for `sslrun train CONFIG`. Many processes: `torchrun --nproc_per_node N "
        "bin/sslrun CONFIG` or `deepspeed --hostfile hosts bin/sslrun CONFIG`.",
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train an encoder", description="Train an encoder by a recipe.")
    add_config(train)
    train.add_argument("--work-dir", metavar="DIR", help="where run folders are made (the recipe's work_dir)")
    train.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="continue: from the run's own newest good checkpoint, or with --resume=CHECKPOINT from that one",
    )
    train.add_argument("--dry-run", action="store_true", help="print the plan; needs neither data nor GPU")
    train.set_defaults(call=_train)

    for room in (config, data, evaluation, runs, weights):
        room.add(verbs)
    return parser, verbs.choices


def _train(args: argparse.Namespace) -> int:
    from sslrun.config import load

    overrides = list(args.overrides)
    if args.work_dir is not None:
        overrides.append(f"work_dir={_toml_string(args.work_dir)}")
    config = load(args.config, overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    from sslrun.train import dry_run, run  # torch from here on

    if args.dry_run:
        print(dry_run(config))
        return DONE
    return run(config, args.resume, args.command)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _version() -> str:
    from sslrun import __version__

    return f"sslrun {__version__}"
