"""Trains several recipes one after the other in the same ranks, so that importing and meeting take their time once."""

import contextlib
import hashlib
import io

import torch

import small_run
from sslrun import cli, session, training
from sslrun.runtime import distributed


def train_all(command_lines: list[list[str]]) -> list[list[str]]:
    """Train several recipes to their ends; for `ranks.run_ranks`.

    Returns:
        Of each run, digests of the tensors that all ranks must have in common to the bit: buffers, and parameters that
        are not sharded.
    """
    distributed.init(torch.device("cpu"))
    distributed.init = distributed.leave = lambda *_: None  # one process group for all; this process ends afterwards
    digests: list[list[str]] = []
    save = training.save

    def save_at_the_end(run: session.Run) -> None:
        digests.append(in_common(run))
        save(run)

    training.save = save_at_the_end
    for words in command_lines:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(words)
        assert code == 0, err.getvalue()
    assert len(digests) == len(command_lines)
    return digests


def in_common(run: session.Run) -> list[str]:
    method = run.recipe.model
    tensors = [*method.buffers(), *(p for p in method.parameters() if not hasattr(p, "ds_tensor"))]
    return [hashlib.sha256(small_run.bits(tensor)).hexdigest() for tensor in tensors]
