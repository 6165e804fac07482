"""What people do with commands and arrays: the right thing happens, or one line."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssdlib import Mamba2Config, evaluate, forward, generate, init_params, prefill, save
from ssdlib.__main__ import main
from ssdlib.cache import init_cache
from ssdlib.model import decode_step

CONFIG = Mamba2Config.tiny(vocab_size=256, n_layers=1)
HUGE = str(10**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model of one layer that reads bytes."""
    folder = tmp_path_factory.mktemp("model")
    save(folder, init_params(CONFIG, jax.random.key(0)), CONFIG)
    return str(folder)


def run(capsys, *argv):
    """(status, output, errors) of a command in this process."""
    try:
        status = main(list(argv))
    except SystemExit as end:  # of argparse
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- one line and status 2 ------------------------------------------------------------

MISUSES = {
    "no command": ([], "the following arguments are required: command"),
    "a command that is none": (["genrate"], "argument command: invalid choice"),
    "an option that is none": (
        ["generate", "x", "--sed", "1", "-q"],
        "unrecognized arg",
    ),
    "an option without a value": (
        ["generate", "x", "--seed"],
        "argument --seed: expec",
    ),
    "two prompts": (["generate", "x", "y"], "unrecognized arguments: y"),
    "no prompt": (["generate"], "prompt: give either"),
    "a prompt and a file": (
        ["generate", "x", "--prompt-file", "y"],
        "prompt: give eith",
    ),
    "an empty prompt": (["generate", ""], "prompt: it is empty"),
    "a prompt that is no text": (["generate", "a\udcff"], "prompt: it is not UTF-8"),
    "a prompt file that is not there": (
        ["generate", "--prompt-file", "none"],
        "No such",
    ),
    "a folder as a prompt file": (["generate", "--prompt-file", "/"], "directory"),
    "no tokens": (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens: 0"),
    "less than none": (
        ["generate", "x", "--max-new-tokens", "-5"],
        "max_new_tokens: -5",
    ),
    "too many": (["generate", "x", "--max-new-tokens", HUGE], "max_new_tokens: 1000"),
    "half a token": (["generate", "x", "--max-new-tokens", "1.5"], "invalid int value"),
    "words": (
        ["generate", "x", "--max-new-tokens", "many"],
        "invalid int value: 'many'",
    ),
    "a negative temperature": (
        ["generate", "x", "--temperature", "-1"],
        "temperature: -",
    ),
    "an infinite one": (["generate", "x", "--temperature", "inf"], "temperature: inf"),
    "no number": (["generate", "x", "--temperature", "nan"], "temperature: nan"),
    "a huge one": (["generate", "x", "--temperature", "1e999"], "temperature: inf"),
    "top-k of 0": (["generate", "x", "--top-k", "0"], "top_k: 0 is outside 1..256"),
    "top-k of 300": (
        ["generate", "x", "--top-k", "300"],
        "top_k: 300 is outside 1..256",
    ),
    "a huge top-k": (["generate", "x", "--top-k", HUGE], "top_k: 1000"),
    "top-p of 0": (["generate", "x", "--top-p", "0"], "top_p: 0.0; it must be above 0"),
    "top-p of 2": (["generate", "x", "--top-p", "2"], "top_p: 2.0; it must be above 0"),
    "no top-p": (["generate", "x", "--top-p", "nan"], "top_p: nan"),
    "a negative seed": (["generate", "x", "--seed", "-1"], "seed: -1; it must be"),
    "a seed like 0": (["generate", "x", "--seed", str(2**32)], "seed: 4294967296; it"),
    "a seed of 64 bits": (["generate", "x", "--seed", str(2**63)], "seed: 9223372036"),
    "a model without a name": (
        ["generate", "x", "--model", ""],
        "source: '' is no fold",
    ),
    "a model that is none": (
        ["generate", "x", "--model", "a/b/c"],
        "source: 'a/b/c' is",
    ),
    "a tokenizer without a name": (
        ["generate", "x", "--tokenizer", ""],
        "source: '' is",
    ),
    "a dtype that is none": (
        ["generate", "x", "--dtype", "int3"],
        "argument --dtype: inv",
    ),
    "no text": (["evaluate"], "the following arguments are required: --text"),
    "a text that is not there": (["evaluate", "--text", "none"], "No such file"),
    "a text without a name": (["evaluate", "--text", ""], "directory"),
    "a preset that is none": (
        ["inspect", "--preset", "7b"],
        "name: '7b'; it must be one",
    ),
    "a chip that is none": (
        ["inspect", "--target", "abacus"],
        "target: 'abacus'; it must",
    ),
    "no rows": (
        ["inspect", "--batch", "0"],
        "batch: 0; it must be an integer of at lea",
    ),
    "a huge batch": (["inspect", "--batch", HUGE], "batch: 1000"),
    "tokens below 0": (["inspect", "--tokens", "-1"], "tokens: -1; it must be"),
    "a table of no rows": (["inspect", "--rows", "0"], "rows: 0; it must be"),
    "nothing to time": (["bench", "--what", ""], "what: "),
    "a thing that is none": (["bench", "--what", "sleep"], "what: "),
    "a length of 0": (["bench", "--lengths", "0"], "lengths: "),
    "a length that is none": (["bench", "--lengths", "a,...,b"], "lengths: "),
    "no rounds": (["bench", "--repeats", "0"], "repeats: 0"),
    "a batch of none": (["bench", "--batch", "0"], "batch: 0"),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("argv", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_a_misuse_has_one_line_status_2_and_no_traceback(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, RuntimeError])
def test_a_device_that_fails_or_is_absent_has_one_line(capsys, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind("RESOURCE_EXHAUSTED: no memory\n  at line 5")

    monkeypatch.setattr("ssdlib.companion.commands.load", fail)
    status, _, err = run(capsys, "generate", "x")
    assert (status, err) == (2, "error: RESOURCE_EXHAUSTED: no memory\n")


# --- prompts --------------------------------------------------------------------------


def test_a_prompt_comes_from_a_file_or_standard_input(
    capsys, monkeypatch, tmp_path, model
):
    text = "naïve ☃\n" * 3
    how = "--model", model, "--max-new-tokens", "8", "--temperature", "0"
    _, want, _ = run(capsys, "generate", text, *how)
    assert want.startswith(text)
    path = tmp_path / "prompt"
    path.write_bytes(text.encode())
    for source in (["-"], ["--prompt-file", "-"], ["--prompt-file", str(path)]):
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(capsys, "generate", *source, *how)[1] == want
    path.write_bytes(b"\xff\xfe")
    status, _, err = run(capsys, "generate", "--prompt-file", str(path), *how)
    assert status == 2
    assert re.match(r"error: prompt: .* is not UTF-8", err)


def test_a_long_prompt_shows_its_progress_and_changes_nothing(
    capsys, monkeypatch, tmp_path, model
):
    """100,000 tokens, read in pieces of one program; a terminal shows how far it is."""
    ids = np.random.default_rng(0).integers(97, 123, 100_000)
    (tmp_path / "prompt").write_bytes(bytes(ids.tolist()))
    bars = []

    class Bar:
        def __init__(self, total, **how):
            bars.append([total, 0])

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def update(self, n):
            bars[-1][1] += n

    monkeypatch.setattr("ssdlib.companion.commands.tqdm", Bar)
    how = "--model", model, "--max-new-tokens", "5", "--temperature", "0"
    path = str(tmp_path / "prompt")
    status, out, _ = run(capsys, "generate", "--prompt-file", path, *how)
    assert status == 0
    params = init_params(CONFIG, jax.random.key(0))
    tokens = generate(params, CONFIG, ids[None], 5).tokens[0].tolist()
    assert out[100_000:] == bytes(tokens).decode(errors="replace") + "\n"
    total, done = bars[0]
    assert total == done > 99_000 - 2048


@pytest.mark.parametrize("n", [2047, 2048, 2049, 2050, 2051, 4098, 4099])
def test_a_prompt_near_a_piece_is_read_once_and_whole(n):
    from ssdlib.companion.commands import read_ahead

    params = init_params(CONFIG, jax.random.key(0))
    ids = np.random.default_rng(n).integers(0, 256, n).tolist()
    rest, cache = read_ahead(params, CONFIG, ids, None)
    assert rest == ids[n - len(rest) :]
    assert len(rest) >= 2
    assert (0 if cache is None else int(cache.length[0])) == n - len(rest)


def test_float16_weights_write_text(capsys, model):
    how = "--model", model, "--max-new-tokens", "4", "--dtype", "float16"
    assert run(capsys, "generate", "x", *how)[0] == 0


# --- arrays of other kinds ------------------------------------------------------------

TOKENS = np.random.default_rng(1).integers(0, 256, (2, 9))


def of_torch(values):
    return pytest.importorskip("torch").tensor(np.asarray(values))


KINDS = {
    "lists": lambda v: np.asarray(v).tolist(),
    "tuples": lambda v: tuple(map(tuple, v)) if np.ndim(v) == 2 else tuple(v),
    "torch": of_torch,
    "big-endian": lambda v: np.asarray(v).astype(">i8"),
    "unsigned": lambda v: np.asarray(v).astype(np.uint64),
    "read-only": lambda v: np.broadcast_to(v, np.shape(v)),
    "jax": jnp.asarray,
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_tokens_of_every_kind_are_read_alike(kind):
    params, lengths = init_params(CONFIG, jax.random.key(0)), np.asarray([9, 4])
    model = params, CONFIG
    ours, theirs = (TOKENS, lengths), (kind(TOKENS), kind(lengths))
    same = np.testing.assert_array_equal
    same(forward(*model, *theirs), forward(*model, *ours))
    same(
        prefill(*model, theirs[0], None, theirs[1])[0],
        prefill(*model, *ours[:1], None, lengths)[0],
    )
    cache = init_cache(CONFIG, 2)
    step = decode_step(*model, kind(TOKENS[:, 0]), cache)[0]
    same(step, decode_step(*model, TOKENS[:, 0], cache)[0])
    made = generate(*model, theirs[0], 4, lengths=theirs[1], eos_id=kind([3, 5]))
    want = generate(*model, TOKENS, 4, lengths=lengths, eos_id=[3, 5])
    same(made.tokens, want.tokens)
    loss = evaluate.evaluate(*model, kind(TOKENS[0])).nats
    assert loss == evaluate.evaluate(*model, TOKENS[0]).nats


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    "tokens",
    [
        [[1, 2], [3]],
        [["a"]],
        [[1.5]],
        [[None]],
        [[10**30]],
        [[True]],
        "ab",
        [1, 2],
        [[]],
    ],
    ids=repr,
)
def test_what_is_no_batch_of_tokens_is_named(tokens):
    with pytest.raises(ValueError, match=r"^tokens: ") as caught:
        forward(init_params(CONFIG, jax.random.key(0)), CONFIG, tokens)
    assert "\n" not in str(caught.value)


# --- the process ----------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def one_cache_of_programs(tmp_path_factory):
    """The processes below run the same programs: the first one compiles them."""
    QUIET["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("programs"))
    QUIET["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


# Greedy, the text of this model repeats itself and never meets an end.
ENDLESS = "generate", "x", "--temperature", "0", "--max-new-tokens", "2000000000"

# A shell tells what it starts in the background to ignore interrupts, and so may these
# tests have been told.
HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
MODULE = f"{HEAR}import runpy; runpy.run_module('ssdlib', run_name='__main__')"


def process_of(*argv, **options):
    """Python in a process of its own."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    env = os.environ | QUIET
    return subprocess.Popen([sys.executable, *argv], env=env, **options)


def start(*argv, **options):
    """A command in a process of its own."""
    return process_of("-X", "faulthandler", "-c", MODULE, *argv, **options)


def lines(errors):
    """Of ours: what plugins without a chip write when they are found is not."""
    log = re.compile(r"WARNING: All log|[IWE]\d{4} ")
    return [line for line in errors.decode().splitlines() if not log.match(line)]


@posix
@pytest.mark.parametrize("wait", [0.1, 1.0])
def test_an_interrupt_while_compiling_is_status_130_and_one_line(wait):
    code = (
        "import sys\n"
        "from ssdlib.__main__ import run\n"
        "sys.argv = ['ssdlib', 'inspect', '--what', 'prefill', '--tokens', '64']\n"
        "from ssdlib.companion import commands\n"
        "show = commands.compile_preset\n"
        "def told(*args):\n"
        "    print('compiling', flush=True)\n"
        "    return show(*args)\n"
        "commands.compile_preset = told\n"
        "run()"
    )
    process = process_of("-c", HEAR + code)
    assert process.stdout.readline() == b"compiling\n"
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, lines(err)) == (130, b"", ["interrupted"])


@posix
def test_an_interrupt_while_writing_is_status_130_and_one_line(model):
    process = start(*ENDLESS, "--model", model)
    assert process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, lines(err)) == (130, ["interrupted"])


@posix
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_reader_that_leaves_is_no_error(model, closed):
    """As in `| head -c 9`, and in `2>&1 | head -c 9`."""
    streams = {} if closed == "stdout" else {"stderr": subprocess.STDOUT}
    process = start(*ENDLESS, "--model", model, **streams)
    process.stdout.read(9)
    process.stdout.close()
    assert process.wait(120) == 141
    if closed == "stdout":
        assert lines(process.stderr.read()) == []
        process.stderr.close()


@posix
@pytest.mark.parametrize("close", ["1>&-", "2>&-", "1>&- 2>&-", "</dev/null"])
def test_a_stream_that_is_closed_from_the_start_is_no_error(model, close):
    command = f"exec '{sys.executable}' -m ssdlib generate x --max-new-tokens 2"
    done = subprocess.run(
        ["sh", "-c", f"{command} --model '{model}' {close}"],
        capture_output=True,
        env=os.environ | QUIET,
        timeout=120,
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"x") == ("1>" not in close)


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_has_one_line(model):
    with open("/dev/full", "wb") as full:
        process = start("generate", "x", "--model", model, stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert lines(err) == ["error: [Errno 28] No space left on device"]
