"""Honest timing of prefill, cached decode and uncached generation.

    seconds = median over rounds;  a round times every row once, forth or back in turn

Compilation and one warm-up round come before the first sample, and every sample waits
for the device. `prefill` reads T tokens into a cache. `decode` is the loop of
`generate` after T tokens: the time of 64 tokens less that of 1, divided by 63, so that
its prefill and what a call costs cancel. `uncached` makes one token by `forward` over
all T. Only what ran on an attached device gets a record: see `record`.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ssdlib._checks import check_is, check_size
from ssdlib.cache import init_cache
from ssdlib.compiler.chips import CHIPS, Chip
from ssdlib.compiler.targets import attached, chip_name
from ssdlib.compiler.view import count
from ssdlib.generate import generate
from ssdlib.measure import record, roofline
from ssdlib.measure.roofline import Work, with_chunks_of
from ssdlib.model import forward, prefill
from ssdlib.params import Mamba2Config, Params, check_params, init_params

__all__ = ["LENGTHS", "WHAT", "bench", "rounds", "shapes", "work"]

WHAT = ("prefill", "decode", "uncached")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16", "int8")  # of the weights
LOOP = 64  # tokens of a decode sample, less one
PIECE = 128  # tokens read at a time before a decode sample

Key = tuple[str, int]  # what and length: one row of the table


@dataclass(frozen=True)
class Program:
    """One row of the table, ready to run, and how it was compiled."""

    sample: Callable[[], float]  # seconds of one pass, or of one step of the loop
    compile_seconds: float
    temp: int | None = None  # bytes beside arguments and results
    cache: int | None = None  # bytes of the cache that decoding gives back


def bench(
    config: Mamba2Config,
    what: Sequence[str] = WHAT,
    lengths: Sequence[int] = LENGTHS,
    *,
    batch: int = 1,
    dtype: str = "float32",
    repeats: int = 5,
    target: str | None = None,
    params: Params | None = None,
    name: str = "custom",
    command: str = "",
) -> dict:
    """Measure, and return a record: `record.save` writes it, `record.table` shows it.

    `what` and `lengths` are the kinds of work and the tokens that are timed. `params`
    None means random weights: time does not depend on their values. `target`
    names an attached chip, None the first device. Costs repeats + 1 times the sum of
    all rows, and their compilation.

    Raises ValueError for arguments out of range, for a target that is not attached,
    and, before anything is allocated, for sizes that do not fit the memory.
    """
    check_is("config", config, Mamba2Config)
    _check(what, lengths, batch, dtype, repeats)
    if params is not None:
        check_params(params, config)
    check_is("name", name, str)
    check_is("command", command, str)
    device = attached(target)
    keys = [(w, T) for T in sorted({*lengths}) for w in WHAT if w in what]
    sizes = config, batch, dtype
    shaped = with_chunks_of(device.platform, config), batch, dtype
    facts = {
        **record.provenance(device),
        "command": command,
        "model": record.model(config, name, params is not None),
        "batch": batch,
        "dtype": dtype,
        "precision": jax.config.jax_default_matmul_precision or "default",
        "repeats": repeats,
    }
    with jax.default_device(device), _explained(batch, lengths):
        load = record.load_average()
        programs, memory = _prepare(keys, sizes, params, device)
        peak = _peak(device, dtype, memory["weights"])
        seconds = rounds({key: p.sample for key, p in programs.items()}, repeats)
        peak = _peak(device, dtype, memory["weights"], peak)
    facts["load"] = {"before": load, "after": record.load_average()}
    facts["memory"] = memory | {"peak": record.peak_memory(device)}
    facts["peak"] = None if peak is None else peak.peaks
    facts["rows"] = [
        record.row(key, batch, programs[key], seconds[key], work(key, *shaped), peak)
        for key in keys
    ]
    return record.rounded(facts | {"speedups": record.speedups(seconds)})


def rounds(
    samplers: dict[Key, Callable[[], float]], repeats: int
) -> dict[Key, list[float]]:
    """Call each once to warm up, then `repeats` times in turn, every other turn back.

    A drift of the machine's speed thus meets all rows alike.
    """
    seconds = {key: [] for key in samplers}
    with _bar((repeats + 1) * len(samplers), "run") as progress:
        for i in range(repeats + 1):
            for what, T in list(samplers)[:: -1 if i % 2 else 1]:
                progress.set_postfix_str(f"{what} {T}")
                sample = samplers[what, T]()
                if sample <= 0:  # of a difference
                    raise ValueError(
                        f"what: {what} at {T} tokens takes less than the noise of this "
                        "machine; run nothing beside it, or take a larger model"
                    )
                if i:
                    seconds[what, T].append(sample)
                progress.update()
    return seconds


def work(key: Key, config: Mamba2Config, batch: int, dtype: str = "float32") -> Work:
    """FLOPs and least bytes of one sample."""
    (what, T), itemsize = key, jnp.dtype(dtype).itemsize
    if what == "decode":
        return roofline.decode(config, batch, itemsize)
    read = roofline.prefill if what == "prefill" else roofline.forward
    return read(config, batch, T, itemsize)


def _peak(device, dtype: str, nbytes: int, before: Chip | None = None) -> Chip | None:
    """The chip's published peaks; a CPU's are measured, the best of two times."""
    if device.platform != "cpu":
        return (chip := CHIPS.get(chip_name(device))) and chip.at(dtype)
    now = roofline.measure_cpu(nbytes=nbytes)
    if before is not None:
        flops = max(now.flops, before.flops)
        now = replace(now, flops=flops, bandwidth=max(now.bandwidth, before.bandwidth))
    return now


# --- from sizes to programs that are ready to run ------------------------------------


def _prepare(keys, sizes, params, device) -> tuple[dict[Key, Program], dict]:
    """Check that all fits, compile, and only then allocate."""
    config, batch, dtype = sizes
    free = record.free_memory(device)
    weights, cache = shapes(*sizes)
    memory = {"weights": _nbytes(weights), "cache": _nbytes(cache), "free": free}
    held = memory["weights"] * (params is None)
    held += memory["cache"] * (2 + sum(w == "decode" for w, _ in keys))
    if device.platform == "cpu":
        held += memory["weights"]  # as many bytes are read to measure the bandwidth
    for what, T in keys:  # the logits of a pass are sure, the rest the compiler knows
        logits = 4 * batch * config.vocab_size * (T if what == "uncached" else 1)
        _check_memory(held + logits, free, device, what, T, batch)
    compiled = {}
    passes = [key for key in keys if key[0] != "decode"]
    with _bar(len(passes), "compile") as progress:
        for what, T in passes:
            program, seconds = _compile(what, T, sizes)
            stats = program.memory_analysis()
            temp, out = stats.temp_size_in_bytes, stats.output_size_in_bytes
            _check_memory(held + temp + out, free, device, what, T, batch)
            compiled[what, T] = program, seconds, temp
            progress.update()
    if params is None:
        params = init_params(config, jax.random.key(0), dtype)
    params = jax.device_put(params, device)
    cache = init_cache(config, batch, params["embedding"].dtype)
    programs = {}
    for (what, T), (program, *known) in compiled.items():
        tokens = jnp.asarray(_tokens(config, batch, T))
        args = (params, tokens, cache)[: 3 if what == "prefill" else 2]
        programs[what, T] = Program(partial(_seconds, program, *args), *known)
    return programs | _decoders(keys, params, config, cache, batch), memory


def _compile(what: str, T: int, sizes) -> tuple[jax.stages.Compiled, float]:
    """(program, seconds in the compiler), from shapes alone."""
    config, batch, _ = sizes
    weights, cache = shapes(*sizes)
    tokens = jax.ShapeDtypeStruct((batch, T), jnp.int32)
    args = weights, config, tokens
    fn, args = (prefill, (*args, cache)) if what == "prefill" else (forward, args)
    start = time.perf_counter()
    program = jax.jit(fn, static_argnums=1).lower(*args).compile()
    return program, time.perf_counter() - start


def _decoders(keys, params, config, cache, batch) -> dict[Key, Program]:
    """A program for each length to decode after, with a cache that has read it."""
    programs, read = {}, 0
    lengths = [T for what, T in keys if what == "decode"]
    tokens = _tokens(config, batch, max(lengths, default=0))
    for T in lengths:
        if read < T:
            _, cache = prefill(params, config, tokens[:, read:T], cache, piece=PIECE)
        read = T
        run = partial(generate, params, config, tokens[:, -1:], cache=cache)
        first, again, cached = _seconds(run, LOOP), _seconds(run, LOOP), run(1).cache
        compiling = max(0.0, first - again)
        programs["decode", T] = Program(
            partial(_step, run), compiling, cache=cached.nbytes
        )
    return programs


def _step(run) -> float:
    """Seconds of one step of the loop."""
    return (_seconds(run, LOOP) - _seconds(run, 1)) / (LOOP - 1)


def _seconds(fn, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def _tokens(config, batch, T):
    """Random tokens: time does not depend on them."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, T), np.int32)


def shapes(config: Mamba2Config, batch: int, dtype: str):
    """(weights, cache) without their values: to compile with."""
    weights = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    dtype = weights["embedding"].dtype
    return weights, jax.eval_shape(lambda: init_cache(config, batch, dtype))


def _nbytes(tree) -> int:
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))


# --- checks --------------------------------------------------------------------------


def _check(what, lengths, batch, dtype, repeats) -> None:
    """Raise ValueError for arguments that make no sense."""
    for name, values in (("what", what), ("lengths", lengths)):
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name}: {values!r}; it must be a list of at least one")
    for w in what:
        if w not in WHAT:
            raise ValueError(f"what: {w!r}; it must be of {', '.join(WHAT)}")
    for T in lengths:
        check_size("lengths", T)
    check_size("batch", batch)
    check_size("repeats", repeats)
    if repeats < 3:
        raise ValueError(f"repeats: {repeats}; it must be 3 or more")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; it must be of {', '.join(DTYPES)}")


def _check_memory(need, free, device, what, T, batch) -> None:
    """Raise ValueError if need is more than is free, where that is known."""
    if free is not None and need > free:
        raise ValueError(
            f"lengths: {what} of {batch} x {T} tokens needs {count(need, 'B')} at "
            f"least, and {device.device_kind} has {count(free, 'B')} free; take a "
            "smaller preset, batch or length"
        )


@contextlib.contextmanager
def _explained(batch, lengths):
    """Say in one line what a compiler or an allocator says in hundreds."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"lengths: {batch} x {max(lengths)} tokens do not fit the memory of this "
            "device; take a smaller preset, batch or length"
        ) from error


def _bar(total: int, name: str) -> tqdm:
    return tqdm(total=total, desc=name, unit="", leave=False, disable=None)
