"""Optimizers as recipes state them: parameter groups by name, torch's arithmetic, state that survives a checkpoint."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.optim import Optimizer
from sslrun.optim.groups import ParamRule
from sslrun.optim.optimizers import LARS, SGD, AdamW, GradClip
from sslrun.scheduled import Scheduled


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.predictor = nn.Linear(8, 4)
        self.teacher = nn.Linear(8, 4).requires_grad_(False)


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_without_rules_one_group_with_all_that_is_trained():
    network = Network()
    optimizer = SGD(lr=0.03, momentum=0.9, weight_decay=1e-4).create(network.named_parameters())
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in network.named_parameters() if not name.startswith("teacher")]
    assert all(p.requires_grad for p in group["params"])
    assert (group["lr"], group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.03, 0.03, 0.9, 1e-4)
    assert group["fix_lr"] is False and group["fused"] is True


def test_rules_apply_in_order_and_the_later_wins_option_by_option():
    rules = [
        ParamRule(match=r"bias$", weight_decay=0.0, lr_mult=2.0),
        ParamRule(match=r"backbone\.1\.", weight_decay=0.0, momentum_mult=0.5),
        ParamRule(match=r"^predictor", lr=0.5, fix_lr=True, weight_decay_mult=10.0),
    ]
    optimizer = SGD(lr=0.1, momentum=0.8, weight_decay=0.01, paramwise=rules).create(Network().named_parameters())
    seen = {
        name: (group["lr"], group["weight_decay"], group["momentum"], group["fix_lr"])
        for name, group in groups_of(optimizer).items()
    }
    assert seen == {
        "backbone.0.weight": (0.1, 0.01, 0.8, False),
        "backbone.0.bias": (0.2, 0.0, 0.8, False),
        "backbone.1.weight": (0.1, 0.0, 0.4, False),
        "backbone.1.bias": (0.2, 0.0, 0.4, False),
        "predictor.weight": (0.5, 0.1, 0.8, True),
        "predictor.bias": (0.5, 0.1, 0.8, True),
    }
    assert len(optimizer.param_groups) == 5
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


def test_a_mult_is_of_the_optimizers_own_value_not_of_an_earlier_rules():
    rules = [ParamRule(match="predictor", lr=7.0), ParamRule(match="predictor", lr_mult=3.0)]
    optimizer = SGD(lr=0.1, paramwise=rules).create(Network().named_parameters())
    assert groups_of(optimizer)["predictor.weight"]["lr"] == pytest.approx(0.3)


PLAIN = {
    "lr": 0.5,
    "weight_decay": 0.25,
    "momentum": 0.125,
    "nesterov": True,
    "betas": (0.5, 0.75),
    "eps": 0.5,
    "eta": 2.0,
}
OPTIMIZERS = [
    SGD(lr=0.1, momentum=0.8, weight_decay=0.01),
    AdamW(lr=0.1, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-6),
    LARS(lr=0.1, momentum=0.8, weight_decay=0.01, eta=0.01, eps=1e-6),
]


@pytest.mark.parametrize("recipe", OPTIMIZERS, ids=lambda recipe: type(recipe).__name__)
def test_every_option_of_every_optimizer_has_its_forms(recipe):
    """For each option: as written, multiplied, and both after one another; refused where the optimizer has no such."""
    own = recipe.options()
    numbers = [name for name, value in own.items() if type(value) is float]
    for name in PLAIN:
        forms = [({name: PLAIN[name]}, PLAIN[name])]
        if name in numbers:
            forms.append(({f"{name}_mult": 3.0}, 3 * own[name]))
        for options, expected in forms:
            ruled = replace(recipe, paramwise=[ParamRule(match="^predictor", **options)])
            if name not in own:
                with pytest.raises(UsageError, match=f"sets {name}.*, which {type(recipe).__name__} does not have"):
                    ruled.create(Network().named_parameters())
                continue
            groups = groups_of(ruled.create(Network().named_parameters()))
            assert groups["predictor.weight"][name] == groups["predictor.bias"][name] == pytest.approx(expected)
            assert groups["backbone.0.weight"][name] == own[name]
        if name in numbers:
            for order, expected in ((1, 3 * own[name]), (-1, PLAIN[name])):
                rules = [ParamRule(match="p", **{name: PLAIN[name]}), ParamRule(match="p", **{f"{name}_mult": 3.0})]
                groups = groups_of(replace(recipe, paramwise=rules[::order]).create(Network().named_parameters()))
                assert groups["predictor.weight"][name] == pytest.approx(expected), (name, order)


@pytest.mark.parametrize("recipe", OPTIMIZERS, ids=lambda recipe: type(recipe).__name__)
def test_a_group_moves_as_an_optimizer_with_its_options_would(recipe):
    """What a rule sets reaches the arithmetic: a parameter in a group against one alone under those options."""
    given = {name: PLAIN[name] for name in PLAIN if name in recipe.options()}
    alone = replace(recipe, **given)
    ruled = replace(recipe, paramwise=[ParamRule(match="second", **given)])
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    expected = nn.Parameter(second.detach().clone())
    pair, single = ruled.create([("first", first), ("second", second)]), alone.create([("second", expected)])
    before = second.detach().clone()
    for _ in range(3):
        gradient = torch.randn(4, 3)
        for parameter in (first, second, expected):
            parameter.grad = gradient.clone()
        pair.step()
        single.step()
    assert torch.equal(second, expected) and not torch.equal(second, before)


def test_the_tutorials_rule():
    """paramwise_options={'\\Ahead.': dict(momentum=0.)}: parameters whose name begins with "head"."""
    module = nn.ModuleDict({"head": nn.Linear(2, 2), "neck": nn.ModuleDict({"head": nn.Linear(2, 2)})})
    optimizer = SGD(lr=0.06, momentum=0.9, paramwise=[ParamRule(match=r"\Ahead.", momentum=0.0)]).create(
        module.named_parameters()
    )
    momentum = {name: group["momentum"] for name, group in groups_of(optimizer).items()}
    assert momentum == {"head.weight": 0.0, "head.bias": 0.0, "neck.head.weight": 0.9, "neck.head.bias": 0.9}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParamRule(match="(bias", lr=0.1), "is no regular expression"),
        (lambda: ParamRule(match="bias"), "sets nothing"),
        (lambda: ParamRule(match="bias", lr=0.1, lr_mult=2.0), "both lr and lr_mult"),
        (lambda: ParamRule(match="bias", lr=-0.1), "match = 'bias': lr cannot be -0.1"),
        (lambda: ParamRule(match="bias", weight_decay_mult=float("nan")), "weight_decay_mult cannot be nan"),
        (lambda: ParamRule(match="bias", momentum=-1.0), "momentum cannot be -1.0"),
        (lambda: ParamRule(match="bias", betas=(0.9, 1.0)), r"betas cannot be \(0.9, 1.0\)"),
        (lambda: ParamRule(match="bias", freeze_iters=-1), "freeze_iters cannot be -1"),
        (lambda: ParamRule(match="bias", freeze_iters=1, freeze_epochs=1.0), "both freeze_iters and freeze_epochs"),
        (lambda: ParamRule(match="bias", ramp_iters=1, ramp_epochs=1.0), "both ramp_iters and ramp_epochs"),
        (lambda: GradClip(max_norm=1.0, modules=["a"]), 'modules does nothing without scope = "module"'),
        (lambda: GradClip(max_norm=1.0, scope="module", modules=["("]), "is no regular expression"),
        (lambda: GradClip(max_norm=1.0, scope="module", modules=["a", "c"]).parts(["a", "b"]), "'c' matches the name"),
        (lambda: SGD(lr=0.1, layer_decay=0.0), "layer_decay must be above 0 and at most 1"),
        (lambda: SGD(lr=0.1, layer_decay=1.1), "layer_decay must be above 0 and at most 1"),
        (lambda: GradClip(max_norm=0.0), "max_norm must be above 0"),
        (lambda: GradClip(max_norm=float("nan")), "max_norm must be above 0"),
        (lambda: GradClip(max_norm=1.0, norm_type=0.0), "norm_type must be above 0"),
        (lambda: SGD(lr=-0.1), "^lr cannot be -0.1"),
        (lambda: SGD(lr=float("nan")), "^lr cannot be nan"),
    ],
)
def test_wrong_values_are_refused_where_they_are_written(make, words):
    with pytest.raises(UsageError, match=words):
        make()


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (SGD(lr=0.1, paramwise=[ParamRule(match="predictr", lr=0.1)]), r"no trained parameter; nearest: predictor\."),
        (SGD(lr=0.1, paramwise=[ParamRule(match=r"^teacher\.", lr=0.1)]), "no trained parameter"),
        (SGD(lr=0.1, paramwise=[ParamRule(match="bias", lars_exclude=True)]), "sets lars_exclude, which SGD does not"),
        (AdamW(lr=0.1, paramwise=[ParamRule(match="bias", momentum_mult=0.1)]), "sets momentum_mult, which AdamW"),
        (SGD(lr=0.1, nesterov=True), "Nesterov momentum requires a momentum"),
        (AdamW(lr=0.1, betas=(0.9, 1.5)), "beta"),
    ],
)
def test_rules_and_values_that_do_not_fit_are_refused_in_one_line(optimizer, words):
    with pytest.raises(UsageError, match=words) as error:
        optimizer.create(Network().named_parameters())
    assert "\n" not in str(error.value)


def test_a_later_rule_may_set_a_length_in_the_other_unit():
    rules = [ParamRule(match="predictor", freeze_iters=7, ramp_epochs=2.0), ParamRule(match="bias", freeze_epochs=0.5)]
    groups = groups_of(SGD(lr=0.1, paramwise=rules).create(Network().named_parameters()))
    keys = ("freeze_iters", "freeze_epochs", "ramp_iters", "ramp_epochs")
    assert [groups["predictor.weight"][key] for key in keys] == [7, 0, 0, 2.0]
    assert [groups["predictor.bias"][key] for key in keys] == [0, 0.5, 0, 2.0]


class Layered(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)

    def layers(self):
        return [["stem"], ["block"]]


def test_layer_decay_multiplies_what_rules_and_schedules_give():
    network = nn.Module()
    network.backbone, network.neck = Layered(), nn.Linear(2, 2)
    rise = Scheduled(schedule="linear", start=0.0, end=1.0)
    rules = [ParamRule(match=r"stem\.weight", lr_mult=0.2), ParamRule(match=r"block\.weight", lr_mult=rise)]
    recipe = SGD(lr=8.0, layer_decay=0.5, paramwise=rules)
    groups = groups_of(recipe.create(network.named_parameters(), network.backbone))
    rates = {name: groups[name]["initial_lr"] for name in groups}
    assert rates.pop("backbone.block.weight") == rise.times(4.0)
    expected = {"backbone.stem.weight": 0.4, "backbone.stem.bias": 2.0, "backbone.block.bias": 4.0}
    expected |= {"backbone.norm.weight": 8.0, "backbone.norm.bias": 8.0, "neck.weight": 8.0, "neck.bias": 8.0}
    assert rates == pytest.approx(expected)


def test_parts_of_the_gradient_that_are_clipped_together():
    names = ["backbone.a", "neck.b", "scale", "backbone.c", "head.d"]
    assert GradClip(max_norm=1.0).parts(names) == [names]
    assert GradClip(max_norm=1.0, scope="parameter").parts(names) == [[name] for name in names]
    by_module = [["backbone.a", "backbone.c"], ["neck.b"], ["scale"], ["head.d"]]
    assert GradClip(max_norm=1.0, scope="module").parts(names) == by_module
    clip = GradClip(max_norm=1.0, scope="module", modules=[r"(neck|head)\.", "back"])
    assert clip.parts(names) == [["neck.b", "head.d"], ["backbone.a", "backbone.c"], ["scale"]]


def test_nothing_to_train_is_an_error():
    with pytest.raises(UsageError, match="no parameter of the model requires a gradient"):
        SGD(lr=0.1).create(Network().requires_grad_(False).named_parameters())


def test_sgd_is_the_textbooks():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = SGD(lr=0.1, momentum=0.5, weight_decay=0.1).create([("weight", weight)])
    expected, buffer = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([0.3, 0.1], [-1.0, 0.2], [0.5, 0.5]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            buffer[i] = 0.5 * buffer[i] + g + 0.1 * expected[i]
            expected[i] -= 0.1 * buffer[i]
    assert weight.tolist() == pytest.approx(expected, rel=1e-14)


def test_adamw_is_the_papers():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW(lr=0.1, betas=(0.9, 0.99), weight_decay=0.05, eps=1e-6).create([("weight", weight)])
    w, m, v = 1.0, 0.0, 0.0
    for step, g in enumerate([0.3, -1.0, 0.5], start=1):
        weight.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.1 * 0.05 * w - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)) ** 0.5 + 1e-6)
    assert weight.item() == pytest.approx(w, rel=1e-12)


def test_lars_gets_its_options_and_exclusions():
    rules = [ParamRule(match=r"bias|backbone\.1\.", lars_exclude=True, weight_decay=0.0)]
    recipe = LARS(lr=4.8, momentum=0.9, weight_decay=1e-6, eta=0.002, paramwise=rules)
    groups = groups_of(recipe.create(Network().named_parameters()))
    assert groups["backbone.0.weight"]["lars_exclude"] is False and groups["backbone.0.weight"]["eta"] == 0.002
    assert groups["backbone.1.weight"]["lars_exclude"] is True and groups["backbone.1.weight"]["weight_decay"] == 0.0


def test_the_fused_update_of_a_channels_last_network_is_the_plain_one():
    network = Network().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    fused = SGD(lr=0.1, momentum=0.9, weight_decay=1e-2).create(network.named_parameters())
    reference = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=1e-2)
    images = torch.randn(4, 3, 9, 9)
    for _ in range(3):
        for model, optimizer in ((network, fused), (plain, reference)):
            optimizer.zero_grad()
            model.predictor(model.backbone(images).mean((2, 3))).square().sum().backward()
            optimizer.step()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_optimizers_are_found_by_name():
    assert {"SGD", "AdamW", "LARS"} <= Optimizer.registry.keys()
