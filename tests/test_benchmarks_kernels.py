"""benchmarks/kernels.py measures every operation and refuses to time a wrong one. Times are not checked."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"
CPU = torch.device("cpu")
TINY = {
    "info_nce": {"B": 8, "D": 16, "K": 33},
    "nt_xent": {"M": 8, "D": 16},
    "batch_nce": {"B": 8, "D": 16, "K": 9},
    "bank_nce": {"B": 4, "D": 16, "K": 9, "bank": 50},
    "sinkhorn": {"B": 4, "K": 9},
    "soft_cross_entropy": {"B": 4, "K": 9},
    "prototype_cross_entropy": {"N": 6, "R": 2, "D": 8, "K": 9},
    "sinkhorn + soft_cross_entropy": {"B": 4, "K": 9},
    "ema_update_": {"of": "odd"},
    "views": {"B": 2, "side": 40},
}


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("kernels_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_operation_is_measured(script, monkeypatch):
    monkeypatch.setitem(script.ROUND_S, "cpu", 0.0)  # one call
    assert TINY.keys() == script.OPERATIONS.keys()
    measured = [script.measure(name, sizes, torch.float32, CPU, 2, False) for name, sizes in TINY.items()]
    for row in measured:
        contestants = {"kernel", "eager", *script.OPERATIONS[row["operation"]].others}
        assert row["ms"].keys() == contestants | {"ceiling"}
        assert row["over_kernel"].keys() == contestants - {"kernel"}
        assert all(ratio["min"] > 0 and ratio["count"] == 2 for ratio in row["over_kernel"].values())
    assert len(script.table(measured)) == 2 + len(measured)


@pytest.mark.parametrize("name", TINY)
def test_only_a_right_kernel_passes_the_check(script, name, monkeypatch):
    script.check(name, CPU)

    operation = script.OPERATIONS[name]

    def wrong(first, *others):
        result = operation.reference(first, *others)
        if result is None:
            return first[1].mul_(1.01)
        return 1.01 * (result[0] if isinstance(result, tuple) else result)

    monkeypatch.setitem(script.OPERATIONS, name, replace(operation, kernel=wrong))
    with pytest.raises(AssertionError, match="off by"):
        script.check(name, CPU)


def test_peak_of_a_call_is_what_it_takes(script):
    x = torch.ones(1 << 20)  # 4 MiB
    peak = script.peak_bytes(lambda: (x + 1) * 2, CPU)
    assert 7.5 < peak / 2**20 < 10, "the sum and the product"
