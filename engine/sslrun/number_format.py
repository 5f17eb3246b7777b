"""Numbers as text for a reader: the one way to round, in the terminal and on the pages. Files have every digit."""

import math


def number(value: float) -> str:
    """Four digits, three below 1, without zeros at the end; large whole parts have thousands separators, and very small
    and very large values are in scientific notation."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        power = 0 if value == 0 else math.floor(math.log10(abs(value)))
        digits = max(0, 3 - power) if power >= 0 else 2 - power
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float) -> str:
    """With one decimal and its sign."""
    return f"{value:.1f} %"


def measured(name: str, value: float) -> str:
    """A metric by its name, without its unit: one decimal for per cent (`..._pct`), else as `number`."""
    return f"{value:.1f}" if name.endswith("_pct") else number(value)


def duration(seconds: float) -> str:
    """In the two largest units, such as "2 h 5 min"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts: list[str] = []
    for name, length in units:
        count, rest = divmod(rest, length)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def counted(count: int, name: str) -> str:
    """A count with its noun, such as "1 image" and "1,200 images"."""
    return f"{count:,} {name if count == 1 else name + 's'}"


def after(epoch: float) -> str:
    """When something was measured, by the epochs that were done: "before training", "after 1 epoch", "after 2.5
    epochs"."""
    if epoch == 0:
        return "before training"
    return f"after {number(epoch)} epoch{'s' * (epoch != 1)}"
