"""What every worker of compare.py has, ours, and the limits of the machine.

A worker loads the checkpoint of its job, then answers each line of standard input, a
method and its arguments in JSON, with one line: {"value": ...} or {"error": ...}. What
its libraries print goes to standard error.
"""

import json
import os
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

PIECE = 1024  # tokens read at a time on the way to a long context


class Worker:
    """What all have: `read` and `feed` give logits, `greedy` makes n tokens."""

    packages: tuple[str, ...] = ()  # whose versions the record tells

    def __init__(self, job):
        self.job, self.contexts = job, {}
        self.sizes = json.loads((Path(job["folder"]) / "config.json").read_text())
        shape = job["batch"], job["prompt"] + 1
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, self.sizes["vocab_size"], shape, np.int32)
        self.load()

    def versions(self):
        """{package: version} of what runs here."""
        return {name: metadata.version(name) for name in self.packages}

    def check(self, path):
        """Save logits (2, b, V): after the prompt, and after one token more."""
        first = np.asarray(self.read(self.tokens[:, :-1]), np.float32)
        then = np.asarray(self.feed(self.tokens[:, -1]), np.float32)
        np.save(path, np.stack([first, then]))

    def prefill(self):
        """Seconds to read the prompt into an empty cache, logits of the last token."""
        return seconds(self.read, self.tokens[:, :-1])

    def decode(self, n):
        """Seconds a token, of n greedy tokens after the prompt."""
        return seconds(self.greedy, n) / n


class Ours(Worker):
    """This library, as its users call it."""

    packages = "jax", "jaxlib"

    def load(self):
        import jax

        import ssdlib

        self.lib, self.cache, dtype = ssdlib, None, self.job["dtype"]
        self.params, self.config = ssdlib.load(self.job["folder"], dtype)

        def step(params, token, cache):
            logits, cache = ssdlib.decode_step(params, self.config, token, cache)
            return logits.argmax(-1).astype("int32"), cache

        self.step = jax.jit(step, donate_argnums=2)

    def read(self, tokens, cache=None):
        logits, self.cache = self.lib.prefill(self.params, self.config, tokens, cache)
        return logits.block_until_ready()

    def feed(self, token):
        return self.lib.decode_step(self.params, self.config, token, self.cache)[0]

    def generate(self, n, cache=None):
        """Seconds a token of a whole call of `generate` after a prompt of one token."""
        prompt = self.tokens[:, -1:]
        run = partial(self.lib.generate, self.params, self.config, prompt, n)
        return seconds(lambda: run(cache=cache).tokens.block_until_ready()) / n

    def decode(self, n, context=None):
        """The loop of `generate`, less what a call costs: n + 1 tokens less 1."""
        cache = self.contexts.get(context, self.cache)
        whole = self.generate(n + 1, cache) * (n + 1)
        return (whole - self.generate(1, cache)) / n

    def steps(self, n):
        """Seconds of a bare step: n compiled steps that the host starts in turn."""
        dtype = self.params["embedding"].dtype
        token, b = self.tokens[:, -1], len(self.tokens)
        cache = self.lib.init_cache(self.config, b, dtype)
        start = time.perf_counter()
        for _ in range(n):
            token, cache = self.step(self.params, token, cache)
        token.block_until_ready()
        return (time.perf_counter() - start) / n

    def long(self, T, times=1):
        """Seconds to read T tokens in one program, the mean of so many times."""
        repeats = -(-T // self.job["prompt"])
        tokens = np.tile(self.tokens[:, :-1], repeats)[:, :T]
        return seconds(lambda: [self.read(tokens) for _ in range(times)]) / times

    def context(self, T):
        """Keep a cache that has read T tokens, for `decode`."""
        cache, read = None, 0
        while read < T:
            n = min(PIECE, T - read)
            self.read(np.tile(self.tokens, -(-n // self.tokens.shape[1]))[:, :n], cache)
            cache, read = self.cache, read + n
        self.contexts[T] = cache


class Limits:
    """What this machine can do, by one library: the best of a second of tries."""

    def __init__(self, job):
        self.package = {"XLA": "jaxlib"}.get(job["name"], job["name"].lower())
        self.array, self.jit, self.wait = np.asarray, lambda fn: fn, lambda value: None
        if job["name"] == "torch":
            import torch

            torch.set_num_threads(job["threads"])
            self.array = torch.from_numpy
        elif job["name"] == "XLA":
            import jax

            self.array, self.jit = jax.numpy.asarray, jax.jit
            self.wait = jax.block_until_ready

    def versions(self):
        return {self.package: metadata.version(self.package)}

    def best(self, fn, *args):
        """Seconds of the fastest run."""
        fn = self.jit(fn)
        self.wait(fn(*args))
        times, end = [], time.perf_counter() + 1
        while len(times) < 3 or time.perf_counter() < end:
            times.append(seconds(lambda: self.wait(fn(*args))))
        return min(times)

    def read(self, nbytes):
        """Bytes a second: a sum, or a matrix times a vector, as in `measure_cpu`."""
        shapes = (nbytes // 2**15, 2**13), 2**13
        W, v = (self.array(np.ones(shape, np.float32)) for shape in shapes)
        total = self.best(lambda W: W.sum(), W)
        return W.nbytes / min(total, self.best(lambda W, v: W @ v, W, v))

    def product(self, m, k, n):
        """FLOP/s of (m, k) x (k, n) in float32, in the better of two layouts."""
        a, W, Wt = (
            self.array(np.random.default_rng(0).random(shape, np.float32))
            for shape in ((m, k), (k, n), (n, k))
        )
        one = self.best(lambda a, W: a @ W, a, W)
        return 2 * m * k * n / min(one, self.best(lambda a, Wt: a @ Wt.T, a, Wt))


def seconds(fn, *args):
    start = time.perf_counter()
    fn(*args)
    return time.perf_counter() - start


def answer(makers):
    """Make the worker that the argument names, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    job, worker, line = json.loads(sys.argv[1]), None, '["versions"]'
    while line:
        try:
            worker = worker or makers[job["name"]](job)
            method, *args = json.loads(line)
            reply = {"value": getattr(worker, method)(*args)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(reply), file=answers, flush=True)
        line = sys.stdin.readline() if worker else ""
