"""Tell the book where its repository is, or that nobody knows yet.

    make repository URL=https://github.com/OWNER/NAME      or any other address of git
    make repository URL=none

Writes the launch buttons in _config.yml, the install cell of every notebook, and the
links in CITATION.cff and README.md. May be run again, with the same or a new address.
Launch buttons need GitHub: Colab opens notebooks from there.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+)")
INSTALL = """\
try:
    import ssdlib
except ModuleNotFoundError:
    %pip install -q "ssdlib[chapters] @ git+{}"
    import ssdlib
"""
EXPLAIN = """\
try:
    import ssdlib
except ModuleNotFoundError as error:
    raise SystemExit(
        "ssdlib is not installed: see 'Run it' in the introduction"
    ) from error
"""
ICON = "html:\n  favicon: book/_static/logo.svg\n"
NO_BUTTONS = f"# Not known yet, or not on GitHub: no launch buttons.\n{ICON}"
BUTTONS = f"""\
repository:
  url: {{}}
  branch: main
  path_to_book: "" # the pages' names already start with book/
launch_buttons:
  colab_url: https://colab.research.google.com
{ICON}  baseurl: {{}}
  use_repository_button: true
  use_edit_page_button: true # to the source of the page
"""
COLAB = "https://colab.research.google.com/github/{}/{}/blob/main/book/intro.ipynb"


def set_repository(url: str | None, root: Path = ROOT) -> list[Path]:
    """Write the address, or None for unknown, into the book; returns what changed.

    Raises ValueError for what is no address.
    """
    url = url and checked(url)
    texts = {root / "_config.yml": config, root / "README.md": readme}
    texts |= {root / "CITATION.cff": citation}
    texts |= dict.fromkeys(sorted((root / "book").glob("*.ipynb")), notebook)
    changed = []
    for path, edit in texts.items():
        old = path.read_text()
        new = edit(old, url)
        if new != old:
            path.write_text(new)
            changed += [path]
    return changed


def checked(url: str) -> str:
    """The address without a trailing slash or .git."""
    url = url.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"(https|ssh|file)://[^\s\"'<>]+", url):
        raise ValueError(f"URL: {url!r}; it must be as https://github.com/OWNER/NAME")
    return url


def pages(owner: str, name: str) -> str:
    """Where GitHub Pages serves a repository's book."""
    return f"https://{owner.lower()}.github.io/{name}/"


def config(text: str, url: str | None) -> str:
    """_config.yml with launch buttons for GitHub, without any for other places."""
    buttons = NO_BUTTONS
    if url and (github := GITHUB.fullmatch(url)):
        buttons = BUTTONS.format(url, pages(*github.groups()))
    return between(text, buttons)


def readme(text: str, url: str | None) -> str:
    """README.md with links to the book, or without."""
    links = ""
    if url and (github := GITHUB.fullmatch(url)):
        owner, name = github.groups()
        links = f"[Read the book]({pages(owner, name)}) or [run it in Colab]"
        links = f"{links}({COLAB.format(owner, name)}).\n\n"
    return between(text, links)


def citation(text: str, url: str | None) -> str:
    """CITATION.cff with the address, or without."""
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.M)
    return text if url is None else f"{text}repository-code: {url}\n"


def notebook(text: str, url: str | None) -> str:
    """A notebook whose first code cell installs the library, or says how to."""
    nb = json.loads(text)
    cell = next(c for c in nb["cells"] if c["cell_type"] == "code")
    source = "".join(cell["source"])
    start = EXPLAIN if url is None else INSTALL.format(url)
    head, blank, rest = source.partition("\n\n")
    if not head.startswith("try:\n    import ssdlib\n"):
        raise ValueError("the first code cell of a notebook must import ssdlib")
    cell["source"] = (start.rstrip("\n") + blank + rest).splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def between(text: str, new: str) -> str:
    """The text with what stands between its two marks replaced."""
    marks = r"(^[^\n]*>>> repository[^\n]*\n).*?(^[^\n]*<<< repository)"
    text, n = re.subn(marks, lambda m: m[1] + new + m[2], text, flags=re.M | re.S)
    if n != 1:
        raise ValueError("a file lacks its marks, >>> repository and <<< repository")
    return text


def main() -> None:
    """Set the address that the command line gives and say what changed."""
    if len(sys.argv) != 2 or not sys.argv[1]:
        sys.exit("Give the address: make repository URL=https://github.com/OWNER/NAME")
    try:
        changed = set_repository(None if sys.argv[1] == "none" else sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
    for path in changed:
        print(f"written: {path.relative_to(ROOT)}")
    print(f"{len(changed)} files changed")


if __name__ == "__main__":
    main()
