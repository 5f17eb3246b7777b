"""Ranks from the environment, and each collective against the result of one process."""

import socket

import pytest
import torch

import small_run
from ranks import run_ranks
from sslrun.errors import UsageError
from sslrun.runtime import distributed

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_everything_answers_for_itself(environment: pytest.MonkeyPatch) -> None:
    distributed.init(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(distributed.all_gather_rows(x), x)
    assert distributed.share(7) == slice(0, 7) and torch.equal(distributed.all_gather_shares(x, 3), x)
    assert torch.equal(distributed.exchange_rows(x, torch.tensor([2, 0, 1])), x[[2, 0, 1]])
    assert distributed.broadcast_object("a") == "a" and distributed.gather_objects("a") == ["a"]
    assert distributed.Vote(torch.device("cpu")).cast(75) == 75 == distributed.largest(75)
    distributed.all_reduce_mean_([x])
    distributed.shutdown()
    assert torch.equal(x, torch.arange(6.0).view(3, 2))
    assert distributed.from_rank_0(lambda: "here") == "here"


def test_environment_of_deepspeed_and_torchrun(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_SIZE", "4")):
        environment.setenv(name, value)
    environment.setenv("SLURM_STEP_NUM_TASKS", "3")  # the launcher within a Slurm job is what counts
    environment.setenv("SLURM_PROCID", "2")
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (5, 1, 8)
    assert distributed.ranks_on_node() == 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE is 'two' in the environment, expected a number: start several processes"),
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE is '' in the environment"),
        ({"RANK": None}, "^WORLD_SIZE is set, but not RANK: start several"),
        ({"RANK": "2"}, "^RANK is 2, but WORLD_SIZE is 2: start several"),
        ({"MASTER_PORT": None}, "^WORLD_SIZE is set, but not MASTER_PORT"),
        ({"MASTER_PORT": "x"}, "^MASTER_PORT is 'x' in the environment"),
        ({"MASTER_ADDR": None}, "^WORLD_SIZE is set, but not MASTER_ADDR"),
        ({}, r"^port \d+ of 127.0.0.1 \(MASTER_PORT, MASTER_ADDR\) is in use by another program: "),
    ],
)
def test_an_environment_that_no_launcher_makes_is_one_line(environment, changed, words):
    with socket.socket() as other:  # uses the port
        other.bind(("127.0.0.1", 0))
        other.listen()
        own = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in (own | changed).items():
            if value is not None:
                environment.setenv(name, value)
        with pytest.raises(UsageError, match=words):
            distributed.init(torch.device("cpu"), timeout_s=5.0)


def test_alone_within_a_run_of_several(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "5")
    environment.setenv("WORLD_SIZE", "8")
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size(), distributed.group()) == (0, 1, None)
    assert (distributed.rank(), distributed.world_size()) == (5, 8)


def test_environment_of_srun(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_NTASKS", "8")
    environment.setenv("SLURM_PROCID", "0")
    assert distributed.world_size() == 1  # a batch script is one process, whatever was allocated
    values = {"STEP_NUM_TASKS": "7", "PROCID": "6", "LOCALID": "2", "NODEID": "1", "STEP_TASKS_PER_NODE": "4,3"}
    values |= {"STEP_NODELIST": "gpu[03-04]", "JOB_ID": "12", "STEP_ID": "1"}
    for name, value in values.items():
        environment.setenv(f"SLURM_{name}", value)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (6, 2, 7)
    assert distributed.ranks_on_node() == 3
    for name in LAUNCHER:
        environment.setenv(name, "")  # so that monkeypatch takes back what is exported now
        environment.delenv(name)
    distributed._export_slurm()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (6, 2, 7)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu03", "gpu03"), ("a,b", "a"), ("gpu[03-05,9],login", "gpu03"), ("n[7]", "n7"), ("r1n[2,4]-ib,x", "r1n2-ib")],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert distributed._first_host(nodes) == host


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(rank))


def each_collective() -> dict[str, object]:
    """Runs in every rank; the test compares the results with those of one process."""
    distributed.init(torch.device("cpu"))
    rank, ranks = distributed.rank(), distributed.world_size()
    x = rows_of(rank)
    permutation = torch.randperm(4 * ranks, generator=torch.Generator().manual_seed(9))
    to_one = torch.arange(4 * ranks).roll(4)  # whole blocks move: some pairs exchange nothing
    last = x.contiguous(memory_format=torch.channels_last)
    means = [torch.full((2, 2), float(rank)), torch.tensor([rank * 3.0])]
    distributed.all_reduce_mean_(means)
    leaf = x.clone().requires_grad_()
    weight = torch.arange(float(4 * ranks)).view(-1, 1, 1, 1) * (rank + 1)
    (distributed.all_gather_rows_with_gradient(leaf).square() * weight).sum().backward()
    results = {
        "gathered": distributed.all_gather_rows(x),
        "gathered_ids": distributed.all_gather_rows(torch.arange(2) + 10 * rank),
        "exchanged": distributed.exchange_rows(x, permutation),
        "rolled": distributed.exchange_rows(x, to_one),
        "exchanged_last": distributed.exchange_rows(last, permutation),
        "vectors": distributed.exchange_rows(x[:, 0, 0, 0], permutation),
        "there_and_back": distributed.exchange_rows(distributed.exchange_rows(x, permutation), permutation.argsort()),
        "kept_layout": distributed.all_gather_rows(last).is_contiguous(memory_format=torch.channels_last)
        and distributed.exchange_rows(last, permutation).is_contiguous(memory_format=torch.channels_last),
        "shares": [distributed.all_gather_shares(torch.arange(n)[distributed.share(n)], n).tolist() for n in (7, 3, 2)],
        "share": len(range(100)[distributed.share(100)]),
        "means": means,
        "gradient": leaf.grad,
        "scattered": distributed.reduce_scatter_mean(torch.arange(6.0) * (rank + 1)),
        "sum": distributed.all_reduce_sum_(torch.tensor([1.0, rank])),
        "object": distributed.broadcast_object({"from": rank}),
        "objects": distributed.gather_objects({"from": rank}),
        "votes": [distributed.Vote(torch.device("cpu")).cast(value) for value in (0, rank * 75)],
        "largest": [distributed.largest(value) for value in (0, 75 if rank == 1 else 0)],
    }
    distributed.shutdown()
    return results


def test_collectives_on_three_ranks() -> None:
    ranks = 3
    results = run_ranks(each_collective, ranks)
    whole = torch.cat([rows_of(rank) for rank in range(ranks)])
    permutation = torch.randperm(4 * ranks, generator=torch.Generator().manual_seed(9))
    leaf = whole.clone().requires_grad_()
    weight = sum(torch.arange(float(4 * ranks)).view(-1, 1, 1, 1) * (rank + 1) for rank in range(ranks))
    (leaf.square() * weight).sum().backward()
    assert leaf.grad is not None
    for rank, result in enumerate(results):
        block = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(result["gathered"], whole)
        assert result["gathered_ids"].tolist() == [0, 1, 10, 11, 20, 21]
        assert torch.equal(result["exchanged"], whole[permutation][block])
        assert torch.equal(result["rolled"], whole.roll(4, 0)[block])
        assert torch.equal(result["exchanged_last"], whole[permutation][block])
        assert torch.equal(result["vectors"], whole[permutation][block, 0, 0, 0])
        assert torch.equal(result["there_and_back"], rows_of(rank))
        assert result["kept_layout"]
        assert result["shares"] == [list(range(n)) for n in (7, 3, 2)] and result["share"] in (33, 34)
        assert torch.equal(result["means"][0], torch.ones(2, 2)) and result["means"][1].item() == 3.0
        torch.testing.assert_close(result["gradient"], leaf.grad[block])
        assert result["scattered"].tolist() == [4.0 * rank, 4.0 * rank + 2]
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["object"] == {"from": 0}
        assert result["objects"] == [{"from": 0}, {"from": 1}, {"from": 2}]
        assert result["votes"] == [0, 150]
        assert result["largest"] == [0, 75]


def fail_on_rank_one() -> None:
    if distributed.rank() == 1:
        raise RuntimeError("this is why")
    distributed.init(torch.device("cpu"))


def test_a_failing_rank_is_shown_and_the_others_are_ended() -> None:
    with pytest.raises(AssertionError, match="this is why"):
        run_ranks(fail_on_rank_one, 2)


def broadcast_every_dtype() -> dict[str, bytes]:
    distributed.init(torch.device("cpu"))
    buffers = small_run.buffers_of_every_dtype()
    if distributed.rank() > 0:
        buffers = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
    transposed = {f"{name}, transposed": buffer.clone().t() for name, buffer in buffers.items()}
    distributed.broadcast_([*buffers.values(), *transposed.values()])
    distributed.shutdown()
    return {name: small_run.bits(buffer) for name, buffer in (buffers | transposed).items()}


def test_buffers_of_every_dtype_reach_every_rank_to_the_bit():
    buffers = small_run.buffers_of_every_dtype()
    for received in run_ranks(broadcast_every_dtype, 2):
        for name, buffer in buffers.items():
            assert received[name] == small_run.bits(buffer), name
            assert received[f"{name}, transposed"] == small_run.bits(buffer.t()), name
