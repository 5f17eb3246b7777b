"""docs/add-a-backbone.md, followed by a user in an empty folder."""

import re

import small_run
from documents import follow
from sslrun.runtime import checkpoint

DOCUMENT = small_run.ROOT / "docs" / "add-a-backbone.md"
SHORT = " --set epochs=1 --set data.source.num_images=192 --set data.holdout.num_images=64"


def test_the_page_works_outside_the_tree(tmp_path):
    printed = follow(DOCUMENT, tmp_path, lambda line: line + SHORT if line.endswith("sslrun conv_net.toml") else line)
    assert re.search(r"^done: .*work_dirs/conv_net", printed, re.MULTILINE), "the run"
    newest = checkpoint.newest_good(tmp_path / "work_dirs/conv_net/checkpoints")
    assert newest is not None and "backbone.net.stage0.0.weight" in checkpoint.load(newest)[0]["model"]
    code, printed = small_run.answer(["eval", "knn", "work_dirs/conv_net", "--allow-imports", "conv_net"], tmp_path)
    assert code == 0, printed
