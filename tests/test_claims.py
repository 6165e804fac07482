"""The table of claims: no number without a source, no verdict without a rule."""

import copy
import dataclasses
import json
import re

import jsonschema
import pytest

from ssdlib.companion import claims, evidence
from ssdlib.companion.claims import CONTRADICTED, OPEN, REPRODUCED, SUPPORTED, Evidence
from ssdlib.compiler.hlo import RECORDS

PAPER = json.loads((RECORDS / "paper.json").read_text())
CLAIMS, BOOK = evidence.load()
TOPICS = {  # of the paper -> ids
    "140 TFLOPS, 15 % MFU": ["prefill"],
    "roofline ceiling": ["ceiling"],
    "64 % HBU": ["bandwidth"],
    "speedups": ["speedup_review", "speedup_abstract", "speedup_figure"],
    "constant memory": ["memory"],
    "independence of the length": ["length"],
    "three backends": ["backends"],
    "64 tokens": ["tokens"],
    "float32 rounding": ["rounding"],
    "perplexity": ["perplexity"],
    "no custom kernels": ["kernels"],
    "no host synchronization": ["host"],
    "transfers to other models": ["transfer"],
}
IDS = [name for names in TOPICS.values() for name in names]
NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["paper", "about", "claims"],
    "properties": {
        "paper": {"type": "string"},
        "about": {"type": "string"},
        "claims": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["id", "title", "words", "numbers", "versions", "place"],
                "properties": {
                    "id": {"enum": IDS},
                    "title": {"type": "string", "minLength": 1},
                    "words": {"type": "string", "minLength": 1},
                    "numbers": NUMBERS,
                    "versions": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"enum": ["v1", "v2", "mamba2-jax 1.0.0"]},
                    },
                    "place": {
                        "enum": ["title", "abstract", "a review", "README, heat map"]
                    },
                    "heat_map": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["chip", "lengths", "ratios", "tokens_per_second"],
                        "properties": {
                            "chip": {"const": "tpu-v6e"},
                            "lengths": {"type": "array"},
                            "ratios": {"type": "object"},
                            "tokens_per_second": NUMBERS,
                        },
                    },
                },
            },
        },
    },
}
NAMES = r"v6e|L40S|WikiText-103|mamba_ssm 2\.2\.2|float32|O\(1\)"  # no numbers
by_id = {claim["id"]: claim for claim in CLAIMS}
each_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c["id"])


def verdict(name, **changes):
    return claims.judge(by_id[name], dataclasses.replace(BOOK, **changes)).verdict


def test_the_papers_claims_follow_their_schema():
    jsonschema.Draft202012Validator(SCHEMA).validate(PAPER)
    assert [c["id"] for c in CLAIMS] == IDS
    figure = by_id["speedup_figure"]["heat_map"]
    for ratios in figure["ratios"].values():
        assert len(ratios) == len(figure["lengths"])
    values = [v for ratios in figure["ratios"].values() for v in ratios]
    numbers = by_id["speedup_figure"]["numbers"]
    assert (min(values), max(values)) == (numbers["low"], numbers["ratio"])


@each_claim
def test_every_number_of_the_paper_is_cited_and_none_is_typed_into_its_words(claim):
    assert claim["versions"] and claim["place"]
    typed = re.sub(r"\{.*?\}", "", re.sub(NAMES, "", claim["words"]))
    assert not re.search(r"\d", typed)
    assert set(re.findall(r"\{(\w+)", claim["words"])) == set(claim["numbers"])


@each_claim
def test_every_claim_has_one_verdict_and_evidence_or_a_command(claim):
    found = claims.judge(claim, BOOK)
    assert found.verdict in claims.VERDICTS and found.by
    assert found.computed or found.measured
    if found.verdict == OPEN:
        assert "`python -m ssdlib" in found.by


@each_claim
def test_without_records_no_number_and_no_verdict_is_left(claim):
    found = claims.judge(claim, Evidence())
    assert (found.computed, found.measured, found.verdict) == ("", "", OPEN)


@each_claim
def test_what_was_measured_needs_a_run_and_what_was_computed_a_program(claim):
    """Paper, computation and measurement: each column has its own sources."""
    found = claims.judge(claim, BOOK)
    compiled = Evidence(program=BOOK.program, chips=BOOK.chips)
    measured = Evidence(runs=BOOK.runs, parity=BOOK.parity)
    assert claims.judge(claim, compiled).measured == ""
    assert claims.judge(claim, compiled).computed == found.computed
    assert claims.judge(claim, measured).computed == ""
    assert claims.judge(claim, measured).measured == found.measured


def on(chip, platform, **factors):
    """The first run of the book as if made on another chip, some figures scaled."""
    run = copy.deepcopy(BOOK.runs[0])
    run["device"] |= {"name": chip, "platform": platform, "kind": chip}
    for row in run["rows"]:
        row |= {key: row[key] * factor for key, factor in factors.items()}
    for s in run["speedups"]:
        s["ratio"]["median"] *= factors.get("mfu", 1)
    return run


@pytest.mark.parametrize(
    ("name", "much", "little"),
    [
        ("prefill", dict(tflops=1e5), dict(tflops=1)),
        ("bandwidth", dict(hbu=1.3), dict(hbu=0.1)),
        ("speedup_review", dict(mfu=10), dict(mfu=1e-3)),
        ("speedup_abstract", dict(mfu=10), dict(mfu=1e-3)),
        ("speedup_figure", dict(mfu=10), dict(mfu=1e-3)),
    ],
)
def test_a_speed_on_a_v6e_is_settled_by_a_v6e_alone(name, much, little):
    assert verdict(name, runs=[on("tpu-v6e", "tpu", **much)]) == REPRODUCED
    assert verdict(name, runs=[on("tpu-v6e", "tpu", **little)]) == OPEN
    assert verdict(name, runs=[on("h100", "gpu", **much)]) == OPEN
    assert verdict(name) == OPEN or any(
        run["device"]["name"] == "tpu-v6e" for run in BOOK.runs
    )


@pytest.mark.parametrize(
    "bandwidth, settled", [(1e10, SUPPORTED), (1e14, CONTRADICTED)]
)
def test_the_ceiling_is_settled_only_if_the_length_does_not_matter(bandwidth, settled):
    assert verdict("ceiling") == OPEN
    chip = dataclasses.replace(BOOK.chips["tpu-v6e"], bandwidth=bandwidth)
    assert verdict("ceiling", chips={"tpu-v6e": chip}) == settled


def test_time_and_memory_must_not_grow_with_the_length():
    assert verdict("memory") == REPRODUCED
    short, long = (copy.deepcopy(BOOK.runs[0]) for _ in range(2))
    long["memory"]["cache"] *= 2
    assert verdict("memory", runs=[short, long]) == CONTRADICTED

    assert verdict("length", runs=BOOK.runs[:1]) == SUPPORTED
    assert verdict("length", runs=[on("l40s", "gpu")]) == REPRODUCED
    for row in long["rows"]:
        row["seconds"] = dict.fromkeys(row["seconds"], row["length"])
    assert verdict("length", runs=[short, long]) == CONTRADICTED


@pytest.mark.parametrize("name", ["backends", "kernels", "host"])
def test_a_claim_about_every_backend_is_reproduced_by_running_on_each(name):
    runs = [on("cpu", "cpu"), on("l40s", "gpu"), on("tpu-v6e", "tpu")]
    assert verdict(name, runs=runs[:2]) == SUPPORTED
    assert verdict(name, runs=runs) == REPRODUCED

    def without_gpu(name, target):
        return None if target == "l40s" else BOOK.program(name, target)

    assert verdict(name, runs=runs, program=without_gpu) == OPEN


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kernels", dict(kind="custom", primitive="a_kernel")),
        ("host", dict(opcode="outfeed")),
        ("host", dict(kind="custom", primitive="xla_python_cpu_callback")),
    ],
)
def test_one_bad_kernel_on_one_backend_contradicts(name, change):
    def spoiled(name, target):
        program = BOOK.program(name, target)
        if target != "tpu-v6e":
            return program
        first, *rest = program.ops
        bad = dataclasses.replace(first, **change)
        return dataclasses.replace(program, ops=(bad, *rest))

    assert verdict(name) in (SUPPORTED, REPRODUCED)
    assert verdict(name, program=spoiled) == CONTRADICTED


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", dict(greedy=63)),
        ("rounding", dict(h=1e-3)),
        ("rounding", dict(logits=1e-3)),
        ("perplexity", dict(perplexity=[5.0, 5.001])),
    ],
)
def test_a_difference_to_another_implementation_contradicts(name, change):
    assert verdict(name) == SUPPORTED
    parity = copy.deepcopy(BOOK.parity)
    parity["cases"]["shipped"] |= change
    assert verdict(name, parity=parity) == CONTRADICTED


def test_a_model_that_is_off_contradicts_the_transfer():
    assert verdict("transfer") == REPRODUCED
    parity = copy.deepcopy(BOOK.parity)
    parity["models"]["RetNet"]["error"] = 1e-2
    assert verdict("transfer", parity=parity) == CONTRADICTED


def test_the_reader_gets_a_column_and_can_settle_a_claim():
    run = on("tpu-v6e", "tpu", tflops=1e5)
    plain = claims.table(CLAIMS, BOOK)
    mine = claims.table(CLAIMS, BOOK, Evidence(runs=[run]))
    at = mine.header.index("your machine")
    assert plain.header == mine.header[:at] + mine.header[at + 1 :]
    for before, after in zip(plain.rows, mine.rows, strict=True):
        assert before[2:at] == after[2:at]  # what the book has stays as it is
    assert "tpu-v6e" in mine.rows[0][at]
    assert plain.rows[0][1] == f"**{OPEN}**"
    assert mine.rows[0][1] == f"**{REPRODUCED}**"
    worse = {"cases": {"shipped": BOOK.parity["cases"]["shipped"] | {"greedy": 1}}}
    worse["reference"] = BOOK.parity["reference"]
    row = claims.table(CLAIMS, BOOK, Evidence(parity=worse)).rows[IDS.index("tokens")]
    assert row[1] == f"**{CONTRADICTED}**"


def test_the_table_breaks_lines_and_marks_commands():
    html = claims.table(CLAIMS, BOOK)._repr_html_()
    assert "white-space:normal" in html
    assert f"<strong>{OPEN}</strong>" in html
    assert "<code>python -m ssdlib bench" in html
    assert "**" not in html and "`" not in html


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("folder", ["text", None, 7, RECORDS / "runs"])
def test_a_folder_without_claims_is_named(folder):
    with pytest.raises(ValueError, match=r"folder: .*; it must "):
        evidence.load(folder)
