"""Every page, opened in Chromium: by mouse, by keyboard, on a phone, on paper."""

import re

import numpy as np
import pytest
from checks import SITE
from visit import Visit

PAGES = {
    str(p.relative_to(SITE)): text
    for p in sorted(SITE.rglob("*.html"))
    if "_static" not in p.parts and "<article" in (text := p.read_text())
}
SLIDERS = [name for name, text in PAGES.items() if "SliderModel" in text]
DESK = {"width": 1280, "height": 900}
PAPER = {"width": 718, "height": 1020}  # A4 less its margins


def profile(browser, address):
    """A fresh profile; nothing moves, so that a color is measured when it is there."""
    context = browser.new_context(
        viewport=DESK, color_scheme="light", reduced_motion="reduce"
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    return context


@pytest.fixture(scope="module")
def address(serve):
    return serve(SITE)


@pytest.fixture(scope="module")
def desk(browser, address):
    with profile(browser, address) as desk:
        yield desk


TOGETHER = [pytest.param(p, marks=pytest.mark.xdist_group(p)) for p in PAGES]


@pytest.fixture(scope="module", params=TOGETHER)  # one worker opens a page once
def visit(request, desk, address):
    visit = Visit(desk, address, request.param)
    yield visit
    visit.page.close()


def test_a_page_says_nothing_to_the_console_and_asks_no_other_host(visit):
    assert not visit.complaints()
    assert not visit.other_hosts()


def test_math_is_typeset(visit):
    assert not visit.bare_math()


def test_dark_is_dark_and_light_is_light(visit):
    visit.theme("dark")
    dark = visit.pixels()
    visit.theme("light")
    assert np.median(dark) < 60 and np.median(visit.pixels()) > 200


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_no_barrier_for_readers_who_cannot_see_or_point(visit, mode):
    visit.theme(mode)
    assert not visit.barriers()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_words_in_figures_stand_out_from_the_page(visit, mode):
    visit.theme(mode)
    assert not {figure for _, ratio, figure in visit.words_in_figures() if ratio < 4.5}


def test_a_page_hardly_moves_while_it_loads_and_keeps_room_for_images(visit):
    assert visit.shift() < 0.1
    assert not visit.images_without_size()


def test_no_formula_is_a_stop_of_the_tab_key(visit):
    assert not visit.tab_stops_of_math()


def test_a_desk_shows_every_column_of_every_table(visit):
    visit.size(DESK)
    assert not visit.tables_cut()
    assert not visit.figures_cut()


@pytest.mark.parametrize("width", [390, 360, 768])
def test_a_small_window_scrolls_down_and_never_sideways(visit, width):
    visit.size({"width": width, "height": 740})
    assert not visit.sticking_out()
    assert not visit.figures_cut()
    if width == 390:
        assert not visit.columns_lost()
        assert not {figure for size, _, figure in visit.words_in_figures() if size < 11}
    visit.size(DESK)


def test_paper_shows_the_text_alone_whole_and_dark(visit):
    visit.theme("dark")
    visit.page.emulate_media(media="print")
    visit.size(PAPER)
    for part in ".bd-sidebar-primary", ".prev-next-footer", ".copybtn":
        assert not any(e.is_visible() for e in visit.page.query_selector_all(part))
    assert visit.page.is_visible("article")
    assert not visit.pale_on_paper()
    assert not visit.tables_cut()
    assert not visit.words_broken()
    assert not visit.figures_cut()
    visit.page.emulate_media(media="screen")
    visit.size(DESK)
    assert visit.page.get_attribute("html", "data-theme") == "dark"


def test_whoever_moves_by_keyboard_sees_where(desk, address):
    page = Visit(desk, address, "book/01_recurrence.html")
    assert not page.rings_missing(60)
    page.page.close()


def test_every_claim_shows_its_verdict_and_a_command_to_copy(desk, address):
    visit = Visit(desk, address, "book/10_results.html")
    claims = visit.page.query_selector_all(".claim")
    assert len(claims) >= 15
    for claim in claims:
        box = claim.bounding_box()
        assert box["x"] + box["width"] <= DESK["width"]
        assert claim.query_selector(".badge").is_visible()
        assert claim.query_selector("pre").is_visible()
        assert claim.query_selector(".copybtn")
    visit.page.close()


def test_the_figures_to_play_with_are_there():
    names = "02_duality", "03_chunking"
    assert {f"book/{name}.html" for name in names} <= set(SLIDERS)


@pytest.mark.parametrize("name", SLIDERS)
def test_every_slider_changes_its_figure_by_keyboard_and_by_mouse(name, desk, address):
    page = Visit(desk, address, name).page
    for handle in page.query_selector_all(".noUi-handle"):
        handle.press("Home")  # one opens with its last figure
        page.wait_for_timeout(200)
        first = shown(handle)
        assert "<svg" in first
        assert handle.get_attribute("aria-label") not in (None, "", "slider")
        handle.press("ArrowRight")
        second = changed(handle, first)
        readout = handle.evaluate("""e => e.closest(".widget-slider")
          .querySelector(".widget-readout").textContent""")
        assert handle.get_attribute("aria-valuetext") == readout
        handle.press("ArrowLeft")
        assert changed(handle, second) == first
        drag(handle, 1)
        last = changed(handle, first)
        drag(handle, 0)
        changed(handle, last)
    page.close()


def drag(handle, to):
    """Pull the handle by mouse along its rail: 0 is the left end, 1 the right."""
    handle.scroll_into_view_if_needed()
    rail = handle.evaluate_handle("e => e.closest('.noUi-target')").as_element()
    start, end = handle.bounding_box(), rail.bounding_box()
    mouse, y = handle.owner_frame().page.mouse, start["y"] + start["height"] / 2
    mouse.move(start["x"] + start["width"] / 2, y)
    mouse.down()
    mouse.move(end["x"] + to * end["width"], y, steps=5)
    mouse.up()


def shown(handle):
    """What a reader sees of the figures in the slider's cell."""
    return handle.evaluate("""(e) => {
      const figures = e.closest(".cell_output").querySelectorAll("svg");
      const visible = [...figures].filter((f) => f.checkVisibility());
      return visible.map((f) => f.outerHTML).join("");
    }""")


def changed(handle, before):
    """The figures once they differ from `before`; a second is enough."""
    for _ in range(20):
        if (now := shown(handle)) != before:
            return now
        handle.owner_frame().wait_for_timeout(50)
    raise AssertionError("the slider changes nothing")


def test_search_finds_semiseparable(desk, address):
    page = Visit(desk, address, "book/intro.html").page
    page.keyboard.press("Control+k")
    page.keyboard.type("semiseparable")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    links = page.query_selector_all("#search-results li a")
    assert any("02_duality" in a.get_attribute("href") for a in links)
    page.wait_for_selector("#search-results .context")
    page.wait_for_load_state("networkidle")  # each page found is read for its words
    assert re.search(r"/(\d\d_|glossary)", links[0].get_attribute("href"))
    found = page.inner_text("#search-results")
    assert "semiseparable: " in found  # of the glossary
    assert "\\" not in found  # no TeX
    page.close()


def test_the_copy_button_copies_the_cell(desk, address):
    page = Visit(desk, address, "book/01_recurrence.html").page
    cell = page.query_selector(".cell:not(.setup) .cell_input .highlight")
    cell.hover()
    cell.query_selector(".copybtn").click()
    page.wait_for_selector(".copybtn.success")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == cell.query_selector("pre").inner_text().strip()
    page.close()


BROKEN = {
    "complaints": "<script>throw new Error('x')</script>",
    "complaints of what is missing": '<img src="missing.png" alt="a plot">',
    "other_hosts": '<img src="http://example.org/x.png" alt="a plot">',
    "bare_math": '<p><span class="math">x</span></p>',
    "bare_math as a dollar": "<p>the sum $a + b$</p>",
    "bare_math with an error": "<mjx-merror>no such macro</mjx-merror>",
    "barriers": '<p style="color: #bbb">pale words</p>',
    "barriers to names": "<button></button>",
    "sticking_out": '<p style="width: 2000px">wide</p>',
    "tables_cut": f"<table><tr>{'<td>a cell</td>' * 99}</tr></table>",
    "columns_lost": f"<table><tr>{'<td>a cell</td>' * 99}</tr></table>",
    "words_broken": '<table style="width: 1px; word-break: break-all"><td>word</table>',
    "figures_cut": '<svg aria-label="x" viewBox="0 0 9 9" style="width: 9000px"></svg>',
    "figures_cut by their words": '<svg aria-label="x" viewBox="0 0 9 9" '
    'style="width: 9px; overflow: visible"><text>words</text></svg>',
    "images_without_size": '<img src="favicon.ico" alt="x">',
    "tab_stops_of_math": '<mjx-container tabindex="0">x</mjx-container>',
    "pale_on_paper": '<p style="color: #ccc">pale words</p>',
    "sticking_out of a line": '<p><i style="overflow: auto"><input size="999"></i></p>',
}


@pytest.mark.parametrize("method", BROKEN)
def test_a_broken_page_is_caught(method, browser, serve, tmp_path):
    page = '<html lang="en"><title>x</title><main><article>{}</article></main></html>'
    for name, body in (
        ("sound", "<h1>x</h1>"),
        ("broken", "<h1>x</h1>" + BROKEN[method]),
    ):
        (tmp_path / f"{name}.html").write_text(page.format(body))
    (tmp_path / "favicon.ico").touch()
    address = serve(tmp_path)
    with profile(browser, address) as fresh:
        sound, broken = (
            getattr(Visit(fresh, address, f"{name}.html"), method.split()[0])()
            for name in ("sound", "broken")
        )
    assert not sound and broken


def test_small_and_pale_words_in_figures_are_measured(browser, serve, tmp_path):
    svg = '<svg aria-label="x" viewBox="0 0 100 50" style="width: 50px">{}</svg>'
    words = (
        '<g id="text_1"><g transform="translate(9 30) scale(0.1)" fill="{}">{}</g></g>'
    )
    words = words.format("#bbb", '<rect width="200" height="90"></rect>')
    html = (
        f'<body style="background: #fff"><article>{svg.format(words)}</article></body>'
    )
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "favicon.ico").touch()
    address = serve(tmp_path)
    with profile(browser, address) as fresh:
        [(size, ratio, name)] = Visit(fresh, address, "page.html").words_in_figures()
    assert name == "x" and abs(size - 5) < 0.1 and 1.8 < ratio < 2


def test_a_dead_slider_is_caught(desk, address):
    page = Visit(desk, address, SLIDERS[0]).page
    handle = page.query_selector(".noUi-handle")
    with pytest.raises(AssertionError, match="changes nothing"):
        changed(handle, shown(handle))
    page.close()


def test_every_page_of_the_contents_is_visited():
    toc = (SITE.parents[1] / "_toc.yml").read_text()
    listed = re.findall(r"^\s*(?:root|- file): (\S+)", toc, re.M)
    assert {f"{name}.html" for name in listed} <= set(PAGES)
