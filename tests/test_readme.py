"""README.md shows what the records say: its table and its figure are not typed."""

import json
import re

import pytest
import readme
from jsonschema import Draft202012Validator

SPREAD = {"median": 2.0, "lowest": 1.9, "highest": 2.2}


def row(what, length, **changes):
    """A row of a record of measurement."""
    decode = what == "decode"
    return (
        dict(
            what=what,
            length=length,
            shape=[1, 1 if decode else length],
            seconds={"median": 0.04, "lowest": 0.039, "highest": 0.05},
            samples=[0.04, 0.039, 0.05],
            compile_seconds=3.2,
            temp=None,
            cache=None,
            tokens_per_second=25.0,
            ms_per_token=40.0 if decode else 4.0,
            tflops=0.007,
            mfu=None if decode else 0.71,
            hbu=0.55,
        )
        | changes
    )


def record(date="2026-01-02T03:04:05Z", **changes):
    """A small record of a measurement, as `python -m ssdlib bench` writes them."""
    return (
        dict(
            origin="measured",
            date=date,
            commit="0123abc",
            versions={"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2"},
            device=dict(
                name="cpu",
                platform="cpu",
                kind="cpu",
                count=1,
                used=1,
                host="X",
                cores=2,
            ),
            command="python -m ssdlib bench",
            model=dict(
                name="130m",
                weights="random",
                parameters=1,
                sizes=dict.fromkeys(
                    "vocab_size d_model n_layers n_heads head_dim d_state".split(), 1
                ),
            ),
            batch=1,
            dtype="float32",
            precision="default",
            repeats=3,
            load={"before": 0.0, "after": 1.0},
            memory={"weights": 1, "cache": 1, "free": None, "peak": None},
            peak=None,
            rows=[row("prefill", 1024), row("decode", 1024), row("decode", 4096)],
            speedups=[{"length": 1024, "ratio": SPREAD}],
        )
        | changes
    )


def test_the_small_record_of_these_tests_is_a_valid_one():
    schema = json.loads((readme.RUNS / "schema.json").read_text())
    Draft202012Validator(schema).validate(record())


def test_the_table_of_the_readme_is_what_the_records_say():
    text = readme.README.read_text()
    assert readme.updated(text) == text, "run: make readme"


def test_a_stale_table_is_replaced():
    text = readme.README.read_text()
    stale = re.sub(r"(<!-- results -->\n\|).", r"\1X", text)
    assert stale != text and readme.updated(stale) == text
    with pytest.raises(ValueError, match=r"README\.md"):
        readme.updated("no marks")


def test_the_figures_of_the_readme_are_those_of_the_introduction():
    def rounded(svg):  # a platform may differ in the last digit of a coordinate
        return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}", svg)

    for theme, svg in readme.figures().items():
        path = readme.ROOT / f"book/_static/readme-{theme}.svg"
        assert rounded(path.read_text()) == rounded(svg), "run: make readme"
        assert readme.INKS[theme] in svg and "currentColor" not in svg


def test_a_row_without_a_record_is_left_out(tmp_path):
    assert list(readme.measured(tmp_path)) == []
    assert "runs/" not in readme.table(tmp_path)
    (tmp_path / "schema.json").write_text("{}")
    assert list(readme.measured(tmp_path)) == []


def test_the_newest_record_with_several_others_is_the_row_about_them(tmp_path):
    assert list(readme.compared(tmp_path)) == []

    def pair(other, what, median):
        ratio = {"median": median, "lowest": 0.1, "highest": 9.0}
        return dict(what=what, a="ours float32", b=f"{other} float32", ratio=ratio)

    many = [pair(*v) for v in (("X", "decode", 0.5), ("Y", "decode", 2.0))]
    many += [pair("X", "prefill", 0.25)]
    facts = dict(size="130m", batch=1, prompt=8, threads=2)
    facts |= {"date": "2026-01-02T03:04:05Z", "device": {"host": "Z"}}
    for name, pairs in (("cpu-a", many[:1]), ("cpu-b", many), ("cpu-c", many[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | {"pairs": pairs}))
    ((what, result, source),) = readme.compared(tmp_path)
    assert "130m, float32, batch 1, 2 threads of Z (2026-01-02)" in what
    assert result == "decode: X 0.50, Y 2.00; prefill of 8 tokens: X 0.25"
    assert source == "`book/results/compare/cpu-b.json`"


def test_a_record_of_a_run_becomes_a_row_and_the_newest_counts(tmp_path):
    old = record("2025-12-31T00:00:00Z", rows=[row("decode", 128)], speedups=[])
    (tmp_path / "a.json").write_text(json.dumps(old))
    (tmp_path / "b.json").write_text(json.dumps(record()))
    (what, result, source), *more = readme.measured(tmp_path)
    assert not more and source == "`book/results/runs/b.json`"
    assert what == "130m, float32, batch 1, on X, 2 cores (2026-01-02, jax 0.10.2)"
    assert result == (
        "prefill of 1024 tokens: 4 ms a token, MFU 71 %; decode after 4096 tokens: "
        "40 ms a token, HBU 55 %; cached against uncached at 1024: 2 times"
    )
    assert f"| {what} | {result} | {source} |" in readme.table(tmp_path)


def test_records_of_other_devices_are_rows_of_their_own(tmp_path):
    gpu = record()["device"] | dict(platform="gpu", kind="NVIDIA L4", name="l4")
    (tmp_path / "a.json").write_text(json.dumps(record()))
    (tmp_path / "b.json").write_text(json.dumps(record(device=gpu)))
    rows = list(readme.measured(tmp_path))
    assert len(rows) == 2 and any("on NVIDIA L4 (" in what for what, *_ in rows)
