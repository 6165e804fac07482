"""The command line: `python -m ssdlib generate "The with statement"`; `evaluate`."""

import argparse
import sys
import time


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m ssdlib",
        description="Mamba-2 in plain JAX: one program for CPU, GPU and TPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_generate(commands)
    add_evaluate(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_generate(commands) -> None:
    """Declare the `generate` command."""
    p = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text and stream it; statistics go to standard error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("prompt", help="the text to continue")
    add_model(p)
    p.add_argument("--max-new-tokens", type=int, default=200)
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
    p.set_defaults(run=generate)


def add_evaluate(commands) -> None:
    """Declare the `evaluate` command."""
    p = commands.add_parser(
        "evaluate",
        help="perplexity of a text",
        description=(
            "Perplexity of a text of any length in constant memory: the state is "
            "carried from piece to piece, so every token is predicted from all before "
            "it. The first token is read and not scored."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--text", required=True, help="a file in UTF-8")
    add_model(p)
    p.set_defaults(run=evaluate)


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
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def load_model(args) -> tuple:
    """(params, config, tokenizer) of the model that args name."""
    import jax

    from ssdlib import load
    from ssdlib.text import load_tokenizer

    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = load_tokenizer(args.model, args.revision)
    dtype = jax.numpy.dtype(args.dtype)
    return *load(args.model, dtype, args.revision), tokenizer


def generate(args) -> None:
    """Stream a continuation of args.prompt."""
    import jax
    import numpy as np

    from ssdlib import stream

    if not args.prompt:
        raise ValueError("prompt: it is empty; give at least one character")
    params, config, tokenizer = load_model(args)
    prompt = np.asarray([tokenizer.encode(args.prompt)], np.int32)
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
    import math
    from pathlib import Path

    import numpy as np

    from ssdlib.evaluate import evaluate as score

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


if __name__ == "__main__":
    sys.exit(main())
