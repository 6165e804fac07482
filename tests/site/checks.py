"""What can be wrong with a built page, found without a browser.

Each check takes a page and all pages, and yields one line for each fault.
"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parents[2] / "_build/html"
LIMIT = 1_500_000  # bytes of HTML a page
VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
VERBATIM = {"pre", "code", "script", "style", "svg", "textarea"}  # not prose


@dataclass
class Page(HTMLParser):
    """The parts of a page that the checks look at."""

    path: Path
    tags: list = field(default_factory=list)  # (name, attributes, inside the article)
    ids: set = field(default_factory=set)
    prose: list = field(default_factory=list)  # text outside code and formulas

    def __post_init__(self):
        super().__init__()
        self.source = self.path.read_text(encoding="utf-8")
        self.open = []  # (name, attributes) of the elements around this place
        self.feed(self.source)

    def handle_starttag(self, name, attributes):
        attributes = {k: v or "" for k, v in attributes}
        article = any(n == "article" for n, _ in self.open)
        self.tags.append((name, attributes, article))
        self.ids |= {attributes[k] for k in ("id", "name") if k in attributes}
        if name not in VOID:
            self.open.append((name, attributes))

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        self.handle_endtag(name)

    def handle_endtag(self, name):
        names = [n for n, _ in self.open]
        if name in names:
            del self.open[len(names) - 1 - names[::-1].index(name) :]

    def handle_data(self, text):
        around = {n for n, _ in self.open}
        formula = any("math" in a.get("class", "").split() for _, a in self.open)
        if "article" in around and not around & VERBATIM and not formula:
            self.prose.append(text)


def read(site: Path) -> dict:
    """All pages below a folder, by their resolved path."""
    paths = (p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts)
    return {p.resolve(): Page(p) for p in paths}


def broken_links(page, pages):
    for name, attributes, _ in page.tags:
        url = attributes.get("src") or attributes.get("href")
        if url is None or name == "base":
            continue
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            continue
        target = (page.path.parent / unquote(parts.path)).resolve()
        target = target if parts.path else page.path.resolve()
        if not target.is_file():
            yield f"{url}: no such file"
        elif parts.fragment and name == "a":
            there = pages.get(target)
            if there and unquote(parts.fragment) not in there.ids:
                yield f"{url}: no such anchor"


def pictures_without_words(page, pages):
    for name, attributes, article in page.tags:
        alt = attributes.get("alt", "")
        if name == "img" and "alt" not in attributes:
            yield f"{attributes.get('src', '')[:60]}: no alt text"
        elif name == "img" and article and (not alt or Path(alt).suffix):
            yield f"{attributes.get('src', '')[:60]}: alt text is {alt!r}"
        elif name == "svg" and article and not attributes.get("aria-label"):
            yield "an <svg> without aria-label"


def failed_outputs(page, pages):
    for _, attributes, _ in page.tags:
        kind = {"traceback", "stderr"} & set(attributes.get("class", "").split())
        if kind:
            yield f"an output of kind {kind.pop()}"
    for match in re.finditer(r"\w*Warning: .{,60}|Traceback \(most.{,40}", page.source):
        yield match.group()


RAW = {
    "a role": r"\{[a-z][\w:+-]*\}`",
    "a directive": r"^\s*(:{3,}|`{3,})",
    "an option": r"^\s*:[a-z-]+: ",
    "a formula": r"\$[^$\s][^$]*\$|\$\$|\\\(|\\\[|\\(begin|frac|text|tag)\b",
    "emphasis": r"\*\*|(?<!\w)_\w[^_]*\w_(?!\w)",
    "a link": r"\]\((https?:|\.|#|\w+\.)|\]\[\w",
    "a table": r"^\s*\|.*\|\s*$",
    "a heading": r"^#{1,6} ",
    "a substitution": r"\{\{|\}\}",
}


def raw_markup(page, pages):
    for text in page.prose:
        for what, pattern in RAW.items():
            if found := re.search(pattern, text, re.M):
                yield f"{what}: {text[found.start() : found.start() + 60].strip()!r}"


def heavy_pages(page, pages):
    size = page.path.stat().st_size
    if size > LIMIT:
        yield f"{size:,} bytes of HTML"


LOADS = {"script", "link", "img", "iframe", "source", "video", "audio", "embed"}
CSS_URL = r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)"""


def other_hosts(page, pages):
    """What the page loads, its style sheets included. Links to click are welcome."""
    for name, attributes, _ in page.tags:
        url = attributes.get("src") or (name == "link" and attributes.get("href")) or ""
        if name in LOADS and re.match(r"(https?:)?//", url):
            yield f"<{name}> from {url}"
    yield from re.findall(CSS_URL, page.source)
    for sheet in re.findall(r'href="([^"]+\.css)', page.source):
        path = page.path.parent / sheet
        if path.is_file():
            yield from re.findall(CSS_URL, path.read_text(encoding="utf-8"))


CHECKS = [
    broken_links,
    pictures_without_words,
    failed_outputs,
    raw_markup,
    heavy_pages,
    other_hosts,
]
