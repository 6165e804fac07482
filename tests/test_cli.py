"""The command line, as a user runs it."""

import os
import re
import subprocess
import sys

import pytest

from ssdlib import Mamba2Config
from ssdlib.__main__ import main
from ssdlib.companion import commands
from ssdlib.compiler import hlo
from ssdlib.measure import roofline
from ssdlib.params import PRESETS


def run(capsys, *argv):
    """Run a command in this process: (exit status, output, errors)."""
    status = main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_writes_readable_text_and_its_speed(capsys):
    prompt = "The with statement"
    status, out, err = run(capsys, "generate", prompt, "--max-new-tokens", "120")
    assert status == 0
    assert out.startswith(prompt)
    words = re.findall(r"[a-z]+", out[len(prompt) :].lower())
    english = {"the", "a", "of", "to", "is", "in", "and", "that", "an", "be", "with"}
    assert len(words) >= 8
    assert english & set(words)
    assert re.search(r"\d+ tokens; first 16 after [\d.]+ s, then \d+ tokens/s on", err)


def test_the_same_seed_writes_the_same_text(capsys):
    command = "generate", "A class", "--max-new-tokens", "40", "--seed"
    one, two = run(capsys, *command, "5"), run(capsys, *command, "5")
    assert one[1] == two[1]
    assert one[1] != run(capsys, *command, "6")[1]


def test_a_character_cut_in_two_waits_for_its_other_half(capsys, monkeypatch):
    snowman = list("☃!".encode())

    def halves(*args, **kwargs):
        yield [snowman[:2]]
        yield [snowman[2:]]

    monkeypatch.setattr("ssdlib.companion.commands.stream", halves)
    _, out, _ = run(capsys, "generate", "x")
    assert out == "x☃!\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_is_told_why_and_the_output_stays_text(
    capsys, monkeypatch, terminal
):
    told = []

    def at_once(*args, **kwargs):
        told.extend(capsys.readouterr().err.splitlines())
        return iter([[list(b"!")]])

    monkeypatch.setattr("ssdlib.companion.commands.stream", at_once)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    _, out, err = run(capsys, "generate", "x")
    assert [line.split()[0] for line in told] == ["loading", "compiling"] * terminal
    assert out == "x!\n"
    assert re.fullmatch(r"1 tokens; first 1 after [\d.]+ s on \S+\n", err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", ""], "prompt: it is empty"),
        (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens: 0"),
        (["generate", "x", "--top-k", "300"], "top_k: 300 is outside 1..256"),
        (["generate", "x", "--temperature", "-1"], "temperature: -1.0"),
        (["generate", "x", "--model", "nowhere"], "source: 'nowhere' is no folder"),
        (["inspect", "--preset", "7b"], "name: '7b'; it must be one of 130m"),
        (["inspect", "--target", "abacus"], "target: 'abacus'; it must be one of cpu"),
        (["inspect", "--batch", "0"], "batch: 0; it must be an integer of at least 1"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_errors_have_one_line_and_no_traceback(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_inspect_prints_the_table_and_its_totals(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "130m", (768, 1))
    status, out, err = run(capsys, "inspect", "--preset", "130m", "--rows", "5")
    assert (status, err) == (0, "")
    assert re.match(r"runs +kind +primitive +share +cycles +bytes +FLOP +code", out)
    assert re.search(r"\d+ more rows, [\d.]+% of the cost\. cpu: compiled here", out)
    assert re.search(r"\d+ kernels, \d+ fusions, custom calls: none", out)
    hand = re.search(r"by hand: +([\d.]+) MFLOP, ([\d.]+) MB at least", out)
    work = roofline.decode(Mamba2Config.preset("130m"), 1)
    assert float(hand[1]) == pytest.approx(work.flops / 1e6, rel=5e-3)
    assert float(hand[2]) == pytest.approx(work.bytes / 1e6, rel=5e-3)
    assert re.search(r"memory: argument [\d.]+ MB, output", out)


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_inspect_runs_the_program_on_the_attached_device(capsys, monkeypatch, what):
    monkeypatch.setitem(PRESETS, "130m", (768, 1))
    argv = f"inspect --run --what {what} --tokens 40 --by kernel --target h100".split()
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert re.match(r" *ms +share +runs +bytes +FLOP +GB/s +GFLOP/s +kind +name", out)
    said = re.search(r"A call took [\d.]+ ms .* kernels ([\d.]+)%, other events", out)
    assert 0 < float(said[1]) <= 100
    assert "cpu: compiled here for the attached device" in out


@pytest.mark.parametrize("name, target", [("step_130m", "tpu-v6e"), ("step", "l40s")])
def test_inspect_prints_a_time_with_its_interval_or_none(
    capsys, monkeypatch, name, target
):
    program = hlo.load_record(name, target)
    monkeypatch.setattr(commands, "compile_preset", lambda args, config: program)
    status, out, err = run(capsys, "inspect", "--preset", "130m", "--target", target)
    assert (status, err) == (0, "")
    least = re.search(r"roofline of .*: ([\d.]+) ms at least", out)
    time = re.search(r"estimate of its time: ([\d.]+) ms \(([\d.]+) to ([\d.]+)\)", out)
    assert bool(time) == (target == "tpu-v6e")
    if time:
        middle, low, high = map(float, time.groups())
        assert 0.95 * float(least[1]) < low <= middle < high


def test_help_and_usage_from_a_shell():
    def shell(*argv):
        command = [sys.executable, "-m", "ssdlib", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = shell("generate", "--help")
    assert done.returncode == 0
    assert "--max-new-tokens" in done.stdout
    done = shell("genrate")
    assert done.returncode == 2
    assert "invalid choice: 'genrate'" in done.stderr
    assert "Traceback" not in done.stderr


def test_programs_are_kept_in_the_users_cache_folder_unless_told_otherwise(tmp_path):
    def kept(*more):
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = "-m ssdlib generate A --max-new-tokens 20".split()
        made = subprocess.run(
            [sys.executable, *command, *more], env=env, capture_output=True, text=True
        )
        assert made.returncode == 0 and made.stdout.startswith("A")
        # Of the small programs, those are kept that a busy machine took long for.
        files = tmp_path.rglob("*_generation*-cache")
        return made.stdout, sorted(path.name for path in files)

    text, programs = kept("--no-compile-cache")
    assert programs == []
    assert kept()[0] == text
    again, programs = kept()
    assert again == text and programs
    assert kept() == (text, programs)  # nothing new is compiled
