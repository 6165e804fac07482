"""What the commands of `python -m ssdlib` do with their arguments.

`__main__` declares the arguments. Results go to standard output; speed and progress to
standard error.
"""

import math
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ssdlib
from ssdlib import Mamba2Config, load, stream
from ssdlib.checkpoint.tokenizer import load_tokenizer
from ssdlib.compiler.chips import CHIPS
from ssdlib.compiler.targets import attached
from ssdlib.compiler.view import count
from ssdlib.evaluate import evaluate as score
from ssdlib.measure import bench as benchmark
from ssdlib.measure import estimate, record, roofline


def announce(what: str) -> None:
    """Print on standard error what takes seconds, if that is a terminal."""
    if sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)


def load_model(args) -> tuple:
    """(params, config, tokenizer) of the model that args name."""
    announce(f"loading {args.model}")
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = load_tokenizer(args.model, args.revision)
    dtype = jax.numpy.dtype(args.dtype)
    return *load(args.model, dtype, args.revision), tokenizer


def generate(args) -> None:
    """Stream a continuation of args.prompt."""
    if not args.prompt:
        raise ValueError("prompt: it is empty; give at least one character")
    params, config, tokenizer = load_model(args)
    prompt = np.asarray([tokenizer.encode(args.prompt)], np.int32)
    announce(f"compiling for {jax.devices()[0].device_kind}")
    start = time.perf_counter()
    blocks = stream(
        params,
        config,
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_id=tokenizer.eos_id,
        key=jax.random.key(args.seed),
    )
    print(args.prompt, end="", flush=True)
    ids, shown, first = [], 0, None
    for block in blocks:
        ids += [int(i) for i in block[0]]
        if tokenizer.eos_id in ids:
            ids = ids[: ids.index(tokenizer.eos_id)]
        text = tokenizer.decode(ids).rstrip("\ufffd")  # half a character waits
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
        first = first or (len(ids), time.perf_counter())
    print()
    (n_first, t_first), t_last = first, time.perf_counter()
    line = f"{len(ids)} tokens; first {n_first} after {t_first - start:.1f} s"
    if len(ids) > n_first:
        line += f", then {(len(ids) - n_first) / (t_last - t_first):.0f} tokens/s"
    print(f"{line} on {jax.devices()[0].device_kind}", file=sys.stderr)


def evaluate(args) -> None:
    """Print tokens, loss, perplexity and bits per byte of args.text."""
    try:
        text = Path(args.text).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {args.text} is not UTF-8 ({error})") from error
    params, config, tokenizer = load_model(args)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"text: {args.text} has {len(ids)} tokens; it needs 2 or more")
    start = time.perf_counter()
    result = score(params, config, np.asarray(ids, np.int32))
    seconds = time.perf_counter() - start
    scored = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    print(f"tokens scored   {result.tokens}")
    print(f"nats per token  {result.loss:.6f}")
    print(f"perplexity      {result.perplexity:.4f}")
    print(f"bits per byte   {result.nats / math.log(2) / scored:.6f}")
    print(f"{result.tokens / seconds:.0f} tokens/s", file=sys.stderr)


def inspect(args) -> None:
    """Print the table of kernels of args.preset on args.target, and its totals."""
    for name in ("batch", "tokens", "rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: {getattr(args, name)}; it must be at least 1")
    config = Mamba2Config.preset(args.preset)
    program = compile_preset(args, config)
    print(program.show(args.rows, args.by))
    if args.what == "decode":
        sizes = config, args.batch
    else:
        sizes = config, args.batch, args.tokens
    itemsize = {"float32": 4, "bfloat16": 2}[args.dtype]
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
        chip = CHIPS[args.target]
        print(f"roofline of {chip.name}: {work.seconds(chip) * 1e3:.3g} ms at least")
    if args.target == estimate.TARGET:
        print(f"estimate of its time: {estimate.estimate(program).ms}; see chapter 08")
    memory = ", ".join(f"{k} {count(v, 'B')}" for k, v in program.memory.items())
    print(f"memory: {memory}")


def compile_preset(args, config):
    """The compiled decode step or prefill that the arguments describe."""
    params, cache = benchmark.shapes(config, args.batch, args.dtype)
    shape = (args.batch,) if args.what == "decode" else (args.batch, args.tokens)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    fn = ssdlib.decode_step if args.what == "decode" else ssdlib.prefill
    return ssdlib.compile_for(
        fn, params, config, tokens, cache, target=args.target, donate_argnums=3
    )


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
        params, config = load(args.model, jax.numpy.dtype(args.dtype))
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
