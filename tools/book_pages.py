"""Sphinx extension: what a page of the site has and its notebook need not know.

A chapter's number, from its file name, stands before its title. The cell that imports
everything is folded away, and every fold says what it holds. "chapter 8" is a link, and
so are an equation's number, an arXiv number, and a word of the glossary where a page
first uses it, which says what it means when a mouse rests on it. Hints to the code
formatter are left out.
"""

import re

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

CHAPTER = re.compile(r"book/(\d\d)_\w+")
SETUP = "try:\n    import ssdlib"
PLOT = re.compile(r"\b(plt\.|show\(|explore\()")
LIST = r"\d\d?(?:, \d\d?)*(?:,? (?:and|or|to) \d\d?)?\b"  # 8; 6, 8 and 9
PLACE = re.compile(
    rf"\b(?P<chapters>[Cc]hapters? {LIST})"
    rf"|\b(?P<equations>[Ee]quations? {LIST})(?! of (the|chapter))"
    r"|(?:arXiv[: ]\s?)?\b(?P<paper>(?:0[7-9]|[12]\d)(?:0[1-9]|1[0-2])\.\d{5})\b"
)
# Not prose; the works that close a chapter have chapters and equations of their own.
APART = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.math)
APART += (nodes.math_block, nodes.raw, nodes.term)
EVERYDAY = set("associative cycle draft gate group head host layout peak slice".split())
EVERYDAY |= {"state", "static", "tied", "token"}  # words that need no link


def number(docname: str) -> int | None:
    """The number of a chapter, None for other pages."""
    found = CHAPTER.fullmatch(docname)
    return int(found[1]) if found else None


class Numbers(SphinxTransform):
    """A chapter's number before its title, and an anchor at every numbered equation."""

    default_priority = 400

    def apply(self, **options):
        title = next(iter(self.document.findall(nodes.title)), None)
        if title is not None and (n := number(self.env.docname)):
            title.insert(0, nodes.Text(f"{n}. "))
        anchors = set()
        for block in self.document.findall(nodes.math_block):
            tags = re.findall(r"\\tag\{(\w+)\}", block.astext())
            new = {f"equation-{tag}" for tag in tags} - anchors
            block["ids"] += sorted(new)
            rows = len(re.findall(r"\\\\|\\cr\b", block.astext())) + 1
            block["classes"].append(f"rows-{min(rows, 4)}")  # room until it is typeset
            anchors |= new


class Folds(SphinxPostTransform):
    """Fold the cell that imports; say of each fold what it holds."""

    default_priority = 190  # before MyST-NB folds

    def run(self, **options):
        for cell in self.document.findall(nodes.container):
            if cell.get("nb_element") != "cell_code" or not cell.children:
                continue
            code, held = cell.children[0].astext(), "the code"
            if code.startswith(SETUP):
                cell["hide_mode"], held = "input", "the imports"
                cell["classes"].append("setup")
            elif cell.get("hide_mode") == "all":
                held = "an answer"
            elif PLOT.search(code):
                held = "the code of the plot"
            cell["prompt_show"], cell["prompt_hide"] = f"Show {held}", f"Hide {held}"


class RunTime(SphinxPostTransform):
    """The time that a chapter took in this build, instead of about which."""

    default_priority = 800

    def run(self, **options):
        data = NbMetadataCollector.get_doc_data(self.env).get(self.env.docname, {})
        seconds = data.get("exec_data", {}).get("runtime")
        for word in self.document.findall(nodes.strong):
            if word.astext() == "Runs in" and seconds is not None:
                text = word.next_node(nodes.Text, descend=False, siblings=True)
                took = max(5, 5 * round(seconds / 5))
                took = f"{took} seconds where this page was built"
                new = re.sub("about .*? CPU cores", took, text.astext(), count=1)
                text.parent.replace(text, nodes.Text(new))


class Links(SphinxPostTransform):
    """Let what names a chapter, an equation, a paper or a word lead there."""

    default_priority = 900

    def run(self, **options):
        for block in self.document.findall(nodes.literal_block):
            bare = re.sub(r" *# (fmt: \w+|noqa.*)", "", block.rawsource)
            if bare != block.rawsource:
                block.rawsource, block[:] = bare, [nodes.Text(bare)]
        self.chapters = {number(name): name for name in self.env.found_docs}
        blocks = self.document.findall(nodes.math_block)
        self.anchors = {name for block in blocks for name in block["ids"]}
        self.words, self.cites = self.unused_words(), False
        self.outputs()
        for text in list(self.document.findall(nodes.Text)):
            around = [*_ancestors(text)]
            if any(isinstance(node, APART) for node in around):
                continue
            ids = [name for node in around for name in node.get("ids", ())]
            self.cites = any(name.startswith("further-reading") for name in ids)
            new = self.places(text.astext())
            if not any(isinstance(node, nodes.table) for node in around):
                new = [
                    piece
                    for old in new
                    for piece in (self.first_uses(old) if _plain(old) else [old])
                ]
            if not all(map(_plain, new)):
                new = [nodes.Text(n) if _plain(n) else n for n in new]
                text.parent.replace(text, new)
        self.meanings()

    def meanings(self) -> None:
        """The title of each link to the glossary: what its word means, in one line."""
        pages = [page for page in self.env.found_docs if page.endswith("/glossary")]
        terms = (t for p in pages for t in self.env.get_doctree(p).findall(nodes.term))
        terms = {name: term.parent for term in terms for name in term["ids"]}
        for link in self.document.findall(nodes.reference):
            page, _, name = link.get("refuri", "").partition("#")
            if page.endswith("glossary.html") and name in terms:
                meaning = terms[name].children[-1].astext()
                link["reftitle"] = re.sub(r" Chapters? [^.]*\.$", "", meaning)

    def unused_words(self) -> dict:
        """Word -> (page, anchor) of the glossary, less those that the page links."""
        here = self.env.docname
        if not number(here) and here != self.config.root_doc:
            return {}
        known = self.env.get_domain("std").get_objects()
        words = {
            name: (page, anchor)
            for name, _, kind, page, anchor, _ in known
            if kind == "term" and name not in EVERYDAY
        }
        links = self.document.findall(nodes.reference)
        linked = {link.get("refuri", "").partition("#")[2] for link in links}
        return {word: at for word, at in words.items() if at[1] not in linked}

    def places(self, text: str) -> list:
        """The text, cut at chapters, equations and papers, which become links."""
        parts, end, before = [], 0, None
        for found in PLACE.finditer(text):
            between = text[end : found.start()]
            there = before if between == ", " else None  # "chapter 6, equation 5"
            parts += [between, *self.place(found, there)]
            before, end = found["chapters"], found.end()
        return [*parts, text[end:]]

    def outputs(self) -> None:
        """Links in what a cell displays as HTML: tables and cards."""
        for raw in self.document.findall(nodes.raw):
            if raw["format"] == "html" and "<svg" not in raw.astext():
                parts = re.split(r"(<[^>]*>)", raw.astext())
                parts[::2] = ["".join(map(_html, self.places(p))) for p in parts[::2]]
                raw[:] = [nodes.Text("".join(parts))]

    def place(self, found, there: str | None) -> list:
        if paper := found["paper"]:
            uri = f"https://arxiv.org/abs/{paper}"
            return [nodes.reference("", found[0], refuri=uri, internal=False)]
        if self.cites:
            return [found[0]]
        pieces, last = [], 0
        there = there and self.chapters.get(int(re.search(r"\d+", there)[0]))
        for digits in re.finditer(r"(?:[CcEe]\w+ )?(\d+)", found[0]):
            chapter, n = bool(found["chapters"]), int(digits[1])
            pieces += [found[0][last : digits.start()]]
            pieces += [self.numbered(digits[0], n, chapter, there)]
            last = digits.end()
        return pieces

    def numbered(self, words: str, n: int, chapter: bool, there: str | None):
        if chapter and n in self.chapters:
            return self.link(self.chapters[n], "", words)
        if not chapter and there:
            return self.link(there, f"equation-{n}", words)
        if not chapter and f"equation-{n}" in self.anchors:
            return self.link(self.env.docname, f"equation-{n}", words)
        return words

    def first_uses(self, text: str) -> list:
        """The text, cut at words of the glossary that the page has not used before."""
        for word, at in sorted(self.words.items(), key=lambda item: -len(item[0])):
            if found := re.search(rf"\b{re.escape(word)}s?\b", text, re.I):
                del self.words[word]
                link = self.link(*at, found[0])
                link["classes"].append("word")
                before, after = text[: found.start()], text[found.end() :]
                return [*self.first_uses(before), link, *self.first_uses(after)]
        return [text]

    def link(self, page: str, anchor: str, words: str):
        here = self.env.docname
        return make_refnode(self.app.builder, here, page, anchor, nodes.Text(words))


def _ancestors(node):
    while (node := node.parent) is not None:
        yield node


def _html(piece) -> str:
    """A piece of text, or a link, as HTML."""
    if _plain(piece):
        return piece
    url = piece.get("refuri") or f"#{piece['refid']}"
    return f'<a href="{url}">{piece.astext()}</a>'


def _plain(piece) -> bool:
    return isinstance(piece, str)


def setup(app):
    """Register with Sphinx."""
    app.add_transform(Numbers)
    app.add_post_transform(Folds)
    app.add_post_transform(RunTime)
    app.add_post_transform(Links)
    return {"version": "1", "parallel_read_safe": True}
