"""`[[optimizer.paramwise]]`: rules that select parameters by kind, beside those that select them by name."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sslrun.cli import main
from sslrun.config import load
from sslrun.errors import UsageError
from sslrun.nn.vit import VisionTransformer
from sslrun.optim.groups import ParamRule
from sslrun.optim.optimizers import SGD
from sslrun.recipe import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"
# What selected these parameters before there were kinds.
PATTERN = r"bias$|(bn\d|downsample\.1|mlp\.[147])\.weight$"
PATTERNS = {
    "barlowtwins/barlowtwins_resnet50_8xb256-coslr-300e_in1k": PATTERN,
    "byol/byol_resnet50_16xb256-coslr-200e_in1k": PATTERN,
    "simclr/simclr_resnet50_8xb32-coslr-200e_in1k": PATTERN,
    "mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k": r"(bn\d|downsample\.1|mlp\.1)\.weight$|bias$",
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm, self.fc, self.embed = nn.LayerNorm(8), nn.Linear(8, 4), nn.Embedding(4, 8)
        self.plain = nn.BatchNorm1d(8, affine=False)


def selected(**choice):
    """The names of the parameters that a rule applies to."""
    optimizer = SGD(lr=0.1, paramwise=[ParamRule(lr=7.0, **choice)]).create(Network().named_parameters())
    return {name for group in optimizer.param_groups if group["lr"] == 7.0 for name in group["param_names"]}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"kind": ["norm"]}, {"bn.weight", "bn.bias", "norm.weight", "norm.bias"}),
        ({"kind": ["bias"]}, {"conv.bias", "bn.bias", "norm.bias", "fc.bias"}),
        ({"kind": ["embedding"]}, {"cls_token", "pos_embed"}),
        ({"kind": ["norm", "bias"]}, {"bn.weight", "norm.weight", "conv.bias", "bn.bias", "norm.bias", "fc.bias"}),
        ({"kind": ["norm", "bias"], "match": "^norm"}, {"norm.weight", "norm.bias"}),
        ({"match": "^norm"}, {"norm.weight", "norm.bias"}),
    ],
)
def test_what_a_rule_selects(choice, names):
    assert selected(**choice) == names


@pytest.mark.parametrize(("recipe", "pattern"), PATTERNS.items())
def test_shipped_recipes_have_the_groups_that_patterns_gave(recipe, pattern):
    with torch.device("meta"):
        built = load(CONFIGS / f"selfsup/{recipe}.toml").build(Recipe)
    (rule,) = [rule for rule in built.optimizer.paramwise if rule.kind]
    others = [rule for rule in built.optimizer.paramwise if not rule.kind]
    by_name = replace(built.optimizer, paramwise=[replace(rule, kind=None, match=pattern), *others])
    groups = [optimizer.create(built.model.named_parameters()).param_groups for optimizer in (built.optimizer, by_name)]
    assert groups[0] == groups[1] and len(groups[0]) == 2
    fewer = replace(by_name, paramwise=[replace(rule, kind=["bias"]), *others])
    assert fewer.create(built.model.named_parameters()).param_groups != groups[0], "a kind less is another grouping"


def test_fine_tuning_of_a_vit_has_the_groups_that_a_pattern_gave():
    table = tomllib.loads((CONFIGS / "benchmarks/finetune-vit_8xb128-coslr-100e_in1k.toml").read_text())
    (rule,) = table["eval"]["finetune"]["optimizer"]["paramwise"]
    network = VisionTransformer("tiny", img_size=32).requires_grad_(True)
    groups = []
    for given in (rule, {"match": "norm|bias$|cls_token|pos_embed", "weight_decay": 0.0}):
        optimizer = SGD(lr=0.1, weight_decay=0.5, paramwise=[ParamRule(**given)])
        groups.append([group["param_names"] for group in optimizer.create(network.named_parameters()).param_groups])
    assert groups[0] == groups[1] and {"cls_token", "pos_embed", "norm.weight"} <= set(groups[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParamRule(lr=1.0), 'needs match or kind, such as kind = ["norm", "bias"]'),
        (lambda: ParamRule(kind=["norm"]), 'the rule with kind = ["norm"] sets nothing'),
        (lambda: ParamRule(kind=["norm"], match="x", lr=-1.0), """kind = ["norm"], match = 'x': lr cannot be -1.0"""),
        (lambda: selected(kind=["norm"], match="^fc"), "matches the name of no trained parameter of that kind"),
        (lambda: SGD(lr=1.0, paramwise=[ParamRule(kind=["norm"], lr=1.0)]).create(nn.Linear(2, 2).named_parameters()),
         'optimizer.paramwise: kind = ["norm"] selects no trained parameter'),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_command_line(capsys):
    recipe = str(CONFIGS / "selfsup/byol/byol_resnet50_16xb256-coslr-200e_in1k.toml")
    assert main(["config", "explain", recipe, "optimizer.paramwise.0.kind"]) == 0
    assert '"norm" for scale and shift of normalization layers' in capsys.readouterr().out.replace("\n", " ")
    assert main(["config", "print", recipe, "--set", 'optimizer.paramwise.0.kind=["norms"]']) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and 'expected "norm", "bias" or "embedding", got the string "norms"' in error
