"""The everyday pictures: readable on a phone, told in words, in the page's colors."""

import re
from pathlib import Path

import pytest

pytest.importorskip("IPython")
pytest.importorskip("ipywidgets")

from ssdlib.companion import drawings

PICTURES = [name for name in drawings.__all__ if name != "SMALL"]
CSS = (Path(__file__).parent.parent / "book/_static/book.css").read_text()


@pytest.fixture
def drawn(monkeypatch):
    """name -> the SVG that the page gets."""
    pages = []
    monkeypatch.setattr(drawings, "display", lambda html: pages.append(html.data))

    def draw(name, *args):
        getattr(drawings, name)(*args)
        return pages.pop()

    return draw


def test_there_are_six_pictures():
    assert len(PICTURES) == 6


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_in_words_what_it_shows(drawn, name):
    (alt,) = re.findall(r'role="img" aria-label="([^"]*)"', drawn(name))
    assert len(alt.split()) >= 15 and alt.endswith(".")


@pytest.mark.parametrize("name", PICTURES)
def test_its_words_are_readable_and_inside_where_it_is_350_pixels_wide(drawn, name):
    svg = drawn(name)
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    assert width == 350 and "min-width: 0" in svg
    texts = re.findall(
        r'<text x="(\S+)" y="(\S+)" style="[^"]*font-size: (\d+)px; '
        r'text-anchor: (\w+)">([^<]*)<',
        svg,
    )
    assert len(texts) == svg.count("<text") >= 3
    for x, y, size, anchor, words in texts:
        long = 0.56 * int(size) * len(words)  # of a usual typeface
        left = float(x) - {"start": 0, "middle": long / 2, "end": long}[anchor]
        assert int(size) >= 11 and int(size) <= float(y) <= height - 2, words
        assert left >= 0 and left + long <= width, words


@pytest.mark.parametrize("name", PICTURES)
def test_its_marks_are_inside(drawn, name):
    svg = drawn(name)
    height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])
    points = [
        tuple(map(float, p.split(","))) for p in re.findall(r"[\d.]+,[\d.]+", svg)
    ]
    for rect in re.findall(
        r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', svg
    ):
        x, y, w, h = map(float, rect)
        points += [(x, y), (x + w, y + h)]
    assert "-" not in "".join(re.findall(r' d="([^"]*)"', svg))
    assert all(0 <= x <= 350 and 0 <= y <= height for x, y in points)


@pytest.mark.parametrize("name", PICTURES)
def test_it_takes_the_ink_and_the_hues_of_the_page(drawn, name):
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn(name))) - {"none"}
    assert "currentColor" in colors
    for color in colors - {"currentColor"}:
        hue = re.fullmatch(r"var\(--fig-(\w+), #[0-9a-f]{6}\)", color)
        assert hue and f"--fig-{hue[1]}:" in CSS, color


def test_a_small_picture_is_the_same_picture(drawn):
    large, small = drawn("chef"), drawn("chef", drawings.SMALL)
    assert f"min(100%, {drawings.SMALL}px)" in small
    assert large.replace("480px", "360px") == small
