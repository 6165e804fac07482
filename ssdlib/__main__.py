"""The command line: `python -m ssdlib generate "The with statement"`, and more."""

import argparse
import sys

from ssdlib.companion import commands


class Parser(argparse.ArgumentParser):
    """Of one command; its help shows what an option is if not given."""

    def __init__(self, **options):
        kind = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=kind, **options)


def parsers() -> tuple[argparse.ArgumentParser, dict[str, Parser]]:
    """The parser of the command line, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="python -m ssdlib",
        description="Mamba-2 in plain JAX: one program for CPU, GPU and TPU.",
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser
    )
    for add in (add_generate, add_evaluate, add_inspect, add_bench):
        add(subparsers)
    return parser, subparsers.choices


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for input that cannot be used."""
    args = parsers()[0].parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_generate(subparsers) -> None:
    """Declare the `generate` command."""
    p = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text and stream it; statistics go to standard error.",
    )
    p.add_argument("prompt", help="the text to continue")
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
    p.add_argument("--seed", type=int, default=0, help="the same seed, the same text")
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
    p.add_argument("--text", required=True, help="a file in UTF-8")
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


def add_dtype(p) -> None:
    """Declare the dtype of the weights."""
    kinds = ["float32", "bfloat16"]
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
    sys.exit(main())
