"""Print the built book to _build/book.pdf: `make extras book pdf`.

Chromium prints each page of _toc.yml, in that order, as a reader's browser would (the
print style is in book/_static/book.css); pypdf joins them and adds the contents as
bookmarks. Solutions, folded on the screen, are printed open; the code of plots is not.
"""

import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

from playwright.sync_api import sync_playwright
from pypdf import PdfReader, PdfWriter

ROOT = Path(__file__).parent.parent
PAPER = {
    "format": "A4",
    "margin": dict.fromkeys(("top", "right", "bottom", "left"), "18mm"),
    "print_background": True,  # the frames around code
}
OPEN = """() => {
  document.documentElement.dataset.theme = "light";
  document.querySelectorAll(".tag_hide-cell details").forEach((d) => (d.open = true));
}"""


def pages() -> list[Path]:
    """The built pages in the order of the table of contents."""
    names = re.findall(
        r"^\s*(?:root|- file): (\S+)", (ROOT / "_toc.yml").read_text(), re.M
    )
    return [ROOT / "_build/html" / f"{name}.html" for name in names]


def print_page(browser, path: Path) -> tuple[str, PdfReader]:
    """Title and PDF of one page, once its formulas and widgets are drawn."""
    page = browser.new_page(color_scheme="light")
    page.goto(path.as_uri())
    page.evaluate("window.MathJax && MathJax.startup.promise.then(() => 1)")
    if "SliderModel" in page.content():
        page.wait_for_selector(".noUi-handle")
    page.evaluate(OPEN)
    title = page.inner_text("article h1").removesuffix("#").strip()
    printed = PdfReader(BytesIO(page.pdf(**PAPER)))
    page.close()
    return title, printed


def main() -> None:
    """Print all pages and join them."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser_path = next(filter(None, found), None)
    if browser_path is None:
        sys.exit("This needs Chromium: apt-get install chromium")
    book = PdfWriter()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox"]
        )
        for path in pages():
            title, printed = print_page(browser, path)
            book.append(printed, outline_item=title)
            print(f"{len(printed.pages):3} pages  {title}")
        browser.close()
    book.compress_identical_objects()
    out = ROOT / "_build/book.pdf"
    book.write(out)
    size = f"{len(book.pages)} pages, {out.stat().st_size:,} bytes"
    print(f"{out.relative_to(ROOT)}: {size}")


if __name__ == "__main__":
    main()
