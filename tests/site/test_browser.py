"""Every page, opened in Chromium: by mouse, by keyboard, on a phone, on paper."""

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from checks import SITE
from PIL import Image

PAGES = {p.stem: p for p in sorted((SITE / "book").glob("*.html"))}
SLIDERS = [n for n, p in PAGES.items() if "SliderModel" in p.read_text()]
AXE = (Path(__file__).parent / "axe/axe.min.js").read_text()
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

# What the theme, not the book, does: accepted outside the article only, but for the
# bibliography, which docutils and sphinxcontrib-bibtex write.
THEME_RULES = {
    "label-content-name-mismatch",  # search and color buttons: "Search", text "Ctrl+K"
    "region",  # the title beside the logo lies in no landmark
}
MATH_RULES = {"empty-table-header"}  # a heading of MathML alone, which axe cannot read
BIBLIOGRAPHY_RULES = {
    "aria-allowed-role",
    "aria-deprecated-role",
    "aria-required-children",
}
KNOWN = {
    "theme": THEME_RULES,
    "math": MATH_RULES,
    "bibliography": BIBLIOGRAPHY_RULES,
}
THEME_LOGS = (  # notes to the console that tell of no fault
    "[PST]: ",  # pydata-sphinx-theme: which mode, where the sidebar is
    "[togglebutton]: ",
    "strict mode: use allowUnionTypes",  # the widget manager, about its own schema
)


class Visit:
    """An open page and what it said and asked for since it was opened."""

    def __init__(self, context, address, path):
        self.page = context.new_page()
        self.console, self.asked = [], []
        self.page.on("console", lambda m: self.console.append(m.text))
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("requestfailed", lambda r: self.console.append(f"no {r.url}"))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(f"{address}/{path}")
        self.page.evaluate("window.MathJax && MathJax.startup.promise.then(() => 1)")
        if "SliderModel" in self.page.content():
            self.page.wait_for_selector(".noUi-handle")
        self.address = address

    def complaints(self):
        return [m for m in self.console if not m.startswith(THEME_LOGS)]

    def other_hosts(self):
        mine = self.address, "data:", "blob:"
        return [url for url in self.asked if not url.startswith(mine)]

    def bare_math(self):
        """Formulas that MathJax refused or never saw."""
        return self.page.evaluate(r"""() => {
          const bad = [...document.querySelectorAll("mjx-merror")];
          const math = document.querySelectorAll("article .math");
          bad.push(...[...math].filter((e) => !e.querySelector("mjx-container")));
          const walk = document.createTreeWalker(
            document.querySelector("article"), NodeFilter.SHOW_TEXT);
          for (let n; (n = walk.nextNode()); )
            if (/\$[^$\s][^$]*\$|\$\$|\\[(\[]|\\(frac|text|tag)\b/.test(n.data)
                && !n.parentElement.closest("pre, code, script, style"))
              bad.push(n);
          return bad.map((e) => e.textContent.slice(0, 60));
        }""")

    def barriers(self):
        """What axe-core finds: {rule: elements}, less what the theme is known for."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE)
        found = self.page.evaluate("""async () => {
          const run = await axe.run(document, {resultTypes: ["violations"]});
          const where = (node) => {
            const e = document.querySelector(node.target.at(-1));
            const place = !e?.closest("article") ? "theme"
              : e.closest(".citation-list") ? "bibliography"
              : e.querySelector("mjx-assistive-mml") ? "math" : "article";
            return [place, node.html.slice(0, 100)];
          };
          return run.violations.flatMap((v) => v.nodes.map((n) => [v.id, ...where(n)]));
        }""")
        return [f for f in found if f[0] not in KNOWN.get(f[1], ())]

    def sticking_out(self):
        """What is wider than the window and in no box that scrolls."""
        return self.page.evaluate("""() => {
          const root = document.documentElement;
          const wide = (e) => {
            if (e.getBoundingClientRect().right <= root.clientWidth + 1) return false;
            for (let a = e.parentElement; a.localName != "article"; a = a.parentElement)
              if (getComputedStyle(a).overflowX != "visible") return false;
            return true;
          };
          const bad = [...document.querySelectorAll("article *")].filter(wide)
            .map((e) => e.outerHTML.slice(0, 80));
          if (root.scrollWidth > root.clientWidth) bad.push("the page itself");
          return bad;
        }""")

    def scales(self):
        """Pixels a unit of each drawing: its 11 pt text is 11 times that high."""
        return self.page.evaluate("""() => [...document.querySelectorAll(".figure svg")]
          .map((e) => e.getBoundingClientRect().width / e.viewBox.baseVal.width)""")

    def theme(self, mode):
        """Press the color button until the page is in that mode."""
        for _ in range(3):
            if self.page.get_attribute("html", "data-theme") == mode:
                return
            self.page.click(".theme-switch-button:visible")
        raise AssertionError(f"the button does not lead to {mode}")

    def pixels(self):
        return np.asarray(Image.open(BytesIO(self.page.screenshot())).convert("L"))


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


@pytest.fixture(scope="module", params=PAGES)
def visit(request, desk, address):
    visit = Visit(desk, address, f"book/{request.param}.html")
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


def test_a_phone_scrolls_down_and_never_sideways(visit):
    visit.page.set_viewport_size(PHONE)
    visit.page.evaluate("new Promise(requestAnimationFrame)")
    assert not visit.sticking_out()
    assert all(scale >= 0.9 for scale in visit.scales())
    visit.page.set_viewport_size(DESK)


def test_paper_shows_the_text_alone(visit):
    visit.page.emulate_media(media="print")
    for part in ".bd-sidebar-primary", ".prev-next-footer", ".copybtn":
        assert not any(e.is_visible() for e in visit.page.query_selector_all(part))
    assert visit.page.is_visible("article")
    visit.page.emulate_media(media="screen")


def test_the_figures_to_play_with_are_there():
    assert {"06_generation", "08_roofline"} <= set(SLIDERS)


@pytest.mark.parametrize("name", SLIDERS)
def test_every_slider_changes_its_figure_by_keyboard_and_by_mouse(name, desk, address):
    page = Visit(desk, address, f"book/{name}.html").page
    for handle in page.query_selector_all(".noUi-handle"):
        assert handle.get_attribute("aria-label") not in (None, "", "slider")
        handle.scroll_into_view_if_needed()
        first = shown(handle)
        assert "<svg" in first
        handle.press("ArrowRight")
        second = changed(handle, first)
        box = handle.bounding_box()
        rail = handle.evaluate_handle("e => e.closest('.noUi-target')").as_element()
        end = rail.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(end["x"] + end["width"], box["y"] + 5, steps=5)
        page.mouse.up()
        third = changed(handle, second)
        handle.press("Home")
        assert changed(handle, third) == first
    page.close()


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
    page.close()


def test_the_copy_button_copies_the_cell(desk, address):
    page = Visit(desk, address, "book/01_recurrence.html").page
    cell = page.query_selector(".cell_input .highlight")
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


def test_a_dead_slider_is_caught(desk, address):
    name = SLIDERS[0]
    page = Visit(desk, address, f"book/{name}.html").page
    handle = page.query_selector(".noUi-handle")
    with pytest.raises(AssertionError, match="changes nothing"):
        changed(handle, shown(handle))
    page.close()


def test_every_page_of_the_contents_is_visited():
    toc = (SITE.parents[1] / "_toc.yml").read_text()
    listed = re.findall(r"^\s*(?:root|- file): book/(\S+)", toc, re.M)
    assert set(listed) <= set(PAGES), json.dumps(listed)
