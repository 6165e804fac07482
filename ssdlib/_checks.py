"""Argument checks: each error names the argument, what it was and what it must be."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_integers", "check_range", "check_shapes", "check_tokens"]


def check_shapes(**arrays: tuple) -> dict[str, int]:
    """Bind the dimension letters of `name=(array, "b T H")` and return their sizes.

    Raises ValueError at the first array that is not floating point, has the wrong
    rank, or gives a letter a second size.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters) in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(
                f"{name}: dtype {jnp.result_type(array)}; it must be floating point"
            )
        letters, shape = letters.split(), jnp.shape(array)
        fits = len(shape) == len(letters) and all(
            sizes.setdefault(d, n) == n for d, n in zip(letters, shape, strict=True)
        )
        if not fits:
            want = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in letters)
            raise ValueError(f"{name}: shape {shape}; it must be ({want})")
    return sizes


def check_integers(name: str, x, shape: tuple[str | int, ...]) -> None:
    """Raise ValueError unless x holds integers and has this shape (a str: any size)."""
    if isinstance(x, (list, tuple)):
        raise ValueError(f"{name}: a {type(x).__name__}; it must be an array")
    dtype, got = jnp.result_type(x), jnp.shape(x)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name}: dtype {dtype}; it must hold integers")
    if len(got) != len(shape) or any(
        isinstance(want, int) and n != want for n, want in zip(got, shape, strict=True)
    ):
        want = ", ".join(map(str, shape))
        raise ValueError(f"{name}: shape {got}; it must be ({want})")
    if 0 in got:
        raise ValueError(f"{name}: shape {got} holds nothing; give at least one")


def check_range(name: str, x, low: int, high: int) -> None:
    """Raise ValueError unless low <= x <= high, where x is concrete."""
    if isinstance(x, jax.core.Tracer):  # inside a compiled program: nothing to see
        return
    values = np.asarray(x)
    bad = values[(values < low) | (values > high)]
    if bad.size:
        raise ValueError(f"{name}: {bad.flat[0]} is outside {low}..{high}")


def check_tokens(tokens, vocab_size: int, lengths=None, name: str = "tokens") -> None:
    """Raise ValueError unless tokens (b, T) and lengths (b,) make sense together."""
    check_integers(name, tokens, ("b", "T"))
    check_range(name, tokens, 0, vocab_size - 1)
    if lengths is not None:
        b, T = jnp.shape(tokens)
        check_integers("lengths", lengths, (b,))
        check_range("lengths", lengths, 1, T)
