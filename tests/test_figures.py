"""Figures of the book fit a phone as they fit a page, and no drawing repeats an id."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ssdlib.companion import figures

SCALE = re.compile(r"scale\((0\.\d+) -")  # matplotlib draws text at a hundredth


def drawings(figure, alt="two lines"):
    """The wide and the narrow <svg> of a figure."""
    page = figures.inline(figure, alt)
    wide, narrow = re.findall(r"<svg\b.*?</svg>", page, re.S)
    return wide, narrow


def size(svg):
    return [float(v) for v in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups()]


def two_panels():
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
    figure.suptitle("A title that is much too long for one line of a phone's page")
    for ax in axes:
        ax.plot([1, 2, 3], color=figures.COLOR["state"])
        ax.set_xlabel("tokens", size=6)
    axes[0].set_ylabel("ms")
    return figure


def test_panels_stand_below_each_other_on_a_phone_and_keep_their_ticks():
    figure = two_panels()
    ticks = [[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes]
    wide, narrow = drawings(figure)
    assert size(wide)[0] > 1.5 * size(wide)[1]
    assert size(narrow)[0] == 72 * figures.PHONE < size(narrow)[1]
    left, right = (ax.get_position() for ax in figure.axes)
    assert right.y1 < left.y0 and abs(left.x0 - right.x0) < 0.05
    shown = [ax.yaxis.get_tick_params()["labelleft"] for ax in figure.axes]
    assert ticks and all(shown)
    assert len(figure.get_suptitle().split("\n")) == 2


def test_text_on_a_phone_has_eleven_pixels():
    _, narrow = drawings(two_panels())
    points = [100 * float(s) for s in SCALE.findall(narrow)]
    assert points and min(points) * 350 / (72 * figures.PHONE) >= 11


def test_a_matrix_is_as_high_as_wide_on_a_phone_and_a_grid_stays_a_grid():
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 7.4))
    for ax in axes.flat:
        ax.imshow(np.eye(8))
    _, narrow = drawings(figure)
    width, height = size(narrow)
    assert 0.8 < height / width < 1.3
    assert axes[0, 0].get_position().x1 < axes[0, 1].get_position().x0


def test_ticks_that_would_touch_stand_upright_on_a_phone():
    figure, (close, apart) = plt.subplots(2, 1)
    close.set_xticks(range(9), [f"{10**4 + i:,}" for i in range(9)])
    apart.set_xticks(range(3))
    drawings(figure)
    assert {t.get_rotation() for t in close.get_xticklabels()} == {90}
    assert {t.get_rotation() for t in apart.get_xticklabels()} == {0}


def test_a_remark_that_would_leave_the_figure_is_wrapped():
    figure, ax = plt.subplots(figsize=(6.4, 3.2))
    ax.plot([0, 1])
    remark = ax.text(0.5, 0.5, "a remark that has room beside a line on a desk alone")
    short = ax.text(0.1, 0.9, "a short one")
    drawings(figure)
    assert "\n" in remark.get_text() and "\n" not in short.get_text()


def test_the_label_of_a_tick_at_the_edge_stays_in_the_figure_on_a_phone():
    figure, ax = plt.subplots(figsize=(6.4, 2), layout="constrained")
    ax.barh(["one at a time", "padded to the longest"], [7642, 4690])
    figures._narrow(figure)
    figure.canvas.draw()
    inside = [
        t for t in ax.get_xticklabels() if t.get_position()[0] <= ax.get_xlim()[1]
    ]
    assert inside[-1].get_text() == "8000"
    assert inside[-1].get_window_extent().x1 <= figure.bbox.x1
    plt.close(figure)


def test_of_two_names_that_cover_each_other_one_is_seen_on_a_phone():
    figure, ax = plt.subplots(figsize=(6.4, 3))
    for name, x in (("the first", 0.1), ("the second", 0.12), ("far off", 0.8)):
        ax.text(x, 0.5, name)
    figures._narrow(figure)
    assert [text.get_visible() for text in ax.texts] == [True, False, True]
    plt.close(figure)


def test_letters_of_an_axis_that_cover_each_other_are_left_out_on_a_phone():
    figure, axes = plt.subplots(1, 3)
    for ax, n in zip(axes, (5, 90, 5), strict=True):
        ax.set_xticks(range(n), list("abcde" * (n // 5)))
    figures._narrow(figure)
    texts = ["".join(t.get_text() for t in ax.get_xticklabels()) for ax in axes]
    assert texts == ["abcde", "", "abcde"]
    plt.close(figure)


def test_one_drawing_is_seen_without_a_style_sheet():
    wide, narrow = drawings(two_panels())
    assert "display: none" in narrow.split(">")[0]
    assert "display" not in wide.split(">")[0]
    assert 'aria-label="two lines"' in wide and 'aria-label="two lines"' in narrow


def test_no_id_is_twice_on_a_page_and_every_reference_is_met():
    page = figures.inline(two_panels(), "first") + figures.inline(two_panels(), "2nd")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {a or b for a, b in used} <= set(ids)


def test_hues_and_ink_follow_the_page():
    wide, narrow = drawings(two_panels())
    assert "var(--fig-blue, #1f6cc0)" in wide and "var(--fig-blue" in narrow


@pytest.mark.parametrize(
    "text, lines",
    [
        ("one line", ["one line"]),
        ("a title that is long", ["a title that", "is long"]),
        ("of $h_t = a h + x$ it", ["of", "$h_t = a h + x$", "it"]),
        ("broken\nby hand", ["broken by hand"]),
    ],
)
def test_a_title_is_wrapped_and_a_formula_kept_whole(text, lines):
    assert figures._wrapped(text, 14).split("\n") == lines


def test_the_style_sheet_has_the_hues_of_a_dark_page():
    sheet = (Path(__file__).parent.parent / "book/_static/book.css").read_text()
    dark = dict(re.findall(r"--fig-(\w+): (#\w+);", sheet))
    assert dark == {name: lighter for name, (_, lighter) in figures.HUES.items()}
