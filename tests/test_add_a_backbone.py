"""docs/add-a-backbone.md, followed by a user in an empty folder, with a stand-in for timm."""

import re

import small_run
from documents import follow
from sslrun.runtime import checkpoint

DOCUMENT = small_run.ROOT / "docs" / "add-a-backbone.md"
SHORT = " --set epochs=1 --set data.source.num_images=192 --set data.holdout.num_images=64"
STAND_IN = '''
"""What the page uses of timm: create_model, num_features, forward_features."""

from torch import nn


class Network(nn.Module):
    num_features = 512

    def __init__(self, drop_path_rate):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 4, 1, bias=False), nn.BatchNorm2d(16)
        self.act1, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(drop_path_rate)
        self.conv2, self.bn2 = nn.Conv2d(16, 512, 3, 4, 1, bias=False), nn.BatchNorm2d(512)

    def forward_features(self, x):
        return self.bn2(self.conv2(self.drop(self.act1(self.bn1(self.conv1(x))))))


def create_model(name, num_classes, global_pool, drop_path_rate):
    assert (name, num_classes, global_pool) == ("resnet18", 0, "")
    return Network(drop_path_rate)
'''


def test_the_page_works_outside_the_tree(tmp_path):
    (tmp_path / "timm.py").write_text(STAND_IN)
    printed = follow(DOCUMENT, tmp_path, lambda line: line + SHORT if line.endswith("sslrun timm.toml") else line)
    assert re.search(r"^done: .*work_dirs/timm", printed, re.MULTILINE), "the run"
    newest = checkpoint.newest_good(tmp_path / "work_dirs/timm/checkpoints")
    assert newest is not None and "backbone.net.conv1.weight" in checkpoint.load(newest)[0]["model"]
    code, printed = small_run.answer(["eval", "knn", "work_dirs/timm", "--allow-imports", "timm_backbone"], tmp_path)
    assert code == 0, printed
