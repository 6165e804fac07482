"""The command line: `python -m ssdlib generate "The with statement"`, and more."""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading

from ssdlib.companion import commands
from ssdlib.measure import bench as benchmark


class Parser(argparse.ArgumentParser):
    """Of a command: help shows what an option is if not given; an error is one line."""

    def __init__(self, **options):
        kind = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=kind, **options)

    def error(self, message):
        """What is wrong, without all options."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def exit(self, status=0, message=None):
        """Leave, once the help is written: a closed pipe is noticed here."""
        sys.stdout.flush()
        super().exit(status, message)


# RuntimeError: no device, one without memory, a program too large for the compiler.
FAILURES = ValueError, OSError, ImportError, OverflowError, MemoryError, RuntimeError


def parsers() -> tuple[argparse.ArgumentParser, dict[str, Parser]]:
    """The parser of the command line, and that of each command."""
    parser = Parser(
        prog="python -m ssdlib",
        description="Mamba-2 in plain JAX: one program for CPU, GPU and TPU.",
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser
    )
    for add in (add_generate, add_evaluate, add_inspect, add_bench):
        add(subparsers)
    return parser, subparsers.choices


def main(argv: list[str] | None = None, keep: bool = False) -> int:
    """Run one command: 0 on success, 2 for what cannot be used or done, with one line.

    141, as usual in a shell, where nobody reads the output any more. With `keep`, what
    a model's commands compile stays on disk; those that show a compiler compile anew.
    """
    try:
        args = parsers()[0].parse_args(argv)
        if keep and not getattr(args, "no_compile_cache", True):
            commands.keep_programs()
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        return 141
    except FAILURES as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        with contextlib.suppress(OSError):
            print(f"error: {reason[0]}", file=sys.stderr, flush=True)
        return 2


def run() -> None:
    """`main` as a process of its own, which ends without a crash in any case."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        leave_on_interrupt()  # last, so that its sockets are neither of these
    if status := main(keep=True):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)  # Python would try to flush a closed pipe once more


def leave_on_interrupt() -> None:
    """End the process with status 130 and one line as soon as Ctrl-C is pressed.

    Python itself would wait for a compiler that runs, and then take itself apart while
    threads of JAX still work, which ends in a segmentation fault. So a thread waits for
    the byte that the signal writes.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    signal.signal(signal.SIGINT, lambda *_: writer)  # which it also keeps open

    def wait():
        reader.recv(1)
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def add_generate(subparsers) -> None:
    """Declare the `generate` command."""
    p = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text and stream it, until the model ends it. "
        "Statistics go to standard error.",
    )
    p.add_argument("prompt", nargs="?", help="the text to continue, - reads it")
    p.add_argument("--prompt-file", help="a file in UTF-8 with the text, - reads it")
    add_model(p)
    p.add_argument("--max-new-tokens", type=int, default=200, help="at most")
    p.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the likeliest token"
    )
    p.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    p.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="draw from the smallest set of tokens with this probability",
    )
    p.add_argument("--seed", type=int, default=0, help="same seed, same text")
    p.add_argument("--save-state", metavar="FILE", help="keep what the prompt left")
    p.add_argument("--load-state", metavar="FILE", help="go on from what one left")
    p.set_defaults(run=commands.generate)


def add_evaluate(subparsers) -> None:
    """Declare the `evaluate` command."""
    p = subparsers.add_parser(
        "evaluate",
        help="perplexity of a text",
        description=(
            "Perplexity of a text of any length in constant memory: the state is "
            "carried from piece to piece, so every token is predicted from all before "
            "it. The first token is read and not scored."
        ),
    )
    p.add_argument("--text", required=True, help="a file in UTF-8, - reads it")
    add_model(p)
    p.set_defaults(run=commands.evaluate)


def add_model(p) -> None:
    """Declare which model to load, for every command alike."""
    p.add_argument(
        "--model",
        default="tiny",
        help='"tiny" (ships with the package), a folder, or a hub id (owner/name)',
    )
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument(
        "--tokenizer", help="folder or hub id of a tokenizer.json outside the model"
    )
    add_dtype(p)
    p.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="do not keep compiled programs in the user's cache folder",
    )


def add_dtype(p) -> None:
    """Declare the dtype of the weights."""
    kinds = benchmark.DTYPES
    p.add_argument("--dtype", choices=kinds, default="float32", help="of the weights")


def add_sizes(p) -> None:
    """Declare which published model, how many rows and which dtype to compile."""
    p.add_argument("--preset", default="130m", help="130m, 370m, 780m, 1.3b or 2.7b")
    p.add_argument("--batch", type=int, default=1, help="rows, read side by side")
    add_dtype(p)


def add_inspect(subparsers) -> None:
    """Declare the `inspect` command."""
    p = subparsers.add_parser(
        "inspect",
        help="compile for a chip, here or not, and show the program",
        description="Compile a published model for a chip, attached or absent, and "
        "list its kernels by the line of JAX that they come from. Nothing is run, "
        "unless --run asks for it.",
    )
    add_sizes(p)
    programs = ["decode", "prefill"]
    p.add_argument("--what", choices=programs, default="decode", help="the program")
    p.add_argument("--target", default="cpu", help="cpu, tpu-v6e, l40s, h100, ...")
    p.add_argument("--tokens", type=int, default=1024, help="of a prefill")
    views = ["line", "kernel"]
    p.add_argument("--by", choices=views, default="line", help="what a row stands for")
    p.add_argument("--rows", type=int, default=20, help="of the table, at most")
    p.add_argument(
        "--run",
        action="store_true",
        dest="measure",  # `run` is the function of the command
        help="instead run it on the first device, random weights, and time its kernels",
    )
    p.set_defaults(run=commands.inspect)


def add_bench(subparsers) -> None:
    """Declare the `bench` command."""
    p = subparsers.add_parser(
        "bench",
        help="measure prefill, cached decode and uncached generation",
        description="Time a published model on the attached device, print a table and "
        "write a record of every sample. Weights are random unless --model is given.",
    )
    add_sizes(p)
    p.add_argument("--model", help='instead: "tiny", a folder, or a hub id')
    p.add_argument("--what", default="prefill,decode,uncached", help="what to time")
    lengths = "128,256,512,1024,2048,4096"
    p.add_argument("--lengths", default=lengths, help="tokens, between commas")
    p.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    p.add_argument("--target", help="cpu, tpu-v6e, l40s, ...: an attached device")
    p.add_argument(
        "--out",
        help="folder of the record; default: the book's in a checkout, else this one",
    )
    p.set_defaults(run=commands.bench)


if __name__ == "__main__":
    run()
