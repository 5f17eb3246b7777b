"""Numbers that change over a run: their courses, and where a recipe may have them."""

import math

import pytest

import small_run
from sslrun.cli import main
from sslrun.config import load
from sslrun.contract import Progress
from sslrun.errors import UsageError
from sslrun.nn.momentum import rising
from sslrun.optim import learning_rates, weight_decays
from sslrun.optim.groups import ParamRule
from sslrun.optim.optimizers import LARS, SGD, AdamW
from sslrun.optim.policies import CosineAnnealing
from sslrun.scheduled import Scheduled, at, product
from sslrun.session import build
from toy import ToyMethod


def place(step: int) -> Progress:
    """A run of 10 epochs of 10 steps."""
    return Progress(step, total_steps=100, steps_per_epoch=10, seed=0)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.5, {0: 0.5, 99: 0.5}),
        (Scheduled(schedule="constant", start=2.0, end=5.0), {0: 2.0, 99: 2.0}),
        (Scheduled(schedule="linear", start=1.0, end=3.0), {0: 1.0, 25: 1.5, 50: 2.0, 100: 3.0}),
        (Scheduled(schedule="cosine", start=1.0, end=0.0), {0: 1.0, 25: 0.5 + 0.5 * math.cos(math.pi / 4), 50: 0.5}),
        (Scheduled(schedule="linear", start=1.0, end=3.0, epochs=2), {0: 1.0, 10: 2.0, 20: 3.0, 80: 3.0}),
        (Scheduled(schedule="linear", start=1.0, end=3.0, iters=4, by="iter"), {1: 1.5, 4: 3.0}),
        (Scheduled(schedule="linear", start=0.0, end=10.0, by="epoch"), {9: 0.0, 10: 1.0, 19: 1.0, 95: 9.0}),
        (Scheduled(schedule="step", start=0.0, end=1.0, epochs=3), {29: 0.0, 30: 1.0, 99: 1.0}),
        (Scheduled(schedule="cosine", start=1.0, end=0.0, warmup_epochs=2), {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5}),
        (
            Scheduled(schedule="linear", start=1.0, end=0.0, warmup_iters=4, warmup_start=0.6, iters=10),
            {0: 0.6, 2: 0.8, 4: 1.0, 9: 0.5, 14: 0.0, 20: 0.0},
        ),
    ],
)
def test_courses(number, expected):
    assert {step: at(number, place(step)) for step in expected} == pytest.approx(expected)


def test_the_momentum_of_the_papers_is_the_same_course():
    for step in (0, 33, 100):
        wanted = 1 - (1 - 0.97) * (math.cos(math.pi * step / 100) + 1) / 2
        assert at(rising(0.97), place(step)) == pytest.approx(wanted, abs=1e-15)
    own = Scheduled(schedule="constant", start=0.9)
    assert rising(own) is own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cosine"}, 'schedule = "cosine" needs end'),
        ({"schedule": "step", "end": 1.0}, 'schedule = "step" needs epochs or iters'),
        ({"schedule": "linear", "end": 1.0, "epochs": 1, "iters": 5}, "in epochs or in iters, not in both"),
        ({"schedule": "linear", "end": 1.0, "warmup_iters": -1}, "cannot be negative"),
    ],
)
def test_what_makes_no_schedule_is_said(arguments, message):
    with pytest.raises(UsageError, match=message):
        Scheduled(**{"start": 0.0, **arguments})


def test_a_factor_and_a_number_with_a_schedule_each():
    rise = Scheduled(schedule="linear", start=1.0, end=3.0)
    assert product(2.0, rise) == product(rise, 2.0) == Scheduled(schedule="linear", start=2.0, end=6.0)
    with pytest.raises(UsageError, match="a factor that has a schedule"):
        product(rise, rise)


DECAY = Scheduled(schedule="cosine", start=0.04, end=0.4)
FACTOR = Scheduled(schedule="step", start=0.0, end=1.0, epochs=1)
RULES = [
    ParamRule(kind=["norm", "bias"], weight_decay=0.0),
    ParamRule(match=r"^student\.6\.weight", weight_decay_mult=0.5, lr_mult=FACTOR),
]


@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_weight_decay_and_the_rate_of_a_group(kind):
    optimizer = kind(lr=2.0, weight_decay=DECAY, paramwise=RULES).create(ToyMethod().named_parameters())
    groups = {name: number for number, group in enumerate(optimizer.param_groups) for name in group["param_names"]}
    plain, bias, last = (groups[name] for name in ("student.0.weight", "student.0.bias", "student.6.weight"))
    assert next(group["weight_decay"] for group in optimizer.param_groups if group["weight_decay"]) == 0.04
    for step in (0, 5, 50, 100):
        decays, wanted = weight_decays(optimizer.param_groups, place(step)), at(DECAY, place(step))
        assert (decays[plain], decays[bias], decays[last]) == pytest.approx((wanted, 0.0, wanted / 2))
        rates = learning_rates(optimizer.param_groups, CosineAnnealing(by="iter"), place(step))
        assert rates[last] == pytest.approx(0.0 if step < 10 else rates[plain])


def test_a_schedule_below_zero_is_refused():
    with pytest.raises(UsageError, match="weight_decay cannot be -1"):
        AdamW(lr=1.0, weight_decay=Scheduled(schedule="linear", start=0.1, end=-1.0))
    with pytest.raises(UsageError, match="lr_mult cannot be"):
        ParamRule(match="x", lr_mult=Scheduled(schedule="linear", start=-1.0, end=1.0))


QUICKSTART = str(small_run.ROOT / "configs/quickstart.toml")


def test_a_recipe_may_have_a_table_in_place_of_a_number(capsys):
    decay = 'optimizer.weight_decay={schedule="linear",start=0,end=1}'
    recipe = build(load(QUICKSTART, ['model.momentum={schedule="cosine",start=0.9,end=1}', decay]))
    teachers = [recipe.model.teachers(place(step)) for step in (0, 50, 100)]
    assert [moves[0][2] for moves in teachers] == pytest.approx([0.9, 0.95, 1.0])
    assert recipe.optimizer.weight_decay == Scheduled(schedule="linear", start=0.0, end=1.0)
    again = load(QUICKSTART, [decay, "optimizer.weight_decay=0.1"])
    assert again.values["optimizer"]["weight_decay"] == 0.1, "and a number in place of the table"
    assert main(["config", "print", QUICKSTART, "--set", 'model.momentum={schedule="cosine",star=0.9}']) == 2
    assert "star: unknown key of Scheduled; did you mean start?" in capsys.readouterr().err
    assert main([QUICKSTART, "--dry-run", "--set", 'model.momentum={schedule="linear",start=0.9,end=1.5}']) == 2
    assert "momentum is 1.5, expected 0 to 1" in capsys.readouterr().err


def test_the_weight_decay_of_a_step_is_that_of_its_place(tmp_path, images):
    """Two runs of two steps: with a schedule whose second number is another, and with the first one throughout."""
    small = [
        "max_iters=2", '_delete_=["epochs"]', "global_batch=8", "data.samples_per_gpu=4", "engine.device=cpu",
        "engine.threads=1", "checkpoint.interval=1", "checkpoint.by=iter", "monitor={_delete_=true}",
        f'data.source={{_delete_=true,type="ImageFolder",data_prefix="{images}"}}', 'data={_delete_=["holdout"]}',
        "model.queue_len=16", 'lr={_delete_=true,policy="Constant"}',
    ]  # fmt: skip
    for name, decay in [("changed", '{schedule="step",start=0.1,end=0.9,iters=1}'), ("same", "0.1")]:
        words = [*small, f"optimizer.weight_decay={decay}"]
        assert main([QUICKSTART, "--work-dir", str(tmp_path / name), *(f"--set={word}" for word in words)]) == 0
    for step, is_equal in [(1, True), (2, False)]:
        ends = [small_run.saved(tmp_path / name / "quickstart", step) for name in ("changed", "same")]
        assert (small_run.differences(*ends) == []) == is_equal
