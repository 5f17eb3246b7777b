"""The one way to round numbers for a reader."""

import math

import pytest

from sslrun.number_format import after, duration, measured, number, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (6.93147, "6.931"),
        (6.5, "6.5"),
        (-12.345, "-12.35"),
        (0.037759, "0.0378"),
        (0.11111, "0.111"),
        (0.00123456, "0.00123"),
        (3.289e-4, "3.29e-4"),
        (123.456, "123.5"),
        (1234.56, "1,235"),
        (1234567, "1,234,567"),
        (2.5e9, "2.50e9"),
        (999.96, "1,000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_number(value, text):
    assert number(value) == text


def test_a_metric_by_its_name():
    assert measured("knn/top1_pct", 71.26) == "71.3" and measured("train/loss", 71.26) == "71.26"
    assert measured("train/loss", math.nan) == "nan" and percent(71.26) == "71.3 %"
    assert duration(7325) == "2 h 2 min"


def test_when_something_was_measured():
    assert [after(epoch) for epoch in (0, 0.25, 1, 1.0, 12)] == [
        "before training",
        "after 0.25 epochs",
        "after 1 epoch",
        "after 1 epoch",
        "after 12 epochs",
    ]
