"""Sphinx extension: the API pages, from docstrings and jaxtyping signatures.

autodoc would print `x: jaxtyping.Float[Array, 'b T H P']` for every argument. Here a
signature holds names and defaults only, and a table below the first sentence gives each
argument its kind and shape, `float (b, T, H, P)`. Classes get such a table of fields,
with the comments of the source. Docstrings are plain text with `code` in backticks.
`.. command:: NAME` describes a command of `python -m ssdlib` from its parser. Also lets
pages link to words of the glossary.
"""

import dataclasses
import inspect
import re
import types
import typing

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import ssdlib
from ssdlib.__main__ import parsers

FIELD = re.compile(r"^    (\w+): [^#]*?(?:= *([^#]*?))? *(?:# *(.*))?$", re.M)
TOLD = re.compile(r"(\w+): +(\S.*)")
KINDS = {"Float": "float", "Int": "integer"}
# What an argument is wherever it occurs; a docstring says what is special.
MEANING = {
    "A": "decay of each head; its step is dt A",
    "B": "where a token writes",
    "B_t": "where the token writes",
    "C": "where a token reads",
    "C_t": "where the token reads",
    "D": "the part of x that goes straight to y",
    "b": "texts at once",
    "batch": "texts at once",
    "batch_size": "texts at once",
    "beta": "how strongly a token writes",
    "block": "tokens a round trip",
    "cache": "what was read before; nothing if not given",
    "caches": "one after each token",
    "chunk_size": "Q, tokens a chunk",
    "claims": "those of `paper.json`",
    "command": "written into the record",
    "config": "the sizes of the model",
    "donate_argnums": "arguments whose memory the result may take",
    "dt": "step of each token",
    "dt_t": "step of the token",
    "dtype": "of matrices and activations",
    "eos_id": "the token that ends a text; no text ends if not given",
    "evidence": "what is known",
    "folder": "where to",
    "h": "the state before",
    "h0": "the state before; empty if not given",
    "itemsize": "bytes a weight",
    "k": "where a token writes",
    "key": "of `jax.random`",
    "lengths": "tokens of each row that are no padding; all if not given",
    "log_a": "logarithm of the decay",
    "max_new_tokens": "how many tokens to write",
    "mesh": "of `make_mesh`",
    "name": "of the model, in the record",
    "params": "the parameters of the model",
    "path": "the file",
    "prompt": "tokens to begin with",
    "q": "where a token reads",
    "revision": "of a repository of the hub",
    "source": "folder, file, or name on the hub",
    "state": "the state before; empty if not given",
    "temperature": "0 takes the most probable token",
    "token": "the token to read",
    "tokens": "the tokens to read",
    "top_k": "draw from so many tokens at most",
    "top_p": "draw from the tokens that share this probability",
    "v": "what a token writes",
    "x": "what a token writes",
    "x_t": "what the token writes",
}
OWN = {name: getattr(ssdlib, name) for name in ssdlib.__all__}


def shape(letters: str) -> str:
    """ "b T H" -> "(b, T, H)"; any leading axes are three dots."""
    return f"({', '.join('…' if d.startswith('*') else d for d in letters.split())})"


def kind(annotation) -> str:
    """What a reader needs of an annotation: `float (b, T)`, `int`, `Cache`."""
    if hasattr(annotation, "dim_str"):  # a jaxtyping array
        name = annotation.__name__.split("[")[0]
        return f"{KINDS.get(name, name.lower())} {shape(annotation.dim_str)}"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = dict.fromkeys(kind(a) for a in args if a is not type(None))
        words = [k.split(" ", 1) for k in kinds]
        if len(words) > 1 and all(w[0] == words[0][0] and len(w) == 2 for w in words):
            return f"{words[0][0]} " + " or ".join(w[1] for w in words)
        return " or ".join(kinds)
    if origin is tuple and Ellipsis not in args:
        return ", ".join(kind(a) for a in args)
    if origin is not None:  # dict[str, int], Iterator[...]
        inner = ", ".join(kind(a) for a in args if a is not Ellipsis)
        return f"{origin.__name__} of {inner}" if inner else origin.__name__
    if isinstance(annotation, str):
        return annotation.split(".")[-1].strip("\"'")
    name = getattr(annotation, "__name__", str(annotation)).split(".")[-1]
    return {"Array": "array", "ndarray": "array"}.get(name, name)


def link(name: str) -> str:
    """A code word; where it names something public, a link to it."""
    if name in OWN:
        return f":py:obj:`{name} <ssdlib.{name}>`"
    return f"``{name}``"


def markup(text: str) -> str:
    """A docstring's plain text as reStructuredText: `code` kept, the rest escaped."""
    parts = re.split(r"`([^`]+)`", text)
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", p) for p in parts[::2]]
    for i in range(1, len(parts), 2):  # no letter may touch a role: "\ " parts them
        parts[i] = link(parts[i]) + r"\ " * parts[i + 1][:1].isalnum()
    return "".join(parts)


def known(text: str) -> str:
    """A kind, with links to the library's own classes."""
    return re.sub(r"\b[A-Z]\w+\b", lambda m: link(m[0]) if m[0] in OWN else m[0], text)


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """A list-table of (name, kind, remark), without remarks if there are none."""
    width = 3 if any(remark for *_, remark in rows) else 2
    lines = [".. list-table::", "   :class: api", ""] if rows else []
    for row in rows:
        lines += [f"   {' ' if i else '*'} - {c}" for i, c in enumerate(row[:width])]
    return [*lines, ""]


def arguments(fn) -> list[str]:
    """The table of a function's arguments and of what it returns.

    A remark says what an argument is, unless the docstring does.
    """
    told = inspect.getdoc(fn) or ""
    signature = inspect.signature(fn)
    rows = []
    for p in signature.parameters.values():
        what = "dtype" if p.name == "dtype" else ""
        if p.annotation is not p.empty:
            what = known(kind(p.annotation))
        if what:
            remark = "" if f"`{p.name}`" in told else MEANING.get(p.name, "")
            rows += [(f"``{p.name}``", what, markup(remark))]
    back = signature.return_annotation
    if back not in (signature.empty, None):
        rows += [("*returns*", known(kind(back)), "")]
    return table(rows)


def fields(cls, lines: list[str]) -> list[str]:
    """The table of a class's fields; takes "name: remark" out of the docstring."""
    told = {m[1]: m[2] for m in map(TOLD.match, lines) if m}
    lines[:] = [line for line in lines if not TOLD.match(line)]
    body = inspect.getsource(cls).split('"""')[-1 if cls.__doc__ is None else 2]
    rows = []
    for name, default, comment in FIELD.findall(body):
        remark = markup(told.get(name, comment))
        if default:
            remark += f"{'; ' if remark else ''}``{default}`` if not given"
        what = known(kind(typing.get_type_hints(cls)[name]))
        rows += [(f"``{name}``", what, remark)]
    return table(rows)


def paragraphs(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText; an indented formula stays as it is typed."""
    out, formula = [], False
    for line in lines:
        if line.startswith("    ") and not formula:
            out += ["", "::", ""]
        elif formula and not line.startswith("    "):
            out += [""]
        formula = line.startswith("    ")
        out += [line if formula else markup(line)]
    return out


def is_record(obj) -> bool:
    """Whether obj is a class with fields: a dataclass or a NamedTuple."""
    named = isinstance(obj, type) and hasattr(obj, "_fields")
    return dataclasses.is_dataclass(obj) or named


def options(name: str) -> list[str]:
    """What a command is for, and the table of its options."""
    parser = parsers()[1][name]
    rows = []
    for action in parser._actions[1:]:  # after --help
        remark = markup(action.help)
        if action.choices:
            remark += f"; one of {', '.join(f'``{c}``' for c in action.choices)}"
        if action.default is not None:
            remark += f"; ``{action.default}`` if not given"
        word = action.option_strings[0] if action.option_strings else action.dest
        rows += [(f"``{word}``", remark, "")]
    about = re.sub(r"--[\w-]+", r"`\g<0>`", parser.description)  # else a dash
    return [markup(about), "", *table(rows)]


class Command(SphinxDirective):
    """`options` of the command that it is given, read at every build."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        node = nodes.container()
        lines = StringList(options(self.arguments[0]), source="")
        self.state.nested_parse(lines, self.content_offset, node)
        return node.children


def signature(app, what, name, obj, options, args, result):
    """Names and defaults; what an array is stands in the table."""
    if is_record(obj):
        return "", None
    if args is None or not callable(obj):
        return None
    plain = inspect.signature(obj)
    drop = [
        p.replace(annotation=p.empty)
        for p in plain.parameters.values()
        if p.name != "self"
    ]
    bare = str(plain.replace(parameters=drop, return_annotation=plain.empty))
    bare = re.sub(r"\*\*\w+", "...", bare)  # two asterisks look like stray Markdown
    bare = re.sub(r"\w+Path\('.*?([\w.]+)'\)", r"'.../\1'", bare)  # of this machine
    return re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", bare), None


def docstring(app, what, name, obj, options, lines):
    """First paragraph and a formula below it, table, the rest."""
    middle = []
    if is_record(obj):
        middle = fields(obj, lines)
    elif callable(obj):
        middle = arguments(obj)
    end = lines.index("") if "" in lines else len(lines)
    if lines[end + 1 :] and lines[end + 1].startswith("    "):
        end = lines.index("", end + 1)
    lines[:] = [*paragraphs(lines[:end]), "", *middle, *paragraphs(lines[end:])]


def glossary(app, doctree):
    """Let [mask](glossary.md#mask) find its word, as MyST lets it find a heading.

    A link that names the file also works in JupyterLab and on GitHub.
    """
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for word in doctree.findall(nodes.term):
        slug = "-".join(word.astext().lower().split())
        slugs[slug] = (word.line, word["ids"][0], word.astext())


def setup(app):
    """Register with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("command", Command)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("doctree-read", glossary)
    return {"version": "1", "parallel_read_safe": True}
