"""The built pages hold no fault that a program can find without a browser."""

import hashlib
from pathlib import Path

import checks
import pytest

ROOT = Path(__file__).parents[2]
PAGES = checks.read(checks.SITE)
HEAD = """<meta name="description" content="x"><meta property="og:title" content="x">
<meta property="og:image" content="other.html">"""
ARTICLE = "<html><body><article>{}</article></body></html>"
FAULTS = {  # for each check, pieces of a page that it must refuse
    checks.broken_links: [
        '<a href="missing.html">x</a>',
        '<a href="#missing">x</a>',
        '<a href="other.html#missing">x</a>',
        '<script src="missing.js"></script>',
    ],
    checks.pictures_without_words: [
        '<img src="other.html">',
        '<img src="other.html" alt="">',
        '<img src="other.html" alt="../_images/plot.png">',
        "<svg><path/></svg>",
    ],
    checks.failed_outputs: [
        '<div class="output traceback highlight">x</div>',
        '<div class="output stderr highlight">x</div>',
        "<pre>Traceback (most recent call last)</pre>",
        "<pre>DeprecationWarning: old</pre>",
    ],
    checks.raw_markup: [
        "<p>see {ref}`x`</p>",
        "<p>:::{note}</p>",
        "<p>```python</p>",
        "<p>:class: dropdown</p>",
        "<p>the sum $a + b$</p>",
        r"<p>the sum \frac{a}{b}</p>",
        "<p>**bold**</p>",
        "<p>[text](page.html)</p>",
        "<p>| a | b |</p>",
        "<p># Heading</p>",
        "<p>{{ name }}</p>",
    ],
    checks.heavy_pages: ["x" * checks.LIMIT],
    checks.other_hosts: [
        '<script src="https://a.org/x.js"></script>',
        '<link rel="stylesheet" href="//a.org/x.css">',
        '<img src="http://a.org/x.png" alt="a plot">',
        "<style>@font-face {src: url(https://a.org/x.woff2)}</style>",
        '<link rel="stylesheet" href="sheet.css">',
    ],
    checks.numbers_without_a_link: [
        "<p>as chapter 9 says</p>",
        "<td>arXiv 2603.09555</td>",
        '<section id="further-reading"><p>arXiv:2603.09555</p></section>',
    ],
    checks.hints_to_tools: ["<pre>x = 1  # fmt: skip</pre>"],
    checks.words_without_a_meaning: ['<a href="glossary.html#term-mask">mask</a>'],
    checks.nameless_folds: ["<summary>Show code cell source</summary>"],
}
SOUND = """<h1 id="top">Title</h1><p>
<a href="other.html">Chapter 9</a>: it costs $5, or 2 * 3 * 4; <code>$x$</code>.</p>
<p><span class="math">\\(x\\)</span> <a href="#top">up</a>
<a href="other.html#there">on</a> <a href="https://a.org">a page elsewhere</a>
</p><img src="other.html" alt="a plot">
<svg aria-label="a curve"><path/></svg><pre>{ref}`x` ::: **</pre>"""


def site_with(folder, body):
    """A site of two pages, the first of which holds `body`."""
    (folder / "page.html").write_text(HEAD + ARTICLE.format(body))
    (folder / "other.html").write_text(HEAD + ARTICLE.format('<p id="there">x</p>'))
    (folder / "sheet.css").write_text("p {background: url('https://a.org/x.png')}")
    pages = checks.read(folder)
    return pages[(folder / "page.html").resolve()], pages


def test_there_are_pages_to_check():
    assert {"intro", "notation", "references"} <= {p.stem for p in PAGES}
    assert sum(p.parent.name == "book" for p in PAGES) >= 14


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_the_site_has_no(check):
    faults = {p.name: list(check(page, PAGES)) for p, page in PAGES.items()}
    assert not {name: f for name, f in faults.items() if f}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_a_sound_page_has_no(check, tmp_path):
    assert not list(check(*site_with(tmp_path, SOUND)))


@pytest.mark.parametrize(
    "check, body",
    [(check, body) for check, bodies in FAULTS.items() for body in bodies],
    ids=lambda v: v[:30] if isinstance(v, str) else v.__name__,
)
def test_a_broken_page_is_caught_by(check, body, tmp_path):
    assert list(check(*site_with(tmp_path, body)))


def test_a_page_without_a_head_or_a_number_is_caught(tmp_path):
    page = tmp_path / "book/03_chunking.html"
    page.parent.mkdir()
    page.write_text(ARTICLE.format("<h1>Chunks</h1>"))
    page = checks.read(tmp_path)[page.resolve()]
    assert len([*checks.missing_heads(page, {})]) == 3
    assert [*checks.chapters_without_a_number(page, {})] == ["Chunks"]
    page.source = page.source.replace("<h1>", "<h1>3. ")
    assert not [*checks.chapters_without_a_number(page, {})]


@pytest.mark.parametrize("folder", ["book/_static/vendor", "tests/site/axe"])
def test_code_of_others_is_what_was_fetched_and_has_its_licence(folder):
    """Every file is listed with its checksum: tools/vendor_assets.sh wrote the list."""
    folder = ROOT / folder
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split() for line in lines)}
    files = {f"./{p.relative_to(folder)}": p for p in folder.rglob("*") if p.is_file()}
    del files["./SHA256SUMS"]
    assert listed == {
        name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()
    }
    for package in {p.parent for p in files.values() if p.suffix == ".js"}:
        assert (package / "LICENSE").is_file()
