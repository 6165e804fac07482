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
