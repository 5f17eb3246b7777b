"""The bar of a run fits every terminal, follows its size, and is left once."""

import io
import re
import sys
from collections.abc import Iterator

import pytest

import small_run
from sslrun.runtime.bar import LEAST, NEED, PLACES, WholeLine, line
from terminal import Terminal

PARTS = {
    "epoch": "epoch   3/200",
    "step": "step 12345/1000800",
    "loss": "loss 6.931",
    "rate": "lr 0.03",
    "speed": "812.3 images/s",
    "wait": "wait 3.1 %",
    "memory": "12.34 GiB",
    "ETA": "ETA 1 day, 2:03:04",
}


def test_the_least_needed_part_is_dropped_first():
    dropped: list[str] = []
    for columns in range(150, 0, -1):
        text = line(PARTS, columns, lambda width: "#" * width)
        assert len(text) <= columns
        here = [name for name in NEED if name != "bar" and PARTS[name] not in text and name != "step"]
        assert here == sorted(here, key=NEED.index) and set(dropped) <= {*here, "bar"}
        dropped = here
        if columns >= len(PARTS["step"]):
            assert PARTS["step"] in text
    assert set(NEED) == set(PLACES)
    usual = PARTS | {"epoch": "epoch 3/12", "step": "step 234/936", "ETA": "ETA 0:01:05"}
    at_80 = line(usual, 79, lambda width: "#" * width)
    assert re.fullmatch(r"epoch 3/12  \|#{5,}\|  step 234/936  loss 6\.931  812\.3 images/s  ETA 0:01:05", at_80)
    assert line(usual, 19, lambda width: "#" * width) == "step 234/936"
    assert len(line(usual, 200, lambda width: "#" * width)) == 200, "the bar takes what is left"
    assert LEAST >= 1


RUN = """
import logging, sys, time
from pathlib import Path
from sslrun.runtime.log import RunLog, shown, start_logging
folder = Path(sys.argv[1])
start_logging(0, folder / "log.txt")
log = RunLog(folder, name="run", values={}, first_step=0, total_steps=100, steps_per_epoch=50)
metrics = {"train/loss": 6.5, "train/lr": 0.03, "speed/images_per_s": 812.3, "data/wait_pct": 3.1, "mem/peak_gib": 1.5}
try:
    for step in range(1, 101):
        log.tick(step)
        time.sleep(0.02)
        if step % 10 == 0:
            log.write(step, metrics)
        if step == 50:
            logging.getLogger("sslrun").warning("a bad image")
        if step == 60 and sys.argv[2] == "stays":
            measured = shown(range(1000), 1000, "images")  # kept, as by the frames of an exception
            for _ in measured:
                time.sleep(0.02)
except KeyboardInterrupt:
    logging.getLogger("sslrun").info("saving")
finally:
    log.close()
print("the end", flush=True)
"""


@pytest.fixture
def start(tmp_path) -> Iterator:
    terminals = []

    def begin(columns: int, word: str = "goes on") -> Terminal:
        environment = {**small_run.environment(), "PYTHONPATH": str(small_run.ROOT / "engine")}
        command = [sys.executable, "-c", RUN, str(tmp_path), word]
        terminals.append(Terminal(command, columns, environment))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("columns", [20, 80, 1])
def test_every_line_fits(start, columns):
    terminal = start(columns)
    terminal.read()
    bars = [text for text in re.split(r"[\r\n]", terminal.text.replace("\x1b[K", "")) if "/100" in text or "█" in text]
    assert max(map(len, bars), default=0) < max(2, columns)
    if columns > 1:
        (left,) = [text for text in terminal.lines if "step 100/100" in text]
        place = terminal.lines.index(left)
        assert terminal.lines[-2:] == ["the end", ""] and place == len(terminal.lines) - 3
    if columns == 80:
        assert re.fullmatch(r"epoch 2/2  \|█+\|  step 100/100  loss 6\.5  812\.3 images/s  ETA 0:00:00", left.rstrip())


def test_a_terminal_that_becomes_narrower(start):
    terminal = start(100)
    terminal.read(lambda: "step 30/100" in terminal.text)
    terminal.resize(40)
    terminal.read(
        lambda: "step 36/100" in terminal.text or "step 39/100" in terminal.text or "step 50/" in terminal.text
    )
    place = len(terminal.text)
    terminal.read()
    later = [text for text in re.split(r"[\r\n]", terminal.text[place:].replace("\x1b[K", "")) if "/100" in text]
    assert later and max(map(len, later)) < 40


class Writes(io.StringIO):
    """A terminal that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def write(self, text: str) -> int:
        self.kept.append(text)
        return len(text)


def test_a_bar_below_another_is_drawn_and_erased_in_one_write():
    """Whatever interrupts between two writes then finds the cursor on the first bar's line."""
    terminal = Writes()
    first = WholeLine(total=10, file=terminal, leave=True)
    second = WholeLine(total=10, file=terminal, leave=False)
    for act in (second.refresh, second.clear, second.refresh, second.close):
        terminal.kept.clear()
        act()
        (text,) = filter(None, terminal.kept)
        assert text.startswith("\n\r") and text.endswith("\x1b[A")
    first.close()


def test_ctrl_c_leaves_one_bar(start):
    """Also while a second bar is below it, which shows how far a measurement is."""
    terminal = start(80, "stays")
    terminal.read(lambda: "images" in terminal.text and "/1000" in terminal.text)
    terminal.press("\x03")
    terminal.read()
    shown = [text.replace("^C", "").rstrip() for text in terminal.lines if text.strip()]
    assert sum("/100 " in text for text in shown) == 1, shown
    assert not any("/1000" in text for text in shown), shown
    assert shown[-1] == "the end" and "saving" in shown
