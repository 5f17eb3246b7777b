"""`sslrun report` in a real browser: at the widths of a phone and of a desktop, in light and in dark mode.

Screenshots are written to $SSLRUN_SCREENSHOTS, or to build/screenshots.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import browser
import small_run
from sslrun.cli import main

SCREENSHOTS = Path(os.environ.get("SSLRUN_SCREENSHOTS") or small_run.ROOT / "build" / "screenshots")
PHONE, DESKTOP = 390, 1280

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")

# Elements that extend beyond the page's right edge, except inside boxes that scroll.
OUTSIDE = """[...document.querySelectorAll("body *")]
    .filter(each => each.getBoundingClientRect().right > WIDTH + 1 && !each.closest(".scroll, nav, pre"))
    .map(each => each.outerHTML.slice(0, 100))"""

# Texts whose contrast with their background is below 4.5 (WCAG 2).
FAINT = """(() => {
    const parts = color => {
        const numbers = color.match(/[\\d.]+/g).map(Number);
        const scale = color.startsWith("color(") ? 255 : 1;
        return [...numbers.slice(0, 3).map(each => each * scale), numbers[3] ?? 1];
    };
    const over = (top, below) => below.map((each, place) => top[place] * top[3] + each * (1 - top[3]));
    const behind = element => {
        if (!element) return [255, 255, 255];
        const top = parts(getComputedStyle(element).backgroundColor);
        return top[3] === 1 ? top.slice(0, 3) : over(top, behind(element.parentElement));
    };
    const light = color => color.slice(0, 3)
        .map(each => each / 255)
        .map(each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4)
        .reduce((sum, each, place) => sum + each * [.2126, .7152, .0722][place], 0);
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
    while (texts.nextNode()) {
        const owner = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
        if (!text || text === "·" || owner.closest("style, script") || !owner.getClientRects().length) continue;
        const style = getComputedStyle(owner);
        const color = parts(owner instanceof SVGElement ? style.fill : style.color), back = behind(owner);
        const [high, low] = [light(over(color, back)), light(back)].sort((a, b) => b - a);
        const contrast = (high + .05) / (low + .05);
        if (contrast < 4.5) faint.push([text.slice(0, 40), contrast, style.color, back]);
    }
    return faint;
})()"""


@pytest.fixture(scope="module")
def pages(trained, trained_vit, tmp_path_factory) -> dict[str, Path]:
    """A page of one run, and a page of three: one has another encoder, one failed and has no weights."""
    folder = tmp_path_factory.mktemp("pages")
    originals = {"a": trained, "b": trained_vit, "c": trained}
    runs = [Path(shutil.copytree(run, folder / letter / run.name)) for letter, run in originals.items()]
    (runs[2] / "state.json").write_text('{"state": "failed", "exit_code": 1, "error": "no space left on device"}')
    shutil.rmtree(runs[2] / "checkpoints")
    (runs[0] / "eval").mkdir()
    grid = [{"k": k, "temperature": 0.07, "top1_pct": 60.0 + k, "top5_pct": 90.0} for k in (10, 20)]
    results = {"knn/top1_pct": 80.0, "grid": grid, "singular_values": [4.0, 2.0, 1.0]}
    result = {"kind": "spectrum", "command": "bin/sslrun eval " + "spectrum " * 9, "wall_s": 3.0, "results": results}
    (runs[0] / "eval/spectrum.json").write_text(json.dumps(result))
    made = {"one": folder / "one.html", "three": folder / "three.html"}
    assert main(["report", str(runs[0]), "-o", str(made["one"])]) == 0
    assert main(["report", *map(str, runs), "-o", str(made["three"])]) == 0
    return made


@pytest.fixture(scope="module")
def sorted_page(trained, tmp_path_factory) -> Path:
    """A page of four runs without images; each has two rows, one hour apart."""
    folder = tmp_path_factory.mktemp("sorted")
    for letter, knn in {"a": 20.0, "b": 3.0, "c": 100.0, "d": None}.items():
        run = Path(shutil.copytree(trained, folder / letter))
        shutil.rmtree(run / "checkpoints")
        places = [(1, 10, 3600.0, knn and knn / 2), (2, 20, 7260.0, knn)]
        rows = [{"step": s, "epoch": e, "wall_s": w, "train/loss": 1.0, "knn/top1_pct": k} for e, s, w, k in places]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output = folder / "sorted.html"
    assert main(["report", *(str(folder / each) for each in "abcd"), "-o", str(output), "--no-images"]) == 0
    return output


LONG = "a class of things with a very long name, such as those of iNaturalist: Animalia Chordata Aves"


@pytest.fixture(scope="module")
def long_names_page(trained, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    run = Path(shutil.copytree(trained, folder / "run"))
    shutil.copytree(images, folder / "images")
    (folder / "images" / "class_0").rename(folder / "images" / LONG)
    config = (run / "config.toml").read_text().replace(str(images), str(folder / "images"))
    (run / "config.toml").write_text(config)
    assert main(["report", str(run)]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_page_fits_its_window_and_is_readable(page, pages):
    for name, width, is_dark in (
        *(("one", width, is_dark) for width in (PHONE, DESKTOP) for is_dark in (False, True)),
        ("three", PHONE, True),
        ("three", DESKTOP, False),
    ):
        page.requests.clear()
        page.open(pages[name], width, is_dark)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OUTSIDE.replace("WIDTH", str(width))) == []
        assert page.evaluate(FAINT) == []
        assert page.requests == [pages[name].as_uri()], "the page requests nothing but itself"
        assert page.complaints == []
        screenshot = SCREENSHOTS / f"report-{name}-{width}-{'dark' if is_dark else 'light'}.png"
        page.screenshot(screenshot)
        with Image.open(screenshot) as image:
            assert image.width == width and image.height > 2000
            assert (image.convert("L").getpixel((2, 2)) < 128) == is_dark


def test_images_and_plots_are_drawn(page, pages):
    """Every image is decoded; every plot that is shown has a size, and lines in the colors of the style sheet."""
    page.open(pages["three"], DESKTOP, is_dark=False)
    sizes = page.evaluate("[...document.images].map(each => each.naturalWidth)")
    assert len(sizes) > 30 and min(sizes) >= 24
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map(each => each.clientWidth).filter(Boolean)"
    )
    assert len(boxes) > 10 and min(boxes) > 250
    strokes = """[...new Set([...document.querySelectorAll("svg[aria-label^=Loss] .line")]
        .map(each => getComputedStyle(each).stroke))]"""
    wanted = """["--run-0", "--run-1", "--run-2"].map(each => {
        const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = `var(${each})`;
        return getComputedStyle(probe).color;
    })"""
    assert set(page.evaluate(wanted)) == set(page.evaluate(strokes))


LETTERS = """[...document.querySelectorAll(".sortable tbody th")].map(each => each.dataset.value).join("")"""


def click(page, selector: str) -> None:
    """Click in the middle of the element that a selector finds first, as a mouse does."""
    x, y = page.evaluate(
        f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_the_results_sort_by_a_click(page, sorted_page):
    """k-NN 20 (A), 3 (B), 100 (C), none (D): numbers sort as numbers, and what is missing stays last."""
    page.open(sorted_page, DESKTOP, is_dark=False)
    assert page.evaluate(LETTERS) == "ABCD"
    knn, run = (f".sortable th:nth-child({number}) button" for number in (2, 1))
    for selector, letters in ((knn, "CABD"), (knn, "BACD"), (run, "ABCD"), (run, "DCBA")):
        click(page, selector)
        assert page.evaluate(LETTERS) == letters
    assert page.evaluate("document.querySelectorAll('.sortable [aria-sort]').length") == 1
    assert page.complaints == []


def test_a_curve_shows_its_values_under_the_pointer(page, sorted_page):
    """The values are those of metrics.jsonl; the axis of the curves is chosen by a click."""
    page.open(sorted_page, DESKTOP, is_dark=False)
    shown = """[...document.querySelectorAll("figure[data-unit] svg")]
        .filter(each => each.clientWidth).map(each => each.dataset.axis)"""
    assert set(page.evaluate(shown)) == {"epoch"}
    click(page, "figure svg[aria-label^='k-NN accuracy over epochs'] .line-0.dots circle:last-child")
    readout = "[...document.querySelectorAll('.readout:not([hidden]) p')].map(each => each.innerText)"
    assert page.evaluate(readout) == [
        "A 20 % at epoch 2 · step 20 · 2 h 1 min",
        "B 3 % at epoch 2 · step 20 · 2 h 1 min",
        "C 100 % at epoch 2 · step 20 · 2 h 1 min",
    ]
    click(page, "#axis-wall")
    assert set(page.evaluate(shown)) == {"wall"}
    click(page, "figure svg[aria-label^='k-NN accuracy over wall'] .line-2.dots circle:first-child")
    assert page.evaluate(readout)[2] == "C 50 % at epoch 1 · step 10 · 1 h"
    assert "hours" in page.evaluate("document.querySelector('svg[data-axis=wall]').textContent")
    assert page.complaints == []


def test_long_names_of_classes_are_not_clipped(page, long_names_page):
    """No text of a class's name extends beyond the box that clips it, in maps, tables and captions."""
    page.open(long_names_page, PHONE, is_dark=False)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    clipped = """[...document.querySelectorAll(".legend span, figcaption, .confusion th, .panel.map text")]
        .filter(each => each.getClientRects().length).filter(each => {
            const own = each.getBoundingClientRect();
            const frame = (each.closest(".panel") ?? document.body).getBoundingClientRect();
            return !each.closest(".scroll") && (own.left < frame.left - 1 || own.right > frame.right + 1);
        }).map(each => each.textContent)"""
    assert page.evaluate(clipped) == []
    assert LONG in page.evaluate("document.querySelector('.legend').innerText")
    heads = "[...document.querySelectorAll('.confusion thead span')].map(each => each.scrollHeight - each.clientHeight)"
    assert max(page.evaluate(heads)) <= 1


def test_the_checks_can_fail(page, tmp_path):
    """Negative control: a page that is too wide, has faint text, writes to the console, and requests a file."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><p style="color: #aaa">faint</p><div style="width: 500px">'
        'wide</div><script>console.log("hello")</script><img src="more.png">'
    )
    page.requests.clear()
    page.open(bad, PHONE, is_dark=False)
    assert page.evaluate("document.documentElement.scrollWidth") > PHONE
    assert [each[:4] for each in page.evaluate(OUTSIDE.replace("WIDTH", str(PHONE)))] == ["<div"]
    assert [text for text, *_ in page.evaluate(FAINT)] == ["faint"]
    assert len(page.requests) == 2 and page.complaints
    page.complaints.clear()
