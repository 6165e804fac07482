"""What it takes to publish: an address for the book, packages, workflows, licences."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import repository
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/Some-Body/a-book"


def tracked():
    """The files of this checkout that git knows or would add."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [p for p in done.stdout.split("\0") if p and (ROOT / p).is_file()]


@pytest.fixture
def copy(tmp_path):
    """A copy of the checkout, without what git ignores."""
    for name in tracked():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def contents(folder):
    """The text of every file that an address is written to."""
    names = ["_config.yml", "README.md", "CITATION.cff"]
    paths = [folder / n for n in names] + sorted((folder / "book").glob("*.ipynb"))
    return {p.name: p.read_text() for p in paths}


def first_cell(text):
    """The source of a notebook's first code cell."""
    cells = json.loads(text)["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_the_address_in_this_tree_is_the_same_everywhere(copy):
    now = re.search(
        r"^repository-code: (.*)$", (copy / "CITATION.cff").read_text(), re.M
    )
    assert repository.set_repository(now and now[1], copy) == []


def test_an_address_is_set_changed_and_taken_back(copy):
    repository.set_repository(None, copy)
    unset = contents(copy)
    assert repository.set_repository(GITHUB, copy)
    once = contents(copy)
    assert all(once[name] != unset[name] for name in unset)
    assert repository.set_repository(f"{GITHUB}.git/", copy) == []  # the same address
    repository.set_repository("https://github.com/other/book", copy)
    assert not any("Some-Body" in text for text in contents(copy).values())
    repository.set_repository(GITHUB, copy)
    assert contents(copy) == once
    repository.set_repository(None, copy)
    assert contents(copy) == unset


def test_an_unset_address_has_no_button_and_a_cell_that_says_what_to_do(copy):
    repository.set_repository(None, copy)
    texts = contents(copy)
    assert "launch_buttons:" not in texts["_config.yml"]
    assert yaml.safe_load(texts["_config.yml"])["html"].keys() == {"favicon"}
    for name, text in texts.items():
        if name.endswith(".ipynb"):
            assert "see 'Run it' in the introduction" in first_cell(text)
            assert "%pip" not in first_cell(text)
    assert "## Run it" in texts["intro.ipynb"]


def test_a_set_address_has_buttons_links_and_cells_that_install(copy):
    repository.set_repository(GITHUB, copy)
    texts = contents(copy)
    config = texts["_config.yml"]
    assert f"\nrepository:\n  url: {GITHUB}\n" in config
    assert "\nlaunch_buttons:\n  colab_url: " in config
    html = yaml.safe_load(config)["html"]  # links to the repository and to the source
    assert html["use_repository_button"] and html["use_edit_page_button"]
    assert "https://some-body.github.io/a-book/" in texts["README.md"]
    assert f"repository-code: {GITHUB}\n" in texts["CITATION.cff"]
    for name, text in texts.items():
        if name.endswith(".ipynb"):
            assert f'"ssdlib[chapters] @ git+{GITHUB}"' in first_cell(text)


def test_style_and_the_readme_hold_with_a_long_address_too(copy, monkeypatch):
    import readme

    repository.set_repository(f"{GITHUB}-whose-name-is-long-enough-to-pass-88", copy)
    for command in (["check"], ["format", "--check"]):
        run = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(run, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    monkeypatch.setattr(readme, "ROOT", copy)
    assert set(readme.figures()) == {"light", "dark"}


def test_an_address_outside_github_has_no_launch_button(copy):
    repository.set_repository("https://git.example.org/x/y", copy)
    assert "launch_buttons:" not in (copy / "_config.yml").read_text()
    assert "git+https://git.example.org/x/y" in first_cell(
        contents(copy)["intro.ipynb"]
    )


@pytest.mark.parametrize("url", ["github.com/a/b", "https://x y", 'https://a"b', "-q"])
def test_what_is_no_address_is_refused_and_nothing_is_written(copy, url):
    before = contents(copy)
    with pytest.raises(ValueError, match="URL: "):
        repository.set_repository(url, copy)
    assert contents(copy) == before


def test_citation_and_changelog_name_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert "Apache-2.0" in citation and "CC-BY-4.0" in citation
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_code_and_text_have_their_licences():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    text = (ROOT / "book/LICENSE").read_text()
    assert text.startswith("Creative Commons Attribution 4.0 International")
    readme = (ROOT / "README.md").read_text()
    assert "(LICENSE)" in readme and "(book/LICENSE)" in readme


@pytest.mark.skipif(not find_spec("check_jsonschema"), reason="needs: make extras")
def test_workflows_and_citation_fit_their_schemas(tmp_path):
    def check(schema, *paths):
        tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
        run = [*tool, f"vendor.{schema}", *map(str, paths)]
        return subprocess.run(run, capture_output=True, text=True)

    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert len(workflows) >= 3
    done = check("github-workflows", *workflows)
    assert done.returncode == 0, done.stdout
    done = check("citation-file-format", ROOT / "CITATION.cff")
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"  # the check can fail
    wrong.write_text(workflows[0].read_text().replace("runs-on:", "run-on:"))
    assert check("github-workflows", wrong).returncode == 1


def test_the_pages_are_built_for_the_repository_that_builds_them(copy):
    text = (ROOT / ".github/workflows/pages.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["deploy"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs[-1] == "make book" and runs[-2].startswith("make repository URL=")
    values = {"github.server_url": "https://github.com", "github.repository": "Me/fork"}
    url = re.sub(
        r"\$\{\{ ([\w.]+) \}\}", lambda m: values[m[1]], runs[-2].split("=")[1]
    )
    assert repository.set_repository(url, copy)
    assert "https://github.com/Me/fork" in first_cell(contents(copy)["intro.ipynb"])


def test_actions_are_pinned_and_workflows_ask_for_few_rights():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        uses = re.findall(r"uses: (\S+)", text)
        assert uses and all(re.search(r"@(v\d+|[0-9a-f]{40})$", u) for u in uses)
        assert "permissions:\n  contents: read\n" in text
        assert "timeout-minutes:" in text


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with an sdist and a wheel of this checkout."""
    if not find_spec("hatchling"):
        pytest.skip("needs: make extras")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def members(path):
    """Names in a wheel or an sdist, without the sdist's own folder."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        return {n.partition("/")[2] for n in archive.getnames()}


def test_the_wheel_holds_the_library_its_model_its_types_and_the_records(dist):
    (wheel,) = dist.glob("*.whl")
    want = {p for p in tracked() if p.startswith("ssdlib/")}
    want |= {
        p.replace("book/results", "ssdlib/results")
        for p in tracked()
        if p.startswith("book/results/")
    }
    want |= {"ssdlib/results/shipped.npz"}
    have = members(wheel)
    assert {"ssdlib/py.typed", "ssdlib/tiny/model.safetensors"} <= want <= have
    extra = {p for p in have - want if ".dist-info/" not in p}
    assert not extra
    assert any(p.endswith("licenses/LICENSE") for p in have)


def test_the_sdist_is_complete(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    left_out = {p for p in tracked() if p.startswith((".ci/", ".github/"))}
    assert set(tracked()) - left_out <= members(sdist)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    done = subprocess.run([*build, "-d", tmp_path], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert members(*tmp_path.glob("*.whl")) == members(*dist.glob("*.whl"))


def test_the_metadata_of_the_package_is_valid(dist):
    from packaging.metadata import Metadata

    wheel = zipfile.ZipFile(*dist.glob("*.whl"))
    (name,) = (n for n in wheel.namelist() if n.endswith("dist-info/METADATA"))
    metadata = Metadata.from_email(wheel.read(name), validate=True)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert {"chapters", "book", "tpu", "cuda"} <= set(metadata.provides_extra)
