"""The reference pages: API from docstrings, glossary, status."""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import book_reference
import jax
import pytest
from jaxtyping import Array, Float, Int

import ssdlib
from ssdlib.__main__ import parsers

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
API = {path: path.read_text() for path in sorted((BOOK / "api").glob("*.md"))}


def shown(text):
    """Names that an API page shows."""
    return re.findall(r"^\.\. auto(?:function|class):: ssdlib\.([\w.]+)$", text, re.M)


def test_every_public_name_is_on_one_api_page():
    names = [name for text in API.values() for name in shown(text)]
    assert set(ssdlib.__all__) <= set(names)
    assert "compiler.hlo.Compiled" in names and len(names) == len(set(names))


def test_every_api_page_is_in_the_table_of_contents_and_shows_something():
    toc = (ROOT / "_toc.yml").read_text()
    for path, text in API.items():
        assert f"file: book/api/{path.stem}\n" in toc
        assert shown(text) or ".. command::" in text


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_every_argument_on_a_page_is_described(path):
    """By its docstring, by the table of meanings, or by the formula that names it."""
    for name in shown(API[path]):
        place, _, last = f"ssdlib.{name}".rpartition(".")
        obj = getattr(importlib.import_module(place), last)
        if inspect.isfunction(obj):
            text = inspect.getdoc(obj)
            names = set(inspect.signature(obj).parameters) - {"limits", "options"}
            known = {n for n in names if re.search(rf"\b{n}\b", text)}
            assert names - known <= book_reference.MEANING.keys(), name


def test_every_command_is_on_the_page_of_the_command_line():
    text = (BOOK / "api/command_line.md").read_text()
    parser, commands = parsers()
    assert re.findall(r"^\.\. command:: (\w+)$", text, re.M) == list(commands)
    for name, command in commands.items():
        assert f"{{{','.join(commands)}}}" in parser.format_help()
        table = "\n".join(book_reference.options(name))
        words = re.findall(r"^  (--[\w-]+)", command.format_help(), re.M)
        assert len(words) >= 5 and all(f"``{word}``" in table for word in words)
    for line in re.findall(r"^python -m ssdlib (.*)$", text, re.M):
        parser.parse_args(shlex.split(line))  # the examples are valid


def test_every_option_says_what_it_is():
    for command in parsers()[1].values():
        assert all(action.help for action in command._actions)


@pytest.mark.parametrize("name", ssdlib.__all__)
def test_a_signature_on_an_api_page_holds_names_and_the_table_shapes(name):
    obj = getattr(ssdlib, name)
    lines = inspect.getdoc(obj).splitlines()
    signature = book_reference.signature(None, "", name, obj, None, "()", None)[0]
    book_reference.docstring(None, "", name, obj, None, lines)
    text = "\n".join(lines)
    assert not re.search(r"jaxtyping|\bArray\b", signature + text)
    if inspect.isfunction(obj) and name != "compile_for":
        for argument, p in inspect.signature(obj).parameters.items():
            assert f"* - ``{argument}``\n" in text or p.annotation is p.empty
            assert re.search(rf"\b{argument}\b", signature)


@pytest.mark.parametrize(
    "annotation, words",
    [
        (Float[Array, "b T H P"], "float (b, T, H, P)"),
        (Int[Array, "b"] | None, "integer (b)"),
        (Float[Array, "H"] | Float[Array, "b T H"], "float (H) or (b, T, H)"),
        (Float[Array, "*batch T"], "float (…, T)"),
        (tuple[Float[Array, "b V"], ssdlib.Cache], "float (b, V), Cache"),
        (dict[str, int], "dict of str, int"),
        (tuple[str, ...], "tuple of str"),
        (str | Path, "str or Path"),
        (jax.Array, "array"),
        ("Mamba2Config", "Mamba2Config"),
    ],
)
def test_an_annotation_reads_as_kind_and_shape(annotation, words):
    assert book_reference.kind(annotation) == words


def test_the_text_of_a_docstring_keeps_its_signs():
    assert book_reference.markup("T 2⁻⁴⁸ Σ|log_a|, fn(*args)") == (
        r"T 2⁻⁴⁸ Σ\|log\_a\|, fn(\*args)"
    )
    assert book_reference.markup("`x`s by `load`.") == (
        r"``x``\ s by :py:obj:`load <ssdlib.load>`."
    )
    formula = ["With U:", "", "    y_t = h_t C_t", "", "where"]
    assert "    y_t = h_t C_t" in book_reference.paragraphs(formula)
    assert "::" in book_reference.paragraphs(formula)


def test_a_field_has_its_comment_and_its_default():
    lines = inspect.getdoc(ssdlib.Mamba2Config).splitlines()
    text = "\n".join(book_reference.fields(ssdlib.Mamba2Config, lines))
    assert "   * - ``head_dim``\n     - int\n     - P; ``64`` if not given" in text
    assert "   * - ``d_model``\n     - int\n     - width of the residual" in text


def glossary():
    """(term, definition) pairs of the glossary."""
    text = (BOOK / "glossary.md").read_text()
    body = re.search(r":::\{glossary\}\n(.*?):::", text, re.S)[1]
    return re.findall(r"^\*\*(.+)\*\*\n((?:  .*\n)+)", body, re.M)


def test_the_glossary_is_sorted_short_and_points_to_chapters():
    terms = [term.lower() for term, _ in glossary()]
    assert terms == sorted(set(terms)) and len(terms) >= 40
    for term, text in glossary():
        chapters = re.findall(r"Chapter \[(\d+)\]\((\w+)\.ipynb\)", text)
        assert len(chapters) == 1, term
        (number, slug), prose = chapters[0], text.split(" Chapter [")[0]
        assert (BOOK / f"{slug}.ipynb").exists() and int(number) == int(slug[:2])
        assert len(prose.split()) <= 40 and prose.count(". ") <= 2


def test_a_term_of_the_glossary_occurs_in_the_chapter_that_it_names():
    for term, text in glossary():
        slug = re.search(r"\]\((\w+)\.ipynb\)", text)[1]
        cells = json.loads((BOOK / f"{slug}.ipynb").read_text())["cells"]
        chapter = "\n".join("".join(cell["source"]) for cell in cells).lower()
        word = term.lower().rstrip("e")  # donate, donated, donating
        assert word in chapter or word.replace(" ", "-") in chapter, f"{term}: {slug}"


def test_the_introduction_links_terms_to_the_glossary():
    cells = json.loads((BOOK / "intro.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    linked = set(re.findall(r"\]\(glossary\.md#([\w-]+)\)", text))
    words = {term.lower().replace(" ", "-") for term, _ in glossary()}
    assert len(linked) >= 5 and linked <= words


def test_links_between_pages_name_files_so_that_jupyterlab_and_github_follow_them():
    link = re.compile(r"\]\((?!\w+:)([^)\s#]+)(?:#[\w-]+)?\)")
    pages = [p for p in BOOK.rglob("*") if p.suffix in (".md", ".ipynb")]
    found = 0
    for page in pages:
        text = page.read_text()
        if page.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            prose = [c for c in cells if c["cell_type"] == "markdown"]
            text = "\n".join("".join(cell["source"]) for cell in prose)
        for target in link.findall(text):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
            found += 1
    assert found > 100


@pytest.mark.filterwarnings("ignore")  # of what Sphinx imports
def test_the_status_page_names_versions_and_hardware():
    from book_status import BuiltWith

    rows = dict(BuiltWith.rows(None))
    assert rows["jax"] == jax.__version__
    assert rows["Device"] == jax.devices()[0].device_kind
    assert rows["Host"].endswith("cores") and {"python", "Sphinx", "Time"} <= set(rows)
    text = (BOOK / "status.md").read_text()
    assert "{built-with}" in text and "{chapter-times}" in text


def test_the_map_of_the_introduction_holds_every_chapter():
    cells = json.loads((BOOK / "intro.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    stops = re.search(r"^stops = \((.*?)^\)", text, re.M | re.S)[1]
    chapters = re.findall(r"file: book/(\d+)_", (ROOT / "_toc.yml").read_text())
    assert [int(n) for n in re.findall(r"\d+", stops)] == [int(n) for n in chapters]
