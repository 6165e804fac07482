"""Run chapters as Colab does: its versions, its install cell, no checkout beside them.

    python tools/imitate_colab.py [--image cpu|gpu|tpu] [book/10_results.ipynb ...]
    python tools/imitate_colab.py --renew

Makes an environment of the versions in tools/colab/IMAGE.txt, copies the chapters to an
empty folder and runs them there, JAX_PLATFORMS unset. Their first cell installs the
library from a commit of this checkout. Fails if a chapter does, or if one of `KEPT`
is not what it was before: then a reader would have lost the accelerator. Without a
chapter it only installs. Needs a network, and minutes. `--record` writes what each
chapter took to book/results/colab.json: processor seconds, which a busy machine changes
little. `--renew` fetches Colab's own lists and rewrites the versions in tools/colab.
"""

import argparse
import datetime
import glob
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import repository
import rows

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "tools/colab"
PATH = ROOT / "book/results/colab.json"
KEY = "chapter", "image"
IMAGES = {"cpu": "", "gpu": ".gpu", "tpu": ".tpu"}  # their ends in pip-freeze.txt
KEPT = ["jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "numpy"]
KEPT += ["ipywidgets", "ipython"]
SOURCE = "googlecolab/backend-info"
RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(nb, timeout=900, kernel_name="python3").execute()
code = [c for c in nb.cells if c.cell_type == "code"]
print(*(o.get("text", "") for o in code[0].outputs if o.get("name") == "stdout"))
"""
WHERE = "import ssdlib; print(ssdlib.__file__)"
VERSIONS = """
import json, sys
from importlib import metadata
found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))
"""
RECORDS = """
import json, pathlib, jsonschema
from ssdlib.measure.record import RUNS
schema = json.loads((RUNS / "schema.json").read_text())
paths = sorted(pathlib.Path("measured").glob("*.json"))
assert paths, "no record was written"
for path in paths:
    jsonschema.validate(json.loads(path.read_text()), schema)
"""


def main() -> None:
    """Install, run, check; raises where one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", choices=IMAGES, default="tpu")
    parser.add_argument("--at", type=Path, help="keep the environment in this folder")
    parser.add_argument("--record", action="store_true", help="write what it took")
    parser.add_argument("--renew", action="store_true", help="rewrite tools/colab")
    parser.add_argument("chapters", nargs="*", type=Path)
    args = parser.parse_args()
    if args.renew:
        return renew(fetch)
    with tempfile.TemporaryDirectory() as folder:
        at, names = args.at or Path(folder) / "env", [p.stem for p in args.chapters]
        took = imitate(args.image, names, Path(folder), at.absolute())
    if args.record:
        rows.put(PATH, KEY, took)


def imitate(image: str, names: list[str], folder: Path, at: Path) -> list[dict]:
    """Run these chapters in an environment `at`, made if need be; a row each."""
    python, content = environment(image, at), folder / "content"
    content.mkdir()
    address, copy = commit(folder / "copy")
    keep = {k: os.environ[k] for k in ("HOME", "PATH", "LANG") if k in os.environ}
    here = dict(cwd=content, env=keep, check=True)

    def ask(code, *words):
        call = [python, "-c", code, *words]
        return subprocess.run(call, capture_output=True, text=True, **here).stdout

    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "ssdlib"], **here)
    before = json.loads(ask(VERSIONS, *KEPT))
    if not names:
        what = f"ssdlib[chapters] @ git+{address}"
        subprocess.run([python, "-m", "pip", "install", "-q", what], **here)
    took = {}
    for name in names:
        shutil.copy(copy / f"book/{name}.ipynb", content)
        start, worked = time.time(), processor_seconds()
        subprocess.run([python, "-W", "ignore", "-c", RUN, f"{name}.ipynb"], **here)
        took[name] = round(processor_seconds() - worked, 1)
        all_ = time.time() - start
        print(f"{name}: {all_:.0f} s, {took[name]:.0f} of a processor", flush=True)
    changes = changed(before, json.loads(ask(VERSIONS, *KEPT)))
    if changes:
        raise SystemExit(f"the install cell changed the {image} image: {changes}")
    if "site-packages" not in ask(WHERE):
        raise SystemExit("the chapters did not run with the installed library")
    if "10_results" in names:
        ask(RECORDS)
    print(f"as before on the {image} image:", versions(before))
    kept = {name: version for name, version in before.items() if version}
    facts = {"date": datetime.date.today().isoformat(), "versions": kept}
    return [
        dict(zip(KEY, (name, image), strict=True)) | {"processor": seconds} | facts
        for name, seconds in took.items()
    ]


def processor_seconds() -> float:
    """What the programs that ended have worked, those that they started too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def changed(before: dict, after: dict) -> str:
    """What is not the version that it was, in words; empty if all is."""
    pairs = ((n, old, after.get(n)) for n, old in before.items() if old != after.get(n))
    return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs)


def versions(found: dict) -> str:
    """Names and versions in words."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def environment(image: str, at: Path) -> Path:
    """The Python of an environment with exactly the image's versions."""
    text = (LISTS / f"{image}.txt").read_text()
    made, python = at / "list", at / "bin/python"
    wanted = re.search(r"Python (\d\.\d+)", text)[1]
    if not made.exists() or made.read_text() != text:
        subprocess.run([find_python(wanted), "-m", "venv", "--clear", at], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "-r", LISTS / f"{image}.txt"], check=True)
        made.write_text(text)
    return python


def find_python(wanted: str) -> str:
    """A Python of this version; if there is none this one, and says so."""
    tries = [shutil.which(f"python{wanted}")]
    if uv := shutil.which("uv"):
        found = subprocess.run(
            [uv, "python", "find", wanted], capture_output=True, text=True
        )
        tries += [found.stdout.strip()]
    pyenv = os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")
    tries += glob.glob(f"{pyenv}/versions/{wanted}.*/bin/python")
    check = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, tries):
        done = subprocess.run([python, "-c", check], capture_output=True, text=True)
        if done.stdout.strip() == wanted:
            return python
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"no Python {wanted} on PATH, in uv or pyenv: this is Python {here} instead")
    return sys.executable


def commit(folder: Path) -> tuple[str, Path]:
    """This checkout as a repository of its own, whose chapters know its address."""
    ls = ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(ls, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    address = f"file://localhost{folder}"  # pip 23 takes one without a host for a path
    repository.set_repository(address, folder)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", folder]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "A copy"]):
        subprocess.run([*git, *words], check=True)
    return address, folder


def fetch(name: str) -> str:
    """A file of Colab's lists, or what GitHub says of their last commit."""
    at = f"https://raw.githubusercontent.com/{SOURCE}/main/{name}"
    if name == "commit":
        at = f"https://api.github.com/repos/{SOURCE}/commits/main"
    with urllib.request.urlopen(at, timeout=60) as answer:
        return answer.read().decode()


def renew(fetch, lists: Path = LISTS) -> None:
    """Give every package of the lists the version that Colab has now."""
    last = json.loads(fetch("commit"))
    when = f"{last['sha'][:7]}, {last['commit']['committer']['date'][:10]}"
    for image, end in IMAGES.items():
        path, name = lists / f"{image}.txt", f"pip-freeze{end}.txt"
        title, *old = path.read_text().splitlines()
        now = dict(re.findall(r"^([\w.-]+)==(\S+)$", fetch(name), flags=re.M))
        now = {key.lower().replace("_", "-"): v for key, v in now.items()}
        names = [line.partition("==")[0] for line in old if line[0] != "#"]
        kept = {n: now.get(n.lower().replace("_", "-")) for n in names}
        lines = [title, f"# {SOURCE} {when}, {name}", old[1]]
        lines += [f"{n}=={version}" for n, version in kept.items() if version]
        path.write_text("\n".join(lines) + "\n")
        print(f"{path.name}: {versions({n: kept.get(n) for n in KEPT})}")


if __name__ == "__main__":
    main()
