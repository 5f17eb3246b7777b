"""Under ZeRO 3 each rank holds its part of a teacher, as of the student, and moves that part without the others."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from sslrun.runtime import distributed
from toy import CPU, RATES, build, micro_batches, progress_at, train

RANKS, MOMENTUM = 2, 0.999
THRESHOLDS = {"all split": 0, "some whole": 30, "all whole": 1000}  # elements up to which a parameter is whole as well
CASES = [(name, precision) for name in THRESHOLDS for precision in ("fp32", "bf16")]


class Collectives(TorchDispatchMode):
    """Records the collectives of a block of code, by whichever function they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def held(parameters: list[Any]) -> tuple[int, int]:
    """Elements on this rank: of parts, and of parameters that are there whole."""
    return sum(p.ds_tensor.numel() for p in parameters), sum(p.numel() for p in parameters)


def parts(parameters: list[Any]) -> list[Tensor]:
    """This rank's part of each parameter, without what fills it up."""
    pieces = ((p.ds_tensor, p.ds_numel - distributed.rank() * p.ds_tensor.numel()) for p in parameters)
    return [piece.view(-1)[: max(rest, 0)].clone() for piece, rest in pieces]


def moved(threshold: int, precision: str) -> dict[str, Any]:
    """What one rank holds after four steps, and before and after a move of the teacher."""
    zero_options = {"stage3_param_persistence_threshold": threshold}
    executor: Any = build("adamw", 3, zero_options=zero_options, precision=precision, accumulation=2)
    method: Any = executor.method
    train(executor, range(4), RATES["adamw"])  # DeepSpeed watches the order of modules first, and then foresees it
    teachers, students = list(method.teacher.parameters()), list(method.student.parameters())
    before = parts(teachers)
    with Collectives() as of_the_move:
        executor.update_teachers([(method.teacher, method.student, MOMENTUM)])
    results = {
        "sizes": [p.ds_numel for p in teachers],
        "held": {"teacher": held(teachers), "student": held(students)},
        "collectives": of_the_move.names,
        "before": before,
        "after": parts(teachers),
        "student": parts(students),
        "whole": [p.detach().flatten().clone() for p in teachers if p.numel()],
    }
    with Collectives() as of_a_forward:
        executor.targets(micro_batches(4, 2), progress_at(4))
    return results | {"control": of_a_forward.names, "held while training": held(teachers)}


def moves() -> list[dict[str, Any]]:
    distributed.init(CPU)
    results = [moved(THRESHOLDS[name], precision) for name, precision in CASES]
    distributed.shutdown()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(moves, RANKS)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_rank_holds_its_part_of_the_teacher(ranks: Any, case: tuple[str, str]) -> None:
    for results in (rank[CASES.index(case)] for rank in ranks):
        mine = sum(-(-size // RANKS) for size in results["sizes"])
        beside = sum(size for size in results["sizes"] if size <= THRESHOLDS[case[0]])
        assert results["held"] == {"teacher": (mine, beside), "student": (mine, beside)}
        assert results["held while training"] == (mine, 0)  # DeepSpeed lets all go after a forward pass of the toy
        assert all(part.dtype == torch.float32 for part in results["after"])


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_rank_moves_its_part_without_the_others(ranks: Any, case: tuple[str, str]) -> None:
    here = [rank[CASES.index(case)] for rank in ranks]
    for results in here:
        assert results["collectives"] == []
        assert results["control"]  # a forward pass gathers
        for before, after, student in zip(results["before"], results["after"], results["student"], strict=True):
            wanted = MOMENTUM * before.double() + (1 - MOMENTUM) * student.double()
            torch.testing.assert_close(after.double(), wanted, rtol=2e-7, atol=1e-9)  # roundings of float32
            assert not len(before) or (after - before).abs().max() > 1e-6
    joined = [torch.cat(pieces) for pieces in zip(*(results["after"] for results in here), strict=True)]
    wanted_whole = [x for x in joined if len(x) <= THRESHOLDS[case[0]]]
    for results in here:
        assert len(results["whole"]) == len(wanted_whole)
        assert all(torch.equal(x, y) for x, y in zip(results["whole"], wanted_whole, strict=True))
