"""What can be wrong with a built page, found without a browser.

Each check takes a page and all pages, and yields one line for each fault.
"""

import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SSDLIB_SITE", ROOT / "_build/html"))  # another build
LIMIT = 1_750_000  # bytes of HTML a page, every figure drawn twice
VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
VERBATIM = {"pre", "code", "script", "style", "svg", "textarea"}  # not prose


@dataclass
class Page(HTMLParser):
    """The parts of a page that the checks look at."""

    path: Path
    tags: list = field(default_factory=list)  # (name, attributes, inside the article)
    ids: set = field(default_factory=set)
    prose: list = field(default_factory=list)  # text outside code and formulas
    plain: list = field(default_factory=list)  # the part of it that leads nowhere

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
            if not around & {"a", "h1", "h2", "h3", "title", "dt", "summary"}:
                ids = [a.get("id", "") for _, a in self.open]
                cites = any(name.startswith("further-reading") for name in ids)
                self.plain.append((text, cites))


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


def numbers_without_a_link(page, pages):
    """Chapters and papers that are named; works that are cited have own chapters."""
    for text, cites in page.plain:
        for found in re.finditer(r"\b[Cc]hapter \d+|arXiv[: ]\s?\d{4}\.\d{5}", text):
            if not (cites and "hapter" in found[0]):
                yield found[0]


def hints_to_tools(page, pages):
    if found := re.search(r"# ?(<[^>]*>)*fmt: ?\w+|# noqa", page.source):
        yield found[0]


def missing_heads(page, pages):
    """What search engines and previews of links read."""
    metas = [a for name, a, _ in page.tags if name == "meta"]
    wanted = {
        ("name", "description"),
        ("property", "og:title"),
        ("property", "og:image"),
    }
    if page.path.parent.name in ("book", "api"):
        for kind, value in wanted:
            if not any(a.get(kind) == value and a.get("content") for a in metas):
                yield f"no {value}"


def words_without_a_meaning(page, pages):
    """Links to the glossary say what they lead to; those of the index are not ours."""
    for name, attributes, article in page.tags:
        to_word = "glossary.html#" in attributes.get("href", "")
        to_word &= page.path.name != "genindex.html"
        if name == "a" and article and to_word and not attributes.get("title"):
            yield attributes["href"]


def nameless_folds(page, pages):
    yield from re.findall(r"(?:Show|Hide) code cell \w+", page.source)


def chapters_without_a_number(page, pages):
    """The number is that of the file, in the title of the page."""
    if found := re.fullmatch(r"(\d\d)_\w+", page.path.stem):
        title = re.search(r"<h1>(.*?)<", page.source, re.S)
        if not title or not title[1].startswith(f"{int(found[1])}. "):
            yield title[1] if title else "no title"


CHECKS = [
    broken_links,
    pictures_without_words,
    failed_outputs,
    raw_markup,
    heavy_pages,
    other_hosts,
    numbers_without_a_link,
    hints_to_tools,
    missing_heads,
    words_without_a_meaning,
    nameless_folds,
    chapters_without_a_number,
]
