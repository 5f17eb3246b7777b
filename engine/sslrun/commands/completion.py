"""The verb `completion`: scripts with which bash, zsh and fish complete command lines of sslrun by TAB.

A script asks `sslrun completion --words WORD...` for the candidates of the last word, one per line (`candidates.py`).
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any

from sslrun.commands.arguments import DONE

ASK = ("completion", "--words")

# Bash splits words at = and : too, so a candidate begins after the last of them.
BASH = r"""# Completion of sslrun for bash: eval "$(sslrun completion bash)", for example in ~/.bashrc.
_sslrun() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" candidate
    COMPREPLY=()
    compopt -o nospace 2>/dev/null
    while read -r candidate; do
        case "$candidate" in */|*.|*=) ;; *) candidate+=' ' ;; esac
        COMPREPLY+=("$candidate")
    done < <("${COMP_WORDS[0]/#\~/$HOME}" completion --words --bash "$line" 2>/dev/null)
}
complete -F _sslrun sslrun
"""
ZSH = r"""#compdef sslrun
# Completion of sslrun for zsh: eval "$(sslrun completion zsh)" after compinit, for example in ~/.zshrc; or this text as
# the file _sslrun in a folder of fpath.
_sslrun() {
    local -a found going_on ended
    local candidate
    found=("${(@f)$("${(Q)words[1]/#\~/$HOME}" completion --words "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    for candidate in $found; do
        case $candidate in */|*.|*=) going_on+=("$candidate") ;; *) ended+=("$candidate") ;; esac
    done
    compadd -S '' -a going_on
    compadd -a ended
}
if [ "$funcstack[1]" = "_sslrun" ]; then _sslrun "$@"; else compdef _sslrun sslrun; fi
"""
FISH = r"""# Completion of sslrun for fish: sslrun completion fish > ~/.config/fish/completions/sslrun.fish
function __sslrun_candidates
    set -l words (commandline -opc)
    $words[1] completion --words $words[2..] (commandline -ct) 2>/dev/null
end
complete -c sslrun -f -a '(__sslrun_candidates)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add(verbs: Any) -> None:
    """Adds the verb's parser."""
    completion = verbs.add_parser(
        "completion",
        help="print a script with which the shell completes by TAB",
        description="Print a script with which a shell completes verbs, options, recipes, keys, runs and names. For "
        'bash: eval "$(sslrun completion bash)" in ~/.bashrc; the first lines of each script say where it goes.',
    )
    completion.add_argument("shell", metavar="SHELL", choices=list(SCRIPTS), help="bash, zsh or fish")
    completion.set_defaults(call=_completion)


def _completion(args: argparse.Namespace) -> int:
    print(SCRIPTS[args.shell], end="")
    return DONE


def answer(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Prints the candidates that a script asks for: of a command line's words without the program; or, after --bash, of
    the line up to the cursor, as bash takes them."""
    from sslrun.commands.candidates import candidates

    if words[:1] != ["--bash"]:
        print("\n".join(candidates(parser, words)))
        return
    begun, word, is_quoted = _split(words[1])
    cut = max(word.rfind("="), word.rfind(":")) + 1
    for candidate in candidates(parser, [*begun[1:], word]):
        print(candidate[cut:] if is_quoted else re.sub(r"([^\w@%+=:,./-])", r"\\\1", candidate[cut:]))


def _split(line: str) -> tuple[list[str], str, bool]:
    """The words before the last one; the last one, which may be begun or empty; and whether it has an open quote."""
    for end in ("", "'", '"'):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        is_new = not words or (line[-1].isspace() and not end and not line.endswith("\\ "))
        return (words, "", False) if is_new else (words[:-1], words[-1], bool(end))
    return line.split()[:-1], line.split()[-1], False
