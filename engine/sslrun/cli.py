"""The command line: runs a verb and turns errors into one line and an exit code. Help needs no torch."""

import argparse
import errno
import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, Literal, NoReturn

from sslrun import __version__
from sslrun.commands import completion, config, data, doctor, embed, evaluation, init, plan, runs, weights
from sslrun.commands.arguments import (
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    USAGE,
    add_allow_imports,
    add_config,
    add_devices,
    fail,
    is_for_cpu,
    number_of_steps,
)
from sslrun.commands.spelling import nearest_choice, require_known_options
from sslrun.errors import Diverged, RunFailed, UsageError
from sslrun.runtime import early_signals, starter
from sslrun.runtime.launch_checks import slurm_tasks
from sslrun.started import limit_spinning, program


def start() -> NoReturn:
    """Runs `main` and ends the process.

    With several ranks, the destructors of C++ libraries are skipped: in one of ten runs on two gloo ranks they aborted
    the process (a thread that was never joined) after the run was finished and saved, and the launcher reported a
    failure.
    """
    early_signals.enter()
    limit_spinning()
    if {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        # torch reads it when it is imported. It would say in 30 lines that the store of a rank is gone.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser, verbs = _parser()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if tuple(argv[:2]) == completion.ASK:
            completion.answer(parser, argv[2:])
            return DONE
        words = _normalized(argv, verbs)
        if words[:1] not in (["train"], ["embed"]) or "--dry-run" in words:
            early_signals.leave()
        _check_pairs(words)
        require_known_options(parser, words)
        args = parser.parse_args(words)
        starts = ("--resume=", "--restart")
        args.command = f"{program()} {shlex.join(word for word in words if not word.startswith(starts))}"
        ranks = _ranks_to_start(args)
        code = _call(args) if ranks == 1 else starter.run_ranks(words, ranks, 1 if _is_plan(args) else None)
        sys.stdout.flush()  # so that a pipe that was closed is noticed here
        return code
    except UsageError as error:  # if each rank finds it by itself, one per machine prints it
        is_first = _is_first_of_all() if error.is_common else _is_first_here()
        return fail(error, USAGE) if is_first else USAGE
    except RunFailed as error:
        return FAILED if error.is_common and not _is_first_of_all() else fail(error, FAILED)
    except Diverged as error:
        return fail(error, DIVERGED)
    except KeyboardInterrupt:  # so has this one
        return fail("interrupted", INTERRUPTED) if _is_first_here() else INTERRUPTED
    except BrokenPipeError:  # `sslrun config print ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.filename is None or error.strerror is None:  # a fault of ours: show the traceback
            raise
        is_name = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        return fail(f"{error.filename}: {error.strerror}", USAGE if is_name else FAILED)


def _is_first_of_all() -> bool:
    """Whether this process is rank 0, or the only one."""
    return _number_from("RANK", "SLURM_PROCID") == "0"


def _is_first_here() -> bool:
    """Whether this process is the first rank of its machine, or the only one."""
    return _number_from("LOCAL_RANK", "SLURM_LOCALID") == "0"


def _number_from(name: str, slurm_name: str) -> str:
    is_slurm = "WORLD_SIZE" not in os.environ and slurm_tasks(os.environ) > 1
    return os.environ.get(slurm_name if is_slurm else name, "0")


def _call(args: argparse.Namespace) -> int:
    """Does the work of a verb in this process; returns the exit code."""
    if modules := getattr(args, "allow_imports", ()):
        from sslrun.allowed_imports import import_allowed

        import_allowed(modules)
    code: int = args.call(args)
    return code


def _ranks_to_start(args: argparse.Namespace) -> int:
    """The number of ranks that `--devices` asks for; 1 if this process is to do the work, alone or as a rank."""
    devices: int | Literal["auto"] | None = getattr(args, "devices", None)
    if devices is None or starter.is_rank():
        return 1
    return starter.number_of_ranks(1 if devices == "auto" and is_for_cpu(args) else devices)


def _is_plan(args: argparse.Namespace) -> bool:
    """Whether a single rank can answer for all of them."""
    return getattr(args, "dry_run", False)


def _normalized(argv: Sequence[str], verbs: Collection[str]) -> list[str]:
    """Adds the verb `train` if none is given, drops the --local_rank=N of launchers, gives a bare --resume no value.

    Raises UsageError if the first word is neither a verb nor a recipe, but almost a verb.
    """
    words = [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]
    words = ["--resume=" if word == "--resume" else word for word in words]
    if words and words[0] not in verbs and not {"-h", "--help", "--version"} & set(words[:1]):
        near = get_close_matches(words[0], verbs, 1)
        if near and not _is_recipe(words[0]):
            raise UsageError(f"there is no verb and no recipe {words[0]}: did you mean {near[0]}?")
        words.insert(0, "train")
    return words


def _is_recipe(word: str) -> bool:
    from sslrun.config.recipes import located

    return located(word).exists()


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
    """Prints an error in the command as one line, like all other errors. A part of an option's name is no option.

    An `epilog` may be a function: what it reads is read only if the help of its verb is printed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def format_help(self) -> str:
        epilog: object = self.epilog
        if callable(epilog):
            self.epilog = epilog()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(fail(nearest_choice(message) or f"{message}; see {self.prog} --help", USAGE))


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser and the names of the verbs."""
    parser = _Parser(
        prog="sslrun",
        description="Pre-train image encoders without labels, from TOML recipes.",
        epilog="`sslrun CONFIG` is short for `sslrun train CONFIG`. `--devices N` starts several processes on this "
        "machine; on several machines use `torchrun ... -m sslrun CONFIG`, `deepspeed --hostfile hosts --module sslrun "
        "CONFIG` or `srun sslrun CONFIG`.",
    )
    parser.add_argument("--version", action="version", version=f"sslrun {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train an encoder", description="Train an encoder as a recipe says.")
    add_config(train)
    add_allow_imports(train)
    add_devices(train)
    train.add_argument("--work-dir", metavar="DIR", help="folder for run folders (default: the recipe's work_dir)")
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="continue from the newest intact checkpoint of the run, or with --resume=CHECKPOINT from that one",
    )
    start.add_argument(
        "--restart", action="store_true", help="set the run folder's old run aside, and start from the beginning"
    )
    train.add_argument(
        "--profile",
        type=number_of_steps,
        default=0,
        metavar="N",
        help="tell where the time of N steps goes: a table and a trace in the run folder's profile/",
    )
    train.add_argument("--dry-run", action="store_true", help="print the plan without data or GPU")
    train.set_defaults(call=_train)

    for room in (init, plan, config, data, doctor, evaluation, embed, runs, weights, completion):
        room.add(verbs)
    return parser, verbs.choices


def _train(args: argparse.Namespace) -> int:
    from sslrun.config import load
    from sslrun.config.dump import inline

    overrides = list(args.overrides)
    if args.work_dir is not None:
        overrides.append(f"work_dir={inline(args.work_dir)}")
    config = load(args.config, overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    from sslrun.training import dry_run, run  # torch from here on

    if args.dry_run:
        print(dry_run(config))
        return DONE
    return run(config, args.resume, args.command, args.restart, args.profile)
