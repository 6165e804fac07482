"""Text that comes with every CPython: what the small models were trained on."""

import ast
import sysconfig
from pathlib import Path

__all__ = ["corpus"]

SEPARATOR = "\0"  # ends a document; the shipped models' end-of-text byte
SHORTEST = 120  # characters of a docstring


def corpus() -> bytes:
    """Standard library docstrings, then the texts of `pydoc_data.topics`.

    Both come with every CPython, so nothing is downloaded. A paragraph that was seen
    before is dropped: topics quote each other at length, and a held-out tail that
    repeats the training text would prove nothing. The bytes depend on the Python
    version, so record their hash.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for text in [*_docstrings(), *(topics[name] for name in sorted(topics))]:
        fresh = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            documents.append("\n\n".join(fresh) + "\n")
    return SEPARATOR.join(documents).encode()


def _docstrings():
    """Docstrings of the standard library in the order of its files.

    Tests and docstrings of less than `SHORTEST` characters are left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        if skip & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, documented):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    yield text
