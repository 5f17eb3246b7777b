"""torch.compile of the networks: the same training, and no graph made after the first step."""

import pytest

import small_run


@pytest.mark.nightly
def test_compiled_run_trains_alike_and_never_recompiles(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=6)
    rows = {}
    for compile in ("off", "on"):
        options = ["--set", f"engine.compile={compile}", "--set", "log.interval=1", "--set", "monitor.knn_interval=0"]
        process = small_run.start(small_run.command(recipe, *options, "--work-dir", str(tmp_path / compile)))
        code, output = small_run.finish(process, timeout_s=900)
        assert code == 0, output[-3000:]
        rows[compile] = small_run.metrics(tmp_path / compile / "small")
    graphs = [row["compile/graphs"] for row in rows["on"]]
    assert graphs[0] >= 2 and graphs == graphs[:1] * len(graphs), graphs
    assert "compile/graphs" not in rows["off"][0]
    assert rows["on"][0]["train/loss"] == pytest.approx(rows["off"][0]["train/loss"], rel=1e-4)
    assert rows["on"][0]["train/grad_norm"] == pytest.approx(rows["off"][0]["train/grad_norm"], rel=1e-3)
