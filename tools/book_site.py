"""Sphinx extension: the site around the pages.

The first page opens with a picture of what the book is about; every page tells search
engines and previews what it holds; short titles lead to the pages before and after; and
a page says so when an address leads nowhere.
"""

import html
import re
import textwrap
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from book_pages import number
from docutils import nodes

import ssdlib
from ssdlib.beyond import transformer
from ssdlib.companion.figures import COLOR

LENGTHS = [2**k for k in range(10, 17)]  # tokens read
INK, PAPER = "#1b2530", "#ffffff"
BLUE, ORANGE = COLOR["state"], COLOR["attention"]
SENTENCE = (
    "A language model whose memory does not grow with the text: derived, checked and "
    "compiled for CPU, GPU and TPU, in plain JAX."
)
PREVIEW = "preview.png"


def sizes() -> tuple[float, list[float]]:
    """MiB of the published 130m's cache, and of keys and values after each length.

    Those of a Transformer with as many weights, as in the introduction.
    """
    config = ssdlib.Mamba2Config.preset("130m")
    cache = jax.eval_shape(lambda: ssdlib.init_cache(config, 1))
    card = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    twin = transformer.AttentionConfig.like(config)
    row = 2 * 4 * twin.n_layers * twin.n_kv_heads * twin.head_dim  # float32, a token
    return card / 2**20, [row * T / 2**20 for T in LENGTHS]


def amount(mib: float) -> str:
    """Words for a size in MiB."""
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def drawing() -> str:
    """An SVG: at the left sheets pile up with the text, at the right stays one card."""
    card, stacks = sizes()
    sheets, cards = [], []
    for i in range(len(LENGTHS)):
        x = 4 + 25 * i
        sheets += [
            f'<rect x="{x}" y="{148 - 4 * j}" width="20" height="3"/>'
            for j in range(max(1, 2**i // 2))
        ]
        cards += [f'<rect x="{x + 210}" y="144" width="20" height="7" rx="2"/>']
    span = f"{LENGTHS[0]:,} … {LENGTHS[-1]:,} tokens"
    label = (
        f"After {LENGTHS[0]:,} to {LENGTHS[-1]:,} tokens: keys and values pile up to "
        f"{amount(stacks[-1])}; the state stays at {amount(card)}."
    )
    return (
        f'<svg viewBox="0 0 390 185" role="img" aria-label="{label}">'
        f'<g class="stack">{"".join(sheets)}</g><g class="card">{"".join(cards)}</g>'
        f'<text x="4" y="34" class="stack big">{amount(stacks[-1])}</text>'
        '<text x="4" y="54">keys, values</text>'
        f'<text x="214" y="112" class="card big">{amount(card)}</text>'
        '<text x="214" y="132">a state of fixed size</text>'
        f'<text x="4" y="174">{span}</text><text x="214" y="174">{span}</text></svg>'
    )


def hero(app, page: str, body: str) -> str:
    """The picture, a sentence and three ways on, to what there is of them."""
    chapters = {number(name): name for name in app.env.found_docs}
    ways = {"Read it in an hour": chapters.get(1), "See the verdicts": chapters.get(10)}
    link = app.builder.get_relative_uri
    ways = [(words, link(page, name)) for words, name in ways.items() if name]
    if 'id="run-it"' in body:
        ways.insert(1, ("Run it", "#run-it"))
    links = " ".join(f'<a href="{url}">{words}</a>' for words, url in ways)
    return (
        f'<div class="hero">{drawing()}<p class="hero-sentence">{SENTENCE}</p>'
        f'<p class="hero-ways">{links}</p></div>'
    )


def preview(path: Path) -> None:
    """The picture that a link to the book shows elsewhere: 1,200 by 630 pixels."""
    card, stacks = sizes()
    with plt.rc_context({**plt.rcParamsDefault, "font.size": 11}):
        figure, ax = plt.subplots(figsize=(6, 3.15), facecolor=PAPER)
        ax.bar(range(len(LENGTHS)), stacks, width=0.8, color=ORANGE)
        ax.axis("off")
        lines = [("State Space Duality,\nCompiled", INK, 22, 0.82)]
        lines += [(f"{amount(stacks[-1])} of keys and values", ORANGE, 12, 0.66)]
        span = f"after {LENGTHS[-1]:,} tokens"
        lines += [(f"or {amount(card)} of state, {span}", BLUE, 12, 0.56)]
        for words, color, size, y in lines:
            ax.text(-0.4, y * stacks[-1], words, color=color, size=size)
        figure.savefig(path, dpi=200, metadata={"Software": None})
        plt.close(figure)


def head(app, pagename, templatename, context, doctree):
    """Description and preview of a page, short titles of its neighbors, the hero."""
    _, *neighbors = app.builder.relations.get(pagename, (None, None, None))
    for way, name in zip(("prev", "next"), neighbors, strict=True):
        item = app.config.external_site_map.get(name) if name else None
        if item is not None and item.title and context.get(way):
            context[way]["title"] = item.title
    if doctree is None:
        return
    paragraphs = (node.astext() for node in doctree.findall(nodes.paragraph))
    about = " ".join(next(paragraphs, SENTENCE).removeprefix("Goal.").split())
    if pagename == app.config.root_doc:
        about = SENTENCE
        body, new = context["body"], hero(app, pagename, context["body"])
        context["body"] = body.replace("</h1>", f"</h1>{new}", 1)
    picture = context["pathto"](f"_static/{PREVIEW}", resource=True)
    base = app.config.html_baseurl
    tags = {"name": {"description": about}, "property": {"og:description": about}}
    tags["property"] |= {"og:title": re.sub("<.*?>", "", context["title"])}
    tags["property"] |= {"og:type": "website", "og:site_name": app.config.html_title}
    tags["property"]["og:image"] = f"{base}_static/{PREVIEW}" if base else picture
    tags["name"]["twitter:card"] = "summary_large_image"
    for kind, values in tags.items():
        for key, value in values.items():
            short = textwrap.shorten(html.unescape(value), 300, placeholder=" …")
            value = html.escape(value if key == "og:image" else short)
            context["metatags"] += f'\n<meta {kind}="{key}" content="{value}" />'


def missing(app):
    """404.html, which a host serves for every address that leads nowhere."""
    first = app.builder.get_target_uri(app.config.root_doc)
    body = (
        "<h1>This page does not exist</h1><p>The address may be of an older edition: "
        f'chapters have moved. Begin at the <a href="{first}">first page</a>, or '
        '<a href="search.html">search</a>.</p>'
    )
    # The host answers at any depth, so links start from the site where that is known.
    base = app.config.html_baseurl
    tags = f'<base href="{base}" />' if base else ""
    yield "404", {"title": "Not found", "body": body, "metatags": tags}, "page.html"


def finish(app, failure):
    """Draw the preview into the finished site."""
    if failure is None and app.builder.format == "html":
        preview(Path(app.outdir) / "_static" / PREVIEW)


def setup(app):
    """Register with Sphinx."""
    app.connect("html-page-context", head)
    app.connect("html-collect-pages", missing)
    app.connect("build-finished", finish)
    return {"version": "1", "parallel_read_safe": True}
