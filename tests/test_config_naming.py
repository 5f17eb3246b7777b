"""The naming convention: parsing of valid names, errors of invalid ones."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.cli import main
from sslrun.config.naming import (
    BENCHMARK,
    CONVENTION_PATH,
    DATASETS,
    SCHEDULES,
    SIZES,
    USUAL_SIZE,
    Name,
    method_of,
    parse,
)
from sslrun.config.schema_reader import classes, committed_schema, kinds

METHODS = ["MoCo", "MoCoV3", "NPID", "DeepCluster", "RelativeLoc", "SimCLR", "MAE", "SimMIM", "MaskFeat"]


def test_the_tutorials_example():
    assert parse("swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96") == Name(
        algorithm="swav",
        module="resnet50",
        gpus=8,
        samples_per_gpu=32,
        accumulation=1,
        crops=(2, 6),
        is_mixed_precision=False,
        schedule="coslr",
        epochs=200,
        max_iters=None,
        dataset="in1k",
        sizes=(224, 96),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k", {"algorithm": "npid-ensure-neg", "schedule": "steplr"}),
        (
            "deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k",
            {"algorithm": "deepcluster-sobel", "samples_per_gpu": 64},
        ),
        ("relative-loc_resnet50_8xb64-steplr-70e_in1k", {"algorithm": "relative-loc", "epochs": 70}),
        ("x_resnet50-nofrz_8xb32-coslr-9e_in1k", {"module": "resnet50-nofrz"}),
        ("byol_resnet50_8xb32-accum16-coslr-200e_in1k", {"accumulation": 16, "crops": ()}),
        ("byol_resnet50_8xb256-fp16-accum2-coslr-200e_in1k", {"accumulation": 2, "is_mixed_precision": True}),
        ("mocov3_vit-small-p16_32xb128-fp16-coslr-300e_in1k-224", {"gpus": 32, "sizes": (224,)}),
        ("mae_vit-base-p16_8xb512-amp-coslr-1600e_in1k", {"is_mixed_precision": True, "epochs": 1600}),
        ("simmim_swin-base-w6_16xb128-amp-coslr-100e_in1k-192px", {"module": "swin-base-w6", "sizes": (192,)}),
        ("x_resnet50_8xb32-coslr-200e_in1k-384px", {"dataset": "in1k", "sizes": (384,)}),
        ("x_resnet50_1xb64-bf16-polylr-100k_cifar10", {"epochs": None, "max_iters": 100_000, "dataset": "cifar10"}),
        ("x_resnet50_1xb64-constlr-500iters_cats", {"max_iters": 500, "schedule": "constlr", "dataset": "cats"}),
        ("x_resnet50_4xb64-steplr-20e_in1k-10pct-160", {"dataset": "in1k", "sizes": (160,)}),
        (
            "x_resnet50_8xb32-mcrop-2-6-randaug-accum4-lars-coslr-1e_in1k",
            {"crops": (2, 6), "accumulation": 4},
        ),
        ("maskfeat_mvit-small_16xb32-amp-coslr-300e_k400", {"dataset": "k400"}),
        ("beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k", {"algorithm": "beitv2", "module": "beit-base-p16"}),
        ("x_resnet50_8xb32-coslr-200e_inat18", {"dataset": "inat18"}),
        ("x_resnet50_8xb32-coslr-200e_places205", {"dataset": "places205", "sizes": ()}),
    ],
)
def test_valid_names(name, expected):
    parsed = parse(name)
    assert {key: getattr(parsed, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mocov2", "1 part joined by '_', not the four of {algorithm}_{module}_{training}_{data}; words within"),
        ("relative_loc_resnet50_8xb64-steplr-70e_in1k", "5 parts joined"),
        ("", "1 part joined"),
        ("mocov2__8xb32-coslr-200e_in1k", "'' in the part '' is no word"),
        (
            "MoCo_resnet50_8xb32-coslr-200e_in1k",
            "'MoCo' in the part 'MoCo' is no word of lower-case letters and digits",
        ),
        ("mocov2_resnet50_8xb32--coslr-200e_in1k", "'' in the part '8xb32--coslr-200e'"),
        ("mocov2_resnet50_coslr-200e_in1k", "'coslr-200e' does not begin with GPUs x batch per GPU, such as 8xb32"),
        ("mocov2_resnet50_8x32-coslr-200e_in1k", "does not begin with GPUs x batch per GPU"),
        ("mocov2_resnet50_8xb32-coslr_in1k", "does not end with a length, such as 200e, 100k or 500iters"),
        ("mocov2_resnet50_8xb32-200e-coslr_in1k", "does not end with a length"),
        ("mocov2_resnet50_8xb32_in1k", "does not end with a length"),
        ("mocov2_resnet50_8xb32-200e_in1k", "has no schedule, such as coslr, before its length"),
        ("mocov2_resnet50_8xb32-coslr-accum2-200e_in1k", "has no schedule, such as coslr, before its length"),
        ("swav_resnet50_8xb32-mcrop-coslr-200e_in1k", "is not followed by the views of each group, as in mcrop-2-6"),
        ("byol_resnet50_8xb32-accum2-accum4-coslr-200e_in1k", "says accum more than once"),
        ("x_resnet50_8xb32-coslr-12345678901234567890e_in1k", "does not end with a length"),
    ],
)
def test_invalid_names(name, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse(name)
    assert "\n" not in str(caught.value)


def test_names_of_benchmarks():
    training_and_data = "8xb128-amp-accum2-coslr-90e_in1k-10pct-160px"
    recipe = parse(f"linear-vit_resnet50_{training_and_data}")
    assert parse(f"linear-vit_{training_and_data}", BENCHMARK) == recipe._replace(module="")
    for name, reason in (
        ("mocov2_resnet50_8xb32-coslr-200e_in1k", "4 parts joined by '_', not the three of {evaluation}_{training}"),
        ("linear_8x32-coslr-9e_in1k", "does not begin with GPUs x batch per GPU"),
        ("Linear_8xb32-coslr-9e_in1k", "no word of lower-case letters"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            parse(name, BENCHMARK)


words = st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True)
parts = st.lists(words, min_size=1, max_size=3).map("-".join)
numbers = st.integers(1, 9999)
MEANT = ("mcrop", "amp", "bf16", "fp16")


@given(
    parts,
    parts,
    numbers,
    numbers,
    st.none() | numbers,
    st.lists(numbers, max_size=3),
    st.lists(words.filter(lambda word: word not in MEANT and not word.startswith("accum")), max_size=3),
    st.sampled_from(list(SCHEDULES)),
    st.tuples(numbers, st.sampled_from(["e", "k", "iters"])),
    words,
    st.lists(st.tuples(numbers, st.sampled_from(["", "px"])), max_size=3),
)
def test_composed_names_are_parsed_back(
    algorithm, module, gpus, samples, accumulation, crops, misc, schedule, length, dataset, sizes
):
    training = [f"{gpus}xb{samples}", *misc, *([f"accum{accumulation}"] if accumulation else [])]
    training += ["mcrop", *map(str, crops)] if crops else []
    training += [schedule, f"{length[0]}{length[1]}"]
    data = [dataset, *(f"{number}{unit}" for number, unit in sizes)]
    assert parse("_".join([algorithm, module, "-".join(training), "-".join(data)])) == Name(
        algorithm=algorithm,
        module=module,
        gpus=gpus,
        samples_per_gpu=samples,
        accumulation=accumulation or 1,
        crops=tuple(crops),
        is_mixed_precision=False,
        schedule=schedule,
        epochs=length[0] if length[1] == "e" else None,
        max_iters={"e": None, "k": length[0] * 1000, "iters": length[0]}[length[1]],
        dataset=dataset,
        sizes=tuple(number for number, _ in sizes),
    )


@settings(max_examples=500)
@given(st.text(max_size=40) | st.text("_-x8bl0123456789ecorsk", max_size=40))
def test_any_text_is_a_name_or_a_value_error(text):
    try:
        parse(text)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("simclr", ("SimCLR", ())),
        ("mocov1", ("MoCo", ())),
        ("mocov2", ("MoCo", ())),
        ("mocov3", ("MoCoV3", ())),
        ("mocov2-mine", ("MoCo", ("mine",))),
        ("relative-loc", ("RelativeLoc", ())),
        ("npid-ensure-neg", ("NPID", ("ensure", "neg"))),
        ("deepcluster-sobel", ("DeepCluster", ("sobel",))),
        ("simmim", ("SimMIM", ())),
        ("maskfeat", ("MaskFeat", ())),
        ("eva-mae-style", None),
        ("moco-lib", ("MoCo", ("lib",))),
        ("mocolib", None),
    ],
)
def test_which_method_an_algorithm_names(algorithm, expected):
    assert method_of(algorithm, METHODS) == expected


def test_every_shipped_schedule_and_data_set_has_one_word():
    shipped = kinds(committed_schema())
    assert sorted(SCHEDULES.values()) == sorted(classes(shipped["schedules"]))
    sources = list(DATASETS.values())
    assert len(set(sources)) == len(sources) and set(sources) <= set(classes(shipped["sources"]))


def test_the_printed_convention_has_every_word_and_its_examples_are_names(capsys):
    assert main(["config", "lint", "convention"]) == 0
    text = capsys.readouterr().out
    assert text == CONVENTION_PATH.read_text()
    assert max(map(len, text.splitlines())) <= 120
    examples = re.findall(r"^    (\S+_\S+_\S+_\S+)$", text.partition("Examples")[2].partition("\n\n")[0], re.MULTILINE)
    assert len(examples) == 5 and all(parse(name) for name in examples)
    rows = [line.split() for line in text.splitlines() if line.startswith(" " * 8)]
    assert [row for row in rows if row[0] in SCHEDULES] == [[*pair] for pair in SCHEDULES.items()]
    sizes = [[word, source, str(SIZES.get(word, USUAL_SIZE)), "px"] for word, source in DATASETS.items()]
    assert [row for row in rows if row[0] in DATASETS and row[-1] == "px"] == sizes
