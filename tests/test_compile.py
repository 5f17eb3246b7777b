"""torch.compile of the networks: the same training, no graph made after the first step, and what a start says of it."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import small_run
from sslrun.cli import main
from sslrun.evaluation import features
from sslrun.nn.norm import set_groups
from sslrun.nn.vit import VisionTransformer
from sslrun.randomness import Phase
from sslrun.runtime import compilation
from sslrun.runtime.network_draws import begin, drawing_parts


@pytest.mark.nightly
def test_compiled_run_trains_alike_and_never_recompiles(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=6)
    rows = {}
    monitors = ["--set=monitor.loss_interval=1", "--set=monitor.by=iter"]
    for compile in ("off", "on"):
        options = ["--set", f"engine.compile={compile}", "--set", "log.interval=1", *monitors]
        process = small_run.start(small_run.command(recipe, *options, "--work-dir", str(tmp_path / compile)))
        code, output = small_run.finish(process, timeout_s=900)
        assert code == 0, output[-3000:]
        rows[compile] = small_run.metrics(tmp_path / compile / "small")
    trained = {key: [row for row in rows[key] if "train/loss" in row] for key in rows}
    graphs = [row["compile/graphs"] for row in trained["on"]]
    assert graphs[0] >= 2 and graphs == graphs[:1] * len(graphs), graphs
    assert "compile/graphs" not in trained["off"][0]
    assert trained["on"][0]["train/loss"] == pytest.approx(trained["off"][0]["train/loss"], rel=1e-4)
    assert trained["on"][0]["train/grad_norm"] == pytest.approx(trained["off"][0]["train/grad_norm"], rel=1e-3)
    knn = [[row["knn/top1_pct"] for row in rows[key] if "knn/top1_pct" in row] for key in rows]
    assert len(knn[0]) == len(knn[1]) == 7
    assert knn[1][0] == pytest.approx(knn[0][0], abs=100 / 16 + 0.1), "one of 16 images, by a tie"


@pytest.mark.nightly
def test_a_compiled_network_draws_the_same_without_another_graph():
    options = {"positions": "rotary", "rotary_rescale": 2.0, "drop_path": 0.5}
    plain = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, **options)
    compiled = copy.deepcopy(plain)
    compiled.compile(dynamic=False)
    images = [torch.randn(2 * 8, 3, 16, 16), torch.randn(4 * 8, 3, 8, 8)]
    graphs, outputs = [], []
    for step in range(3):
        for micro_batch in range(2):
            for network in (plain, compiled):
                set_groups(network, 4, 2)
                begin(drawing_parts(network), 0, step, Phase.FORWARD, micro_batch)
                outputs.append([network(each)[-1] for each in [*images, images[0]]])
            for expected, got in zip(*outputs[-2:], strict=True):
                torch.testing.assert_close(got, expected)
            assert not torch.equal(outputs[-1][0], outputs[-1][2]), "another pass"
        graphs.append(compilation.num_graphs())
    assert graphs == graphs[:1] * 3 and not torch.equal(outputs[0][0], outputs[4][0])


def compiled_run(recipe: Path, where: Path) -> list[int]:
    """Number of graphs after each step of a run with monitors, whose evaluations have 24 images in a batch. Networks
    are traced into graphs as for a compiler, which then leaves them as they are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = torch.compile
    options = ["engine.compile=on", "log.interval=1", "monitor.loss_interval=1", "monitor.by=iter"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: real(function, backend="eager", dynamic=False))
        patch.setattr(features, "BATCH", 24)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/code")
        assert main([str(recipe), "--work-dir", str(where), *(f"--set={option}" for option in options)]) == 0
    return [row["compile/graphs"] for row in small_run.metrics(where / "small") if "compile/graphs" in row]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Path, list[int]]:
    """Run folder of a compiled run, and its number of graphs after each step."""
    where = tmp_path_factory.mktemp("compiled")
    graphs = compiled_run(small_run.write_recipe(where, images, steps=3), where)
    return where / "small", graphs


@pytest.mark.nightly
def test_evaluations_add_one_graph_to_those_of_training(compiled, tmp_path, images, monkeypatch):
    """64 training images and 16 held-out ones, in batches of 24: the last of each is not full. The control leaves them
    so, and has a graph more."""
    folder, graphs = compiled
    assert graphs == graphs[:1] * 3
    monkeypatch.setattr(features, "filled", lambda batch, rows: batch)
    assert compiled_run(small_run.write_recipe(tmp_path, images, steps=3), tmp_path) == [graphs[0] + 1] * 3
    measured = [small_run.metrics(run)[0]["knn/top1_pct"] for run in (folder, tmp_path / "small")]
    assert measured[0] == pytest.approx(measured[1], abs=100 / 16 + 0.1), "one of 16 images, by a tie"


def test_a_batch_is_filled_with_its_own_images():
    batch = torch.randn(3, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    full = features.filled(batch, 8)
    assert full.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(full, batch[torch.arange(8) % 3])
    assert features.filled(full, 8) is full


@pytest.mark.nightly
def test_a_start_says_what_compiling_took_and_where_the_code_is(compiled, run):
    folder, graphs = compiled
    log = (folder / "log.txt").read_text()
    begun, done = "compiling the networks; the first start takes minutes, later ones find the code in", "compiled: "
    assert f"{begun} /somewhere/code (TORCHINDUCTOR_CACHE_DIR)\n" in log
    assert log.index(begun) < log.index("step 0/3") < log.index(done) < log.index("step 1/3") and log.count(done) == 1
    told = re.search(r"compiled: (\d+) graphs in ([\d.]+) s, 0 of them from the cache\n", log)
    assert told is not None and int(told[1]) == graphs[0] and float(told[2]) > 0
    assert (
        json.loads((folder / "env.json").read_text())["compile_cache"]["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/code"
    )

    plain = (run / "log.txt").read_text()  # one that was not compiled
    assert begun not in plain and done not in plain
    assert "compile_cache" not in json.loads((run / "env.json").read_text())
