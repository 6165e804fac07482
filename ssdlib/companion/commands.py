"""What the commands of `python -m ssdlib` do with their arguments.

`__main__` declares the arguments. Results go to standard output; speed and progress to
standard error.
"""

import contextlib
import hashlib
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import ssdlib
from ssdlib import Mamba2Config, load, prefill, stream
from ssdlib._checks import check_size
from ssdlib.checkpoint.tokenizer import added_text, end_ids, load_tokenizer
from ssdlib.compiler import profile
from ssdlib.compiler.chips import CHIPS
from ssdlib.compiler.targets import attached
from ssdlib.compiler.view import count
from ssdlib.evaluate import evaluate as score
from ssdlib.generate import LONGEST
from ssdlib.measure import bench as benchmark
from ssdlib.measure import estimate, record, roofline
from ssdlib.model import pieces


def announce(what: str) -> None:
    """Print on standard error what takes seconds, if that is a terminal."""
    if sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)


def keep_programs() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless it has its own.

    A folder for each kind of processor: a program for another one may not run here.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    flags = record.proc("/proc/cpuinfo", "flags")  # of x86; an ARM has Features
    flags = flags or record.proc("/proc/cpuinfo", "Features")
    kind = f"{platform.machine()} {flags} {jax.__version__}"
    name = hashlib.sha256(kind.encode()).hexdigest()[:12]
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one to read alone
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "ssdlib", name)
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", 2**30)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def load_model(args) -> tuple:
    """(params, config, tokenizer) of the model that args name."""
    announce(f"loading {args.model}")
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = load_tokenizer(args.model, args.revision)
    return *load(args.model, args.dtype, args.revision), tokenizer


def read_text(name: str, path: str) -> str:
    """The text of a file in UTF-8, as it is; of standard input for "-"."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 ({error})") from error


def generate(args) -> None:
    """Stream a continuation of args.prompt."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError(
            "prompt: give either a text, or - to read it, or --prompt-file"
        )
    if not 0 <= args.seed < 2**32:  # JAX would take it modulo 2**32
        raise ValueError(f"seed: {args.seed}; it must be at least 0, below 2**32")
    prompt = args.prompt
    if prompt in (None, "-"):
        prompt = read_text("prompt", args.prompt_file or "-")
    if not prompt:
        raise ValueError("prompt: it is empty; give at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # a shell passes on any bytes
        raise ValueError(f"prompt: it is not UTF-8 ({error})") from error
    params, config, tokenizer = load_model(args)
    ends = end_ids(args.model, tokenizer, config.vocab_size, args.revision)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("prompt: the tokenizer makes no token of it")
    cache = args.load_state and ssdlib.load_cache(args.load_state, config, params)
    announce(f"compiling for {jax.devices()[0].device_kind}")
    start = time.perf_counter()
    rest, cache = read_ahead(params, config, ids, cache)
    if args.save_state:
        _, read = prefill(params, config, np.asarray([rest]), cache)
        ssdlib.save_cache(args.save_state, read, config, params)
    blocks = stream(
        params,
        config,
        np.asarray([rest]),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_id=ends or None,
        key=jax.random.key(args.seed),
        cache=cache,
    )
    print(prompt, end="", flush=True)
    counts: list[tuple] = []  # tokens of a block, and when it came

    def parts():
        for block in blocks:
            part = [int(i) for i in block[0]]
            end = next((n for n, i in enumerate(part) if i in ends), len(part))
            counts.append((end, time.perf_counter()))
            yield part[:end]

    for text in added_text(tokenizer, ids, parts()):
        print(text, end="", flush=True)
    print()
    (n_first, t_first), n = counts[0], sum(n for n, _ in counts)
    line = f"{n} tokens; first {n_first} after {t_first - start:.1f} s"
    if n > n_first:
        line += f", then {(n - n_first) / (time.perf_counter() - t_first):.0f} tokens/s"
    print(f"{line} on {jax.devices()[0].device_kind}", file=sys.stderr)


def read_ahead(params, config, ids: list[int], cache) -> tuple:
    """(tokens that are left to read, the cache after those before): shows its progress.

    Two tokens or more are left, as one that ends a text would say that it has ended.
    """
    n = max(0, len(ids) - 2) // LONGEST * LONGEST
    bar = dict(unit=" tokens", delay=2, leave=False, disable=None)
    with tqdm(total=n, **bar) as progress:
        for part, _ in pieces(np.asarray([ids[:n]]), None, LONGEST) if n else ():
            logits, cache = prefill(params, config, part, cache)
            logits.block_until_ready()
            progress.update(LONGEST)
    return ids[n:], cache


def evaluate(args) -> None:
    """Print tokens, loss, perplexity and bits per byte of args.text."""
    text = read_text("text", args.text)
    params, config, tokenizer = load_model(args)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"text: {args.text} has {len(ids)} tokens; it needs 2 or more")
    start = time.perf_counter()
    result = score(params, config, np.asarray(ids, np.int32))
    seconds = time.perf_counter() - start
    first = tokenizer.decode(ids[:1])
    if not text.startswith(first):  # it ends inside of a character
        first = first.replace("\ufffd", "?")  # of which it holds a byte or two
    scored = len(text.encode()) - len(first.encode())
    print(f"tokens scored   {result.tokens}")
    print(f"nats per token  {result.loss:.6f}")
    print(f"perplexity      {result.perplexity:.4f}")
    print(f"bits per byte   {result.nats / math.log(2) / scored:.6f}")
    print(f"{result.tokens / seconds:.0f} tokens/s", file=sys.stderr)


def inspect(args) -> None:
    """Print the kernels of args.preset on args.target and totals, or their times."""
    for name in ("batch", "tokens", "rows"):
        check_size(name, getattr(args, name))
    config = Mamba2Config.preset(args.preset)
    if args.measure:
        print(run_preset(args, config).table(args.rows, args.by))
        return
    program = compile_preset(args, config)
    print(program.show(args.rows, args.by))
    config = roofline.with_chunks_of(args.target.split("-")[0], config)
    sizes = (config, args.batch, args.tokens)[: 2 if args.what == "decode" else 3]
    itemsize = jnp.dtype(args.dtype).itemsize
    work = getattr(roofline, args.what)(*sizes, itemsize)
    cycles = (
        ""
        if program.cycles is None
        else f", {count(program.cycles)} cycles (its estimate)"
    )
    flops, size = count(program.flops, "FLOP"), count(program.bytes, "B")
    print(
        f"\n{program.launches} kernels, {program.fusions} fusions, custom calls: "
        f"{program.custom_calls or 'none'}; compiled in {program.compile_seconds} s\n"
        f"compiled: {flops}, {size}{cycles}\n"
        f"by hand:  {count(work.flops, 'FLOP')}, {count(work.bytes, 'B')} at least"
    )
    if args.target in CHIPS:
        chip = CHIPS[args.target].at(args.dtype)
        print(f"roofline of {chip.name}: {work.seconds(chip) * 1e3:.3g} ms at least")
    if args.target == estimate.TARGET:
        print(f"estimate of its time: {estimate.estimate(program).ms}; see chapter 9")
    memory = ", ".join(f"{k} {count(v, 'B')}" for k, v in program.memory.items())
    print(f"memory: {memory}")


def preset(args, config) -> tuple:
    """The decode step or prefill that the arguments describe, and its own: shapes."""
    params, cache = benchmark.shapes(config, args.batch, args.dtype)
    shape = (args.batch,) if args.what == "decode" else (args.batch, args.tokens)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    fn = ssdlib.decode_step if args.what == "decode" else ssdlib.prefill
    return fn, params, config, tokens, cache


def compile_preset(args, config):
    """That program, compiled for args.target."""
    options = dict(target=args.target, donate_argnums=3)
    return ssdlib.compile_for(*preset(args, config), **options)


def run_preset(args, config):
    """That program, run on the first device with random weights, kernel by kernel."""
    announce(f"running on {jax.devices()[0].device_kind}")
    fn, _, _, *rest = preset(args, config)
    params = ssdlib.init_params(config, jax.random.key(0), args.dtype)
    rest = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), rest)
    return profile.measure(fn, params, config, *rest, donate_argnums=3)


def bench(args) -> None:
    """Measure what args say, print the table and write the record."""
    if not re.fullmatch(r"\d+(,\d+)*", args.lengths):
        raise ValueError(
            f"lengths: {args.lengths!r}; it must be numbers between commas: 128,512"
        )
    what, lengths = args.what.split(","), [int(n) for n in args.lengths.split(",")]
    folder = record.writable(args.out)
    if args.model is None:
        params, config = None, Mamba2Config.preset(args.preset)
        name, which = args.preset, f"--preset {args.preset}"
    else:
        attached(args.target)  # before a long download
        params, config = load(args.model, args.dtype)
        path = Path(args.model)  # a record tells no paths, but the owner of a hub id
        name = path.resolve().name
        which = f"--model {name if path.exists() else args.model}"
    if args.target is not None:
        which += f" --target {args.target}"
    options = {k: getattr(args, k) for k in ("batch", "dtype", "repeats")}
    command = f"python -m ssdlib bench {which} --what {args.what} --lengths "
    command += " ".join([args.lengths, *(f"--{k} {v}" for k, v in options.items())])
    options |= dict(target=args.target, params=params, name=name, command=command)
    result = benchmark.bench(config, what, lengths, **options)
    print(record.table(result))
    print(f"\nwritten: {record.save(result, folder)}")
