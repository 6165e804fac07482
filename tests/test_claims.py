"""The table of claims: no number without a source, and every verdict can turn."""

import copy
import dataclasses
import html
import json
import re
from collections import Counter

import jsonschema
import pytest

from ssdlib.companion import claims
from ssdlib.companion.claims import Evidence
from ssdlib.companion.verdicts import (
    CONTRADICTED,
    OPEN,
    REPRODUCED,
    RULES,
    SUPPORTED,
    VERDICTS,
)
from ssdlib.compiler.hlo import RECORDS
from ssdlib.params import PRESETS

PAPER = json.loads((RECORDS / "paper.json").read_text())
CLAIMS, BOOK = claims.load()
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
TEXT = {"type": "string", "minLength": 1}
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
                "required": [
                    *("id", "title", "words", "numbers", "versions", "place"),
                    *("whose", "by", "turns"),
                ],
                "properties": {
                    "id": {"enum": IDS},
                    "title": TEXT,
                    "words": TEXT,
                    "numbers": NUMBERS,
                    "versions": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"enum": ["v1", "v2", "mamba2-jax 1.0.0"]},
                    },
                    "place": {
                        "enum": ["title", "abstract", "a review", "README, heat map"]
                    },
                    "whose": TEXT,
                    "by": {"type": "string", "pattern": "chapter|`python -m ssdlib"},
                    "turns": {
                        "type": "object",
                        "propertyNames": {"enum": VERDICTS[:3]},
                        "additionalProperties": TEXT,
                        "required": [CONTRADICTED],
                        "minProperties": 2,
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
NAMES = (
    r"v6e|L40S|WikiText-103|mamba_ssm 2\.2\.2|float32|O\(1\)|batch 1|[Vv]ersion \d|v2"
)
by_id = {claim["id"]: claim for claim in CLAIMS}
each_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c["id"])


def verdict(name, **changes):
    return claims.judge(by_id[name], dataclasses.replace(BOOK, **changes)).verdict


def test_the_papers_claims_follow_their_schema():
    jsonschema.Draft202012Validator(SCHEMA).validate(PAPER)
    assert [c["id"] for c in CLAIMS] == IDS == list(RULES)
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
def test_an_open_claim_has_a_command(claim):
    found = claims.judge(claim, BOOK)
    assert found.verdict in VERDICTS
    assert found.computed or found.measured or found.verdict == OPEN
    assert found.verdict != OPEN or "`python -m ssdlib" in claim["by"]


@each_claim
def test_without_records_no_number_and_no_verdict_is_left(claim):
    assert claims.judge(claim, Evidence()) == ("", "", OPEN)


@each_claim
def test_what_was_measured_needs_a_run_and_what_was_computed_a_program(claim):
    """Paper, computation and measurement: each column has its own sources."""
    found = claims.judge(claim, BOOK)
    compiled = dataclasses.replace(BOOK, runs=[], parity={})
    measured = Evidence(runs=BOOK.runs, parity=BOOK.parity)
    assert claims.judge(claim, compiled).measured == ""
    assert claims.judge(claim, compiled).computed == found.computed
    assert claims.judge(claim, measured).computed == ""
    assert claims.judge(claim, measured).measured == found.measured


# --- every verdict turns --------------------------------------------------------------


def run(chip="tpu-v6e", size="130m", lengths=(128, 4096), **facts):
    """A record as `bench` writes it, with figures as small as a rule can take.

    ratio, tflops, hbu: of every row. slower: median time of the last length over that
    of the first. spread: highest over lowest sample. cache: factor on the last length.
    """
    base = next(r for r in BOOK.runs if r["model"]["name"] == "130m")
    made, f = copy.deepcopy(base), dict(tflops=1.0, hbu=0.1, ratio=1.0, slower=1.0)
    f |= dict(spread=1.01, cache=1.0) | facts
    platform = {"cpu": "cpu", "tpu-v6e": "tpu"}.get(chip, "gpu")
    made["device"] |= {"name": chip, "platform": platform, "kind": chip}
    made["model"]["name"] = size
    made["speedups"] = [
        {
            "length": T,
            "ratio": dict.fromkeys(("median", "lowest", "highest"), f["ratio"]),
        }
        for T in lengths
    ]
    s = base["model"]["sizes"]
    width = s["n_heads"] * s["head_dim"]
    card = width * s["d_state"] + (s["d_conv"] - 1) * (width + 2 * s["d_state"])
    card = 4 * s["n_layers"] * card + 4
    made["rows"] = []
    for what in ("prefill", "decode"):
        for T in lengths:
            last = T == lengths[-1]
            t, half = f["slower"] if last else 1.0, f["spread"] ** 0.5
            seconds = {"median": t, "lowest": t / half, "highest": t * half}
            row = {"what": what, "length": T, "seconds": seconds}
            row |= {"tflops": f["tflops"], "hbu": f["hbu"]}
            row |= {"cache": int(card * (f["cache"] if last else 1))}
            made["rows"].append(row)
    return made


def runs(**facts):
    return {"runs": [run(size=size, **facts) for size in PRESETS]}


def programs(name=None, target=None, change=None, only=lambda op: True):
    """The book's programs; of one of them the first fitting kernel is changed."""

    def program(asked, at):
        found = BOOK.program(asked, at)
        if found is None or (name, target) != (asked, at):
            return found
        i = next(i for i, op in enumerate(found.ops) if only(op))
        bad = dataclasses.replace(found.ops[i], **change)
        return dataclasses.replace(
            found, ops=(*found.ops[:i], bad, *found.ops[i + 1 :])
        )

    return {"program": program}


def without_loop(asked, at):
    found = BOOK.program(asked, at)
    if (asked, at) != ("generate", "l40s"):
        return found
    ops = tuple(dataclasses.replace(op, times=1) for op in found.ops)
    return dataclasses.replace(found, ops=ops)


def scaled(factor):
    """The programs, as if their compilers expected so many times the cycles."""

    def program(asked, at):
        found = BOOK.program(asked, at)
        if found is None or found.cycles is None:
            return found
        ops = tuple(
            dataclasses.replace(op, cycles=op.cycles and int(op.cycles * factor))
            for op in found.ops
        )
        return dataclasses.replace(found, ops=ops)

    return {"program": program}


def parity(change=None, case="shipped", **facts):
    made = copy.deepcopy(BOOK.parity) | facts
    made["cases"][case] |= change or {}
    return {"parity": made}


def wikitext(apart):
    case = {"perplexity": [20 + apart, 20.0], "reference": "mamba_ssm 2.2.2"}
    return {"parity": BOOK.parity | {"wikitext-103": case}}


def bandwidth(factor):
    chip = BOOK.chips["tpu-v6e"]
    return {"chips": {"tpu-v6e": dataclasses.replace(chip, bandwidth=factor)}}


def models(**changes):
    """Models without GLA, but for what changes."""
    made = {k: v for k, v in BOOK.parity["models"].items() if k != "GLA"}
    for name, change in changes.items():
        made[name] = BOOK.parity["models"][name] | change
    return {"parity": BOOK.parity | {"models": made}}


EVERYWHERE = {"runs": [run("cpu"), run("l40s"), run("tpu-v6e")]}
CUDA = {"reference": "mamba_ssm 2.2.2 on CUDA"}
TURNS = {  # what must turn a verdict, from the smallest change that matters
    "prefill": {
        REPRODUCED: {"runs": [run(tflops=127)]},
        SUPPORTED: {"runs": [run(tflops=125)]},
        CONTRADICTED: runs(tflops=69),
        OPEN: {"runs": [], "chips": {}},
    },
    "ceiling": {
        SUPPORTED: bandwidth(3e11),
        CONTRADICTED: bandwidth(6e12),
        OPEN: {},
    },
    "bandwidth": {
        REPRODUCED: {"runs": [run(hbu=0.58)]},
        SUPPORTED: {"runs": [run(hbu=0.57)]},
        CONTRADICTED: {"rates": {s: 0.85 * r for s, r in BOOK.rates.items()}},
        OPEN: {"rates": {}},
    },
    "speedup_review": {
        REPRODUCED: {"runs": [run(ratio=26.5)]},
        CONTRADICTED: runs(ratio=14),
        OPEN: {"runs": [run("h100", ratio=99)]},
    },
    "speedup_abstract": {
        REPRODUCED: runs(ratio=24.5),
        CONTRADICTED: {"runs": [*runs(ratio=30)["runs"][1:], run(ratio=13)]},
        OPEN: {"runs": [run(ratio=30)]},
    },
    "speedup_figure": {
        REPRODUCED: {"runs": [run(ratio=31)]},
        CONTRADICTED: runs(ratio=17),
        OPEN: runs(ratio=18),
    },
    "memory": {
        REPRODUCED: {"runs": [run("cpu")]},
        CONTRADICTED: {"runs": [run("cpu", cache=1.01)]},
        OPEN: {"runs": [run("cpu", lengths=(128,))]},
    },
    "length": {
        REPRODUCED: {"runs": [run("l40s", slower=1.09)]},
        SUPPORTED: {"runs": [run("cpu", slower=1.09)]},
        CONTRADICTED: {"runs": [run("l40s"), run("cpu", slower=1.12)]},
        OPEN: {"runs": [run("l40s", slower=1.12, spread=1.3)]},
    },
    "backends": {
        REPRODUCED: EVERYWHERE,
        SUPPORTED: {"runs": EVERYWHERE["runs"][:2]},
        CONTRADICTED: programs("step", "tpu-v6e", {"source": "tpu.py:1"}),
        OPEN: {
            "program": lambda name, at: None if at == "l40s" else BOOK.program(name, at)
        },
    },
    "tokens": {
        REPRODUCED: parity(**CUDA),
        SUPPORTED: {},
        CONTRADICTED: parity({"greedy": 63}),
        OPEN: {"parity": {}},
    },
    "rounding": {
        REPRODUCED: parity(**CUDA),
        SUPPORTED: {},
        CONTRADICTED: parity({"h": 1.1e-5}),
        OPEN: {"parity": {}},
    },
    "perplexity": {
        REPRODUCED: wikitext(4e-4),
        CONTRADICTED: wikitext(6e-4),
        OPEN: parity({"perplexity": [5.0, 6.0]}),  # of another text: it says nothing
    },
    "kernels": {
        REPRODUCED: EVERYWHERE,
        SUPPORTED: programs(
            "step", "l40s", dict(kind="custom", primitive="__cublas$x")
        ),
        CONTRADICTED: programs(
            "step", "tpu-v6e", dict(kind="custom", primitive="tpu_custom_call")
        ),
        OPEN: {
            "program": lambda name, at: None if at == "cpu" else BOOK.program(name, at)
        },
    },
    "host": {
        REPRODUCED: EVERYWHERE,
        SUPPORTED: {"runs": []},
        CONTRADICTED: programs("generate", "tpu-v6e", dict(opcode="outfeed")),
        OPEN: {"program": lambda name, at: None},
    },
    "transfer": {
        SUPPORTED: models(),
        CONTRADICTED: models(GLA={}),
        OPEN: {"parity": {}},
    },
}
CALLBACK = dict(kind="custom", primitive="xla_ffi_python_cpu_callback")
scenarios = [(name, to) for name, turns in TURNS.items() for to in turns]


@each_claim
def test_what_a_claim_says_to_turn_it_is_what_is_shown_to_turn_it(claim):
    """A rule that cannot turn is none: each has to be contradicted and agreed with."""
    shown = TURNS[claim["id"]].keys() - {OPEN}
    assert shown == claim["turns"].keys()
    assert CONTRADICTED in shown and shown & {REPRODUCED, SUPPORTED}
    universal = re.search(r"\bany\b.*(recurrence|model)", claim["words"])
    assert not (universal and REPRODUCED in shown)


@pytest.mark.parametrize(("name", "to"), scenarios)
def test_a_verdict_turns(name, to):
    assert verdict(name, **TURNS[name][to]) == to


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "host",
            programs(
                "generate",
                "cpu",
                dict(kind="custom", primitive="xla_ffi_python_cpu_callback"),
            ),
        ),
        ("host", {"program": without_loop}),
        ("rounding", parity({"logits": 1.1e-5})),
        ("transfer", models(RetNet={"error_of_other_code": 1.1e-5})),
        ("memory", {"runs": [run("cpu"), run("cpu", size="370m", cache=1.001)]}),
        ("memory", {"runs": [run("cpu", cache=1e9)]}),
        ("bandwidth", {"rates": {s: 2 * r for s, r in BOOK.rates.items()}}),
        ("bandwidth", runs(hbu=0.31)),
    ],
)
def test_other_changes_contradict_as_well(name, change):
    assert verdict(name, **change) == CONTRADICTED


def test_a_cache_beside_int8_matrices_is_that_of_float32():
    record = run("cpu")
    assert verdict("memory", runs=[record | {"dtype": "int8"}]) == REPRODUCED


def test_the_estimate_of_prefill_speaks_only_where_it_can():
    """Were its cycles a thousand times as many, the released program would disagree."""
    assert verdict("prefill", runs=[]) == SUPPORTED
    assert verdict("prefill", runs=[], **scaled(1000)) == CONTRADICTED


def test_the_reader_gets_a_column_and_can_settle_a_claim():
    mine = Evidence(runs=[run(tflops=1e3)])
    plain, both = claims.table(CLAIMS, BOOK), claims.table(CLAIMS, BOOK, mine)
    at = both.header.index("your machine")
    assert plain.header == both.header[:at] + both.header[at + 1 :]
    for before, after in zip(plain.rows, both.rows, strict=True):
        assert before[2:at] == after[2:at]  # what the book has stays as it is
    assert "tpu-v6e" in both.rows[0][at]
    assert plain.rows[0][1] != f"**{REPRODUCED}**" == both.rows[0][1]
    worse = {"cases": {"shipped": BOOK.parity["cases"]["shipped"] | {"greedy": 1}}}
    worse["reference"] = BOOK.parity["reference"]
    row = claims.table(CLAIMS, BOOK, Evidence(parity=worse)).rows[IDS.index("tokens")]
    assert row[1] == f"**{CONTRADICTED}**"


def test_each_claim_is_a_card_with_its_verdict_in_words_and_its_command():
    table = claims.table(CLAIMS, BOOK)
    page = table._repr_html_()
    bar, *cards = page.split('<div class="claim">')
    counts = Counter(row[1].strip("*") for row in table.rows)
    assert all(f" {n} {verdict}</span>" in bar for verdict, n in counts.items())
    assert len(cards) == len(CLAIMS) == sum(counts.values())
    for claim, row, card in zip(CLAIMS, table.rows, cards, strict=True):
        assert f"{row[1].strip('*')}</span>" in card
        assert all(f"<dt>{name}</dt>" in card for name in table.header[2:])
        for command in re.findall("`(.+?)`", claim["by"]):
            assert f"<pre>{html.escape(command)}</pre>" in card
    assert "**" not in page and "`" not in page


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("folder", ["text", None, 7, RECORDS / "runs"])
def test_a_folder_without_claims_is_named(folder):
    with pytest.raises(ValueError, match=r"folder: .*; it must "):
        claims.load(folder)
