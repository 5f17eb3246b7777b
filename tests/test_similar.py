"""`sslrun similar`: the nearest images, printed and drawn."""

import functools
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ranks import run_ranks
from small_run import call
from sslrun.cli import main
from sslrun.embedding.similar import LINES, SIDE, SMALL, Neighbor, Similar, draw, wrapped
from sslrun.preview import text
from sslrun.preview.text import font


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "pictures"))


def test_a_copy_is_nearest_and_the_query_is_left_out(capsys, trained, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = folder / "class_2" / "07.jpg"
    shutil.copy(query, folder / "class_0" / "copy of it.jpg")
    (folder / "class_0" / "broken.jpg").write_text("no image")
    code, out, err = call(capsys, "similar", trained, query, "pictures", "-k", 5)
    assert code == 0, err
    lines = [line.split("  ") for line in out.splitlines()]
    assert lines[0] == ["1.0000", "pictures/class_0/copy of it.jpg"] and len(lines) == 5
    cosines = [float(cosine) for cosine, _ in lines]
    assert cosines == sorted(cosines, reverse=True) and all(path != "pictures/class_2/07.jpg" for _, path in lines)
    with Image.open(tmp_path / "similar.png") as sheet:
        assert sheet.width < 1100 and sheet.height > 3 * SIDE  # the query, and two rows


def test_any_shape_and_name_can_be_drawn(capsys, trained, tmp_path):
    long = "long" * 50
    for name, size in (("wide", (3000, 2)), ("tall", (1, 900)), ("dot", (1, 1)), (long, (9, 9))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    code, out, err = call(capsys, "similar", trained, tmp_path / "wide.png", tmp_path, "-o", tmp_path / "x.png")
    assert code == 0, err
    assert sorted(Path(line.split("  ")[1]).stem for line in out.splitlines()) == sorted(["tall", "dot", long])
    with Image.open(tmp_path / "x.png") as sheet:
        reds = sum(count for count, color in sheet.convert("RGB").getcolors(2**20) if color == (255, 0, 0))
    assert reds > 2 * SIDE**2  # the dot and the long name's image fill their places


def test_what_cannot_be_shown_has_a_place():
    neighbor = Neighbor("a/b.tif", 0.5, None)
    sheet = draw(Similar("q.jpg", None, [neighbor] * 5, "about"))
    assert sheet.height > 3 * SIDE


def test_long_names_are_wrapped_and_keep_both_ends():
    short = wrapped("pictures/a.jpg", SIDE)
    assert short == ["pictures/a.jpg"]
    name = "folder_" * 8 + "/image.jpg"
    assert "".join(wrapped(name, SIDE)) == name
    longest = wrapped("begin" + "x" * 400 + "end.jpg", SIDE)
    assert len(longest) == LINES and longest[0].startswith("begin") and "".join(longest).endswith("end.jpg")
    assert any(line.endswith("...") for line in longest)
    assert all(font(SMALL).getlength(line) <= SIDE for line in [*longest, *wrapped(name, SIDE)])


def test_a_letter_that_no_font_has_is_escaped(monkeypatch):
    truetype = text.ImageFont.truetype

    def without_dejavu(file: object, *options: object, **others: object) -> object:
        if file == "DejaVuSans.ttf":
            raise OSError("cannot open resource")
        return truetype(file, *options, **others)

    for cached in (text.font, text._is_drawn):
        monkeypatch.setattr(text, cached.__name__, functools.cache(cached.__wrapped__))
    monkeypatch.setattr(text.ImageFont, "truetype", without_dejavu)
    assert text.font(13).getname()[0] != "DejaVu Sans"  # Pillow's: ASCII only
    assert text.legible("größe a_1.jpg \n日") == r"gr\xf6\xdfe a_1.jpg \n\u65e5"


def test_letters_of_many_languages_are_drawn_where_their_font_is():
    if "DejaVu Sans" not in text.font(13).getname():
        pytest.skip("needs the font DejaVu Sans")
    assert text.legible("größe Łódź новый 日") == r"größe Łódź новый \u65e5"


@pytest.mark.parametrize(
    ("query", "words", "message"),
    [
        ("nowhere.jpg", [], "nowhere.jpg does not exist"),
        ("broken.jpg", [], "broken.jpg has no vector: "),
        ("good.png", ["-k", "0"], "-k must lie between 1 and 200, not 0"),
        ("good.png", ["-o", "x.jpg"], "-o names one that ends with .png"),
    ],
)
def test_what_cannot_be_searched_for_is_one_line(capsys, trained, tmp_path, monkeypatch, query, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_text("no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    code, out, err = call(capsys, "similar", trained, query, ".", *words)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]
    assert not list(tmp_path.glob("similar.png"))


def test_ranks_without_a_batch_have_a_part(trained, folder, tmp_path):
    words = ["similar", str(trained), str(folder / "class_1" / "00.jpg"), str(folder / "class_0"), "-k", "3", "-o"]
    assert run_ranks(main, 2, [*words, str(tmp_path / "two.png")]) == [0, 0]
    assert main([*words, str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
