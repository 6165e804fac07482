r"""Time this library and its peers on the same weights, prompt and threads of a CPU.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install . mamba2-jax==1.1.2 transformers==5.23.0 \
        torch==2.13.0 llama-cpp-python==0.3.36 gguf==0.19.0 "mlx[cpu]" mlx-lm
    python benchmarks/compare.py [--peers llama.cpp] [--what limits,own] ...

Every implementation runs in a process of its own, which waits while another is timed.
Each peer meets `ours float32` in interleaved rounds, forth and back in turn, after all
have been asked for the same logits; a ratio is ours over theirs within a round. Peers
that are not installed are named and skipped. What can be measured:

    peers   prefill of --prompt tokens, and greedy decoding after it
    narrow  the same, ours in bfloat16 and int8 beside llama.cpp in as many bits
    limits  bandwidth, of a read of as many bytes as the float32 weights have, and
            float32 products, each by XLA, NumPy and torch
    own     `generate` for 256 tokens against 256 bare steps; batch 8 against 1
    growth  prefill of 32,768 tokens against 1,024 (minutes)
    context decode after 65,536 tokens against 128 (minutes)

Prints tables and the targets of this run, and writes a record: schema.json beside it
says what each field means. The ssdlib measured is the one that Python finds, so
PYTHONPATH chooses it. Run nothing beside it. 2.7b needs 30 GB to write its checkpoint.
Where a virtual machine lists AMX and does not allow it, llama.cpp's 8 bits need a build
with GGML_NATIVE=OFF and GGML_AVX512, GGML_AVX512_VNNI, ... ON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
import report
from peers import LIMITS, PEERS

import ssdlib
from ssdlib.compiler import targets
from ssdlib.measure import bench, record, roofline

WHAT = "peers", "narrow", "limits", "own", "growth", "context"
SETTLE = 0.1  # seconds: the threads of the last one stop spinning
SAMPLE = 2.0  # seconds of decoding in a sample, at most about
FEW = 8  # tokens of the least sample
SQUARE = 3000  # rows of the large product


def main(argv: list[str] | None = None) -> int:
    """Measure what the arguments say; print, and write the record."""
    args = arguments(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that it starts
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):  # the only limit that XLA's threads obey
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    config = ssdlib.Mamba2Config.preset(args.size)
    facts = record.provenance(targets.attached()) | {"command": command(args)}
    facts["load"] = record.load_average()
    for name in ("size", "batch", "prompt", "tokens", "threads", "repeats"):
        facts[name] = getattr(args, name)
    facts |= {"pairs": [], "limits": {}, "skipped": {}}
    path = record.writable(args.out) / f"cpu-{args.size}-{stamp(facts['date'])}.json"
    with tempfile.TemporaryDirectory() as folder:
        params = ssdlib.init_params(config, jax.random.key(0))
        ssdlib.save(folder, params, config)
        del params
        for what in args.what:
            MEASURE[what](Run(args, folder, config, facts))
            facts["targets"] = report.targets(facts, config)
            path.write_text(json.dumps(record.rounded(facts), indent=1) + "\n")
    report.show(facts)
    print(f"\nwritten: {path}")
    return 0


def arguments(argv):
    """The options, checked."""
    p = argparse.ArgumentParser(
        description="Time ssdlib and its peers on one CPU, in interleaved pairs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--size", default="130m", help="130m, 370m, 780m, 1.3b or 2.7b")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--prompt", type=int, default=1024, help="tokens of a prefill")
    p.add_argument("--tokens", type=int, default=64, help="decoded, at most")
    p.add_argument("--dtype", type=names, default="float32,bfloat16,int8,q8_0")
    p.add_argument("--peers", type=names, default=",".join(PEERS))
    p.add_argument("--what", type=names, default=",".join(WHAT))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    p.add_argument("--out", default=record.RUNS.parent / "compare", help="folder")
    args = p.parse_args(argv)
    for option, known in (("peers", PEERS), ("what", WHAT)):
        if unknown := set(getattr(args, option)) - set(known):
            p.error(f"--{option}: {unknown.pop()}; it must be of {', '.join(known)}")
    for option in ("batch", "prompt", "tokens", "threads", "repeats"):
        if getattr(args, option) < 1:
            p.error(f"--{option}: {getattr(args, option)}; it must be at least 1")
    return args


def names(text):
    return text.split(",")


def command(args):
    """What makes such a record again; paths left out."""
    words = ["python benchmarks/compare.py"]
    for name, value in vars(args).items():
        if name != "out":
            text = ",".join(value) if isinstance(value, list) else value
            words.append(f"--{name} {text}")
    return " ".join(words)


def stamp(date):
    return date.replace("-", "").replace(":", "").replace("T", "-").rstrip("Z")


# --- processes ------------------------------------------------------------------------


class Peer:
    """A worker process: call it with a method and its arguments."""

    def __init__(self, run, name, dtype="float32", batch=None):
        args, self.label = run.args, f"{name} {dtype}"
        job = dict(name=name, dtype=dtype, folder=run.folder, threads=args.threads)
        job |= dict(batch=batch or args.batch, prompt=args.prompt)
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            env.pop(name, None)  # OpenBLAS then takes its best kernels
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("peers.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        try:
            run.facts["versions"] |= self._answer()
        except RuntimeError:
            self.__exit__()
            raise

    def __call__(self, *line):
        time.sleep(SETTLE)
        print(json.dumps(line), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:  # a negative code is that of a signal: -4, an illegal instruction
            raise RuntimeError(f"the process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()  # its input ends, and so does it


class Run:
    """The arguments, the checkpoint, and the record that grows."""

    def __init__(self, args, folder, config, facts):
        self.args, self.folder, self.config, self.facts = args, folder, config, facts

    @contextmanager
    def skipping(self, label):
        """What fails in here is named in the record, and the rest goes on."""
        print(f"{label} ...", file=sys.stderr, flush=True)
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            self.facts["skipped"][label] = str(error)
            print(f"{label} skipped: {error}", file=sys.stderr)

    def pair(self, what, a, b, **more):
        """Time two samplers, (label, function) each, in interleaved rounds."""
        samplers = {(f"{what}, {label}", 1): sample for label, sample in (a, b)}
        seconds = bench.rounds(samplers, more.pop("repeats", self.args.repeats))
        self.facts["pairs"].append(
            report.compared(what, a[0], b[0], *seconds.values()) | more
        )


# --- what can be measured -------------------------------------------------------------


def peers(run):
    """Every implementation and dtype against ours in float32."""
    with run.skipping(report.BASE), Peer(run, "ours") as ours:
        want, n = logits(run, ours), count(ours, run.args.tokens)
        for name in run.args.peers:
            for dtype in [d for d in PEERS[name][1] if d in run.args.dtype]:
                label = f"{name} {dtype}"
                if label == report.BASE:
                    continue
                with run.skipping(label), Peer(run, name, dtype) as peer:
                    same = report.agreement(logits(run, peer), want)
                    both_phases(
                        run, (ours, n), (peer, count(peer, run.args.tokens)), same
                    )


def both_phases(run, ours, theirs, same):
    """Pairs of prefill and of decode; each with the tokens of its decode sample."""
    for what in ("prefill", "decode"):
        a, b = (
            (peer.label, partial(peer, what, *[n] * (what == "decode")))
            for peer, n in (ours, theirs)
        )
        run.pair(what, a, b, **same)


def narrow(run):
    """Ours in 16 and in 8 bits a weight beside llama.cpp in as many."""
    for dtype, theirs in (("bfloat16", "bfloat16"), ("int8", "q8_0")):
        label = f"ours {dtype}, llama.cpp {theirs}"
        with run.skipping(label), Peer(run, "ours", dtype) as ours:
            want, n = logits(run, ours), count(ours, run.args.tokens)
            with Peer(run, "llama.cpp", theirs) as peer:
                same = report.agreement(logits(run, peer), want)
                both_phases(run, (ours, n), (peer, count(peer, run.args.tokens)), same)


def logits(run, peer):
    path = Path(run.folder) / "logits.npy"
    peer("check", str(path))
    return np.load(path)


def count(peer, most):
    """Tokens of a decode sample: compiled and warm, about SAMPLE seconds at most."""
    peer("decode", FEW)
    return max(FEW, min(most, round(SAMPLE / max(1e-6, peer("decode", FEW)))))


def limits(run):
    """Bytes and FLOP a second by each library, one after another."""
    c = run.config
    weights = 4 * sum(roofline.parameters(c).values())
    in_projection = run.args.prompt, c.d_model, c.d_inner + c.d_xBC + c.n_heads
    for name in LIMITS:
        with run.skipping(name), Peer(run, name) as library:
            run.facts["limits"][name] = {
                "read": library("read", weights),
                "in_projection": library("product", *in_projection),
                "square": library("product", SQUARE, SQUARE, SQUARE),
            }


def own(run):
    """What a call of `generate` adds to its steps, and what a batch gains."""
    with run.skipping(report.BASE), Peer(run, "ours") as one:
        a = "generate(256)", partial(one, "generate", 256)
        run.pair("token", a, ("256 bare steps", partial(one, "steps", 256)))
    for dtype in ("float32", "int8"):
        label = f"ours {dtype}, batch 8"
        with run.skipping(label), Peer(run, "ours", dtype) as one:
            with Peer(run, "ours", dtype, batch=8) as eight:
                n = count(one, run.args.tokens), count(eight, run.args.tokens)
                a = f"{dtype}, batch 8", partial(eight, "decode", n[1])
                b = f"{dtype}, batch 1", partial(one, "decode", n[0])
                run.pair("decode", a, b)


def growth(run):
    """Time of a long prefill in one program against a short one."""
    with run.skipping(report.BASE), Peer(run, "ours") as ours:
        a = "32768 tokens", partial(ours, "long", 32768)
        b = "1024 tokens", partial(ours, "long", 1024, 8)  # as steady as the long one
        run.pair("prefill", a, b, repeats=1)


def context(run):
    """Time of a decode step after a long context against a short one."""
    with run.skipping(report.BASE), Peer(run, "ours") as ours:
        a, b = (("after 65536", 65536), ("after 128", 128))
        for _, T in (a, b):
            ours("context", T)
        n = count(ours, run.args.tokens)
        a, b = ((label, partial(ours, "decode", n, T)) for label, T in (a, b))
        run.pair("decode", a, b)


MEASURE = dict(zip(WHAT, (peers, narrow, limits, own, growth, context), strict=True))


if __name__ == "__main__":
    sys.exit(main())
