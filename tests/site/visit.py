"""A page open in Chromium, and what can be wrong with it."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

AXE = (Path(__file__).parent / "axe/axe.min.js").read_text()

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
            let a = e;
            while ((a = a.parentElement).localName != "article") {
              const { display, overflowX } = getComputedStyle(a);
              if (display != "inline" && overflowX != "visible") return false;
            }
            return true;
          };
          const bad = [...document.querySelectorAll("article *")].filter(wide)
            .map((e) => e.outerHTML.slice(0, 80));
          if (root.scrollWidth > root.clientWidth) bad.push("the page itself");
          return bad;
        }""")

    def tables_cut(self):
        """Tables of which a part is out of sight: their box scrolls, or ends before."""
        return self.page.evaluate("""() => {
          const cut = (table) => {
            const { right } = table.getBoundingClientRect();
            if (right > document.documentElement.clientWidth + 1) return true;
            for (let a = table; (a = a.parentElement).localName != "article"; )
              if (getComputedStyle(a).overflowX != "visible"
                  && right > a.getBoundingClientRect().right + 1) return true;
            return false;
          };
          return [...document.querySelectorAll("article table")]
            .filter((e) => e.checkVisibility() && cut(e))
            .map((e) => e.rows[0].textContent.slice(0, 60));
        }""")

    def columns_lost(self):
        """Tables that scroll although their first column does not stay in place."""
        return self.page.evaluate("""() => {
          const box = (e) => e.closest(".data, .pst-scrollable-table-container");
          const room = (e) => (box(e) ?? e.parentElement).clientWidth + 1;
          const look = (e) => getComputedStyle(e.rows[0].cells[0]);
          const stays = (e) => look(e).position == "sticky";
          const lost = (e) => e.scrollWidth > room(e) && !stays(e);
          return [...document.querySelectorAll("article table:not(.genindextable)")]
            .filter((e) => e.checkVisibility() && lost(e))
            .map((e) => e.rows[0].textContent.slice(0, 60));
        }""")

    def words_broken(self):
        """Words in tables that are cut between two letters."""
        return self.page.evaluate(r"""() => {
          const bad = [];
          for (const table of document.querySelectorAll("article table")) {
            const walk = document.createTreeWalker(table, NodeFilter.SHOW_TEXT);
            for (let n; (n = walk.nextNode()); ) {
              if (n.parentElement.closest(".math, mjx-container")) continue;
              for (const word of n.data.matchAll(/[A-Za-z]{3,}/g)) {
                const range = document.createRange();
                range.setStart(n, word.index);
                range.setEnd(n, word.index + word[0].length);
                const tops = [...range.getClientRects()].map((r) => Math.round(r.top));
                if (new Set(tops).size > 1) bad.push(word[0]);
              }
            }
          }
          return bad;
        }""")

    def figures_cut(self):
        """Drawings that are wider than their box, or that words leave by their side."""
        return self.page.evaluate("""() => {
          const cut = (svg) => {
            const own = svg.getBoundingClientRect();
            if (own.width > svg.parentElement.clientWidth + 1) return true;
            return [...svg.querySelectorAll("text, [id*=text_]")].some((text) => {
              const { left, right, width } = text.getBoundingClientRect();
              return width && (left < own.left - 2 || right > own.right + 2);
            });
          };
          return [...document.querySelectorAll("article svg[aria-label]")]
            .filter((e) => e.checkVisibility() && cut(e))
            .map((e) => e.getAttribute("aria-label").slice(0, 60));
        }""")

    def words_in_figures(self):
        """(letters' height in pixels, contrast with the page, figure) of each text.

        matplotlib draws text as shapes at a hundredth of their size. Words that stand
        on a colored patch are left out.
        """
        return self.page.evaluate("""() => {
          const canvas = document.createElement("canvas").getContext("2d");
          const parts = (color) => {
            canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
          };
          const light = (color) => {
            const [r, g, b] = parts(color).map((v) => v / 255)
              .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const page = light(getComputedStyle(document.body).backgroundColor);
          const out = [];
          for (const svg of document.querySelectorAll("article svg[aria-label]")) {
            if (!svg.checkVisibility()) continue;
            const filled = [...svg.querySelectorAll("path, rect, image")].filter((e) =>
              !e.closest("defs") && !e.closest("[id*=text_]")
              && getComputedStyle(e).fill != "none")
              .map((e) => e.getBoundingClientRect());
            const texts = "text, [id*=text_] > g[transform]";
            for (const text of svg.querySelectorAll(texts)) {
              const box = text.getBoundingClientRect();
              if (!box.width) continue;
              const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
              const { a, b } = text.getScreenCTM();
              const size = text.localName == "text"
                ? parseFloat(getComputedStyle(text).fontSize) : 100;
              const on = filled.some((r) =>
                r.left < x && x < r.right && r.top < y && y < r.bottom);
              const words = light(getComputedStyle(text).fill);
              const [low, high] = [words, page].sort((p, q) => p - q);
              out.push([Math.hypot(a, b) * size, on ? 21 : (high + 0.05) / (low + 0.05),
                svg.getAttribute("aria-label").slice(0, 60)]);
            }
          }
          return out;
        }""")

    def tab_stops_of_math(self):
        return self.page.evaluate("""() =>
          document.querySelectorAll("mjx-container[tabindex='0']").length""")

    def shift(self):
        """How much of the window moved while the page loaded, as Chromium counts it."""
        return self.page.evaluate("""() => new Promise((done) => {
          let sum = 0;
          new PerformanceObserver((list) => {
            for (const e of list.getEntries()) sum += e.hadRecentInput ? 0 : e.value;
          }).observe({ type: "layout-shift", buffered: true });
          setTimeout(() => done(sum), 50);
        })""")

    def images_without_size(self):
        return self.page.evaluate("""() =>
          [...document.querySelectorAll("article :is(img, svg[aria-label])")]
            .filter((e) => !e.getAttribute("viewBox")
              && !(e.getAttribute("width") && e.getAttribute("height")))
            .map((e) => e.outerHTML.slice(0, 80))""")

    def pale_on_paper(self):
        """Text that is printed in a light color."""
        return self.page.evaluate(r"""() => {
          const bad = new Set();
          const texts = "article :is(p, td, h1, li, pre, span, a)";
          for (const e of document.querySelectorAll(texts)) {
            if (!e.checkVisibility() || !e.textContent.trim()) continue;
            const [r, g, b] = getComputedStyle(e).color.match(/[\d.]+/g).map(Number);
            if (0.2126 * r + 0.7152 * g + 0.0722 * b > 140)
              bad.add(e.textContent.slice(0, 40));
          }
          return [...bad];
        }""")

    def rings_missing(self, stops):
        """Which of the first stops of the Tab key show no ring."""
        missing = []
        self.page.evaluate("document.activeElement.blur(), window.scrollTo(0, 0)")
        for _ in range(stops):
            self.page.keyboard.press("Tab")
            name = self.page.evaluate(r"""() => {
              const e = document.activeElement, s = getComputedStyle(e);
              const ring = s.outlineStyle != "none" && parseFloat(s.outlineWidth) >= 2
                && !/, 0\)$/.test(s.outlineColor);
              const seen = ring || /[3-9]px$|[2-9]px( inset)?$/.test(s.boxShadow);
              return seen || e == document.body ? null : e.outerHTML.slice(0, 80);
            }""")
            missing += [name] if name else []
        return missing

    def size(self, window):
        """Make the window this large and wait until the page has followed."""
        self.page.set_viewport_size(window)
        self.page.evaluate("new Promise(requestAnimationFrame)")

    def theme(self, mode):
        """Press the color button until the page is in that mode."""
        for _ in range(3):
            if self.page.get_attribute("html", "data-theme") == mode:
                return
            self.page.click(".theme-switch-button:visible")
        raise AssertionError(f"the button does not lead to {mode}")

    def pixels(self):
        return np.asarray(Image.open(BytesIO(self.page.screenshot())).convert("L"))
