"""A number that several pages state is one number, and follows from its source."""

import json
import re
from math import ceil, log
from pathlib import Path

import numpy as np
import pytest

from ssdlib import Mamba2Config
from ssdlib.compiler import hlo
from ssdlib.compiler.chips import CHIPS
from ssdlib.measure import estimate

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted((ROOT / "book").glob("*.ipynb")),
    *sorted((ROOT / "book").glob("*.md")),
]
WORDS = dict(zip("eight nine ten eleven twelve".split(), range(8, 13), strict=True))
PAPER = {
    claim["id"]: claim["numbers"]
    for claim in json.loads((hlo.RECORDS / "paper.json").read_text())["claims"]
}


def kernels_of_a_layer():
    two, one = (hlo.load_record(n, "l40s") for n in ("step", "one_layer_step"))
    return two.launches - one.launches


def overflow():  # the first whole number whose exponential no float32 holds
    return ceil(log(np.finfo(np.float32).max))


STATED = {  # in prose, with the number in a group: where it comes from, pages at least
    r"(\d+) TFLOPS(?! is)": (PAPER["prefill"]["tflops"], 2),
    r"(\d+) % (?:of its peak|of the peak)|Is (\d+) % the ceil": (
        PAPER["prefill"]["mfu"],
        2,
    ),
    r"(?:its|up to|case of the) (\d\d) %": (PAPER["bandwidth"]["hbu"], 2),
    r"here are both for (\w+) chips": (len(CHIPS), 1),
    r"wrote (\d+) of them": (
        len(json.loads(estimate.PATH.read_text())["programs"]),
        1,
    ),
    r"(\d+) kernels a layer": (kernels_of_a_layer(), 1),
    r"a layer and (\d+) layers|all (24) layers": (
        Mamba2Config.preset("130m").n_layers,
        2,
    ),
    r"overflows a float32 at [^$]*\$[^$]*= (\d+)|at \$e\^\{(\d+)\}\$": (overflow(), 1),
}


def prose(path):
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
    )


def found(pattern):
    """(page, number) wherever a page states it."""
    for path in PAGES:
        for match in re.finditer(pattern, prose(path), re.I):
            text = next(group for group in match.groups() if group)
            yield path.stem, WORDS.get(text.lower()) or int(text)


@pytest.mark.parametrize("pattern", STATED)
def test_pages_state_the_number_of_its_source(pattern):
    value, pages = STATED[pattern]
    places = list(found(pattern))
    assert len({page for page, _ in places}) >= pages
    assert {number for _, number in places} == {value}, places


def test_published_rates_are_read_from_the_record_and_not_typed():
    rates = [748, 390, 325, 192]
    claims = json.loads((hlo.RECORDS / "paper.json").read_text())["claims"]
    figure = next(c["heat_map"] for c in claims if "heat_map" in c)
    assert list(figure["tokens_per_second"].values())[:4] == rates
    typed = re.compile(rf"\b({'|'.join(map(str, rates))}),")
    for path in PAGES:
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            code = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
            assert not typed.search("\n".join(code)), path.stem
