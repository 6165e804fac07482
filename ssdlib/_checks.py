"""Argument checks: each error names the argument, what it was and what it must be."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "check_fields",
    "check_floats",
    "check_integers",
    "check_is",
    "check_key",
    "check_parts",
    "check_shapes",
    "check_size",
    "check_tokens",
    "described",
    "floating",
    "is_number",
    "is_traced",
]


def described(value) -> str:
    """What an argument was, in one line: a short value, or the name of its type."""
    short = value is None or isinstance(value, (str, bool, int, float))
    return f"{value!r}" if short else f"a {type(value).__name__}"


def check_is(name: str, value, *kinds: type) -> None:
    """Raise ValueError unless value is of one of these types."""
    if not isinstance(value, kinds):
        want = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{name}: {described(value)}; it must be a {want}")


def check_size(name: str, n) -> None:
    """Raise ValueError unless n is an integer of at least 1 that fits 32 bits."""
    whole = isinstance(n, (int, np.integer)) and not isinstance(n, bool)
    if not whole or not 1 <= n < 2**31:
        raise ValueError(
            f"{name}: {described(n)}; it must be an integer of at least 1, below 2**31"
        )


def check_fields(config) -> None:
    """Raise ValueError unless a config's sizes are positive and its switches bools.

    Integers of NumPy become those of Python.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if f.type is int:
            if not (whole and value > 0):
                raise ValueError(f"{f.name}: {value!r}; it must be a positive integer")
            object.__setattr__(config, f.name, int(value))
        if f.type is bool and not isinstance(value, bool):
            raise ValueError(f"{f.name}: {value!r}; it must be a bool")


def is_traced(x) -> bool:
    """Whether x belongs to a program that JAX traces, and so has no value yet."""
    return isinstance(x, jax.core.Tracer)


def is_number(value) -> bool:
    """Whether value is one real number, of Python or in an array without axes."""
    kinds = int, float, np.number, np.ndarray, jax.Array
    return isinstance(value, kinds) and np.ndim(value) == 0


def floating(dtype, also: str = "") -> jnp.dtype:
    """The dtype of that name or type, of which `also` names others: " or int8".

    Raises ValueError unless it is floating point, and one that JAX has: without x64 it
    makes float32 of float64.
    """
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        what = described(dtype) if found is None else found
        kind = "floating point of at least 16 bits"
        raise ValueError(f"dtype: {what}; it must be {kind}{also}")
    if found == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype: float64; set jax_enable_x64 first, or take float32")
    return found


def check_key(key) -> None:
    """Raise ValueError unless key is one key of `jax.random`, typed or raw."""
    dtype, rank = getattr(key, "dtype", None), np.ndim(key) if key is not None else 0
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if dtype == jnp.uint32 and rank == 1:
        try:  # the size depends on the generator that JAX is set to
            jax.random.wrap_key_data(key)
            return
        except TypeError:
            typed = False
    if not (typed and rank == 0):
        what = described(key) if dtype is None else f"{dtype} of shape {key.shape}"
        raise ValueError(f"key: {what}; it must be a jax.random.key")


def _of_array(name: str, x) -> tuple:
    """(dtype, shape). Raises ValueError for what is no array and no number."""
    if hasattr(x, "dtype") or isinstance(x, (int, float)):
        try:
            return jnp.result_type(x), jnp.shape(x)
        except (TypeError, OverflowError):
            pass
    raise ValueError(f"{name}: {described(x)}; it must be an array of numbers")


def check_shapes(**arrays: tuple) -> dict[str, int]:
    """Bind the dimension letters of `name=(array, "b T H")` and return their sizes.

    Raises ValueError at the first array that is not floating point, has the wrong
    rank, or gives a letter a second size.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters) in arrays.items():
        (dtype, shape), letters = _of_array(name, array), letters.split()
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {dtype}; it must be floating point")
        fits = len(shape) == len(letters) and all(
            sizes.setdefault(d, n) == n for d, n in zip(letters, shape, strict=True)
        )
        if not fits:
            want = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in letters)
            raise ValueError(f"{name}: shape {shape}; it must be ({want})")
    return sizes


def check_length(name: str, sizes: dict[str, int]) -> None:
    """Raise ValueError for a sequence without tokens."""
    if sizes["T"] < 1:
        raise ValueError(f"{name}: T = 0 tokens; a sequence must hold at least 1")


def check_parts(n: int, H: int, d: int, d_xBC: int) -> None:
    """Raise ValueError if n devices get unequal parts and jax 0.7 computes them."""
    GN = (d_xBC - d) // 2
    old = jax.__version_info__ < (0, 8) and jax.config.jax_use_shardy_partitioner
    if old and (H % n or GN % n):
        raise ValueError(
            f"mesh: model = {n}; jax 0.7 computes wrong numbers unless it divides the "
            f"{H} heads and the {GN} channels of B: update jax, or use scale.parallel"
        )


def check_floats(name: str, x) -> None:
    """Raise ValueError unless x is an array of floating point numbers."""
    dtype, shape = _of_array(name, x)
    if not jnp.issubdtype(dtype, jnp.floating) or not shape:
        raise ValueError(
            f"{name}: {dtype} of shape {shape}; it must be a floating-point array"
        )


def check_integers(name: str, x, shape: tuple[str | int, ...], low: int, high: int):
    """x in int32, so that no other dtype compiles a program anew.

    A list, or a tensor of another library in the host's memory, becomes an array of
    NumPy, as does a device's array of another integer dtype. What is traced, or is
    int32 on a device, stays there. Raises ValueError unless x holds integers and has
    this shape (a str: any size), and low <= x <= high, where x is concrete.
    """
    if isinstance(x, (list, tuple)) or hasattr(x, "__array__"):
        try:
            if not isinstance(x, jax.Array):
                x = np.asarray(x)
                x = x.astype(x.dtype.newbyteorder("="), copy=False)
        except (TypeError, ValueError, RuntimeError) as error:
            why = "rows of one length, no tensor on a device of another library"
            raise ValueError(
                f"{name}: {described(x)}; it must be an array of numbers: {why}"
            ) from error
    dtype, got = _of_array(name, x)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name}: dtype {dtype}; it must hold integers")
    if len(got) != len(shape) or any(
        isinstance(want, int) and n != want for n, want in zip(got, shape, strict=True)
    ):
        want = ", ".join(map(str, shape))
        raise ValueError(f"{name}: shape {got}; it must be ({want})")
    if 0 in got:
        raise ValueError(f"{name}: shape {got} holds nothing; give at least one")
    if is_traced(x):
        return jnp.asarray(x).astype(jnp.int32)
    values = np.asarray(x)
    bad = values[(values < low) | (values > high)]
    if bad.size:
        raise ValueError(f"{name}: {bad.flat[0]} is outside {low}..{high}")
    device = isinstance(x, jax.Array) and x.dtype == jnp.int32
    return x if device else values.astype(np.int32)


def check_tokens(tokens, vocab_size: int, lengths=None, name: str = "tokens") -> tuple:
    """tokens (b, T) and lengths (b,), if any, in int32.

    Raises ValueError unless they make sense together.
    """
    tokens = check_integers(name, tokens, ("b", "T"), 0, vocab_size - 1)
    if lengths is not None:
        b, T = tokens.shape
        lengths = check_integers("lengths", lengths, (b,), 0, T)
    return tokens, lengths
