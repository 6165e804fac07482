"""A wrong argument of a public function raises a ValueError that names it, at once."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import ssd_inputs

import ssdlib
from ssdlib import Mamba2Config, init_cache, init_params

pytestmark = pytest.mark.usefixtures("as_user")

WRONG = {
    "nothing": None,
    "text": "text",
    "a negative number": -1,
    "no number": math.nan,
    "a huge number": 10**30,
    "a list": [],
    "six axes": np.zeros((1,) * 6, np.float32),
    "an object": object(),
}
CONFIG = Mamba2Config.tiny()
PARAMS = init_params(CONFIG, jax.random.key(0))
TOKENS, LENGTHS = np.zeros((2, 5), np.int32), np.array([5, 3])
MODEL = dict(params=PARAMS, config=CONFIG)
SEQUENCE = dict(zip(("x", "dt", "A", "B", "C", "D", "h0"), ssd_inputs(5), strict=True))
STEP = ("x_t", "dt_t", "A", "B_t", "C_t", "D", "h"), ssd_inputs(1)
STEP = dict(zip(*STEP, strict=True))
STEP |= {name: v[:, 0] for name, v in STEP.items() if name.endswith("_t")}
DRAW = dict(temperature=0.7, top_k=3, top_p=0.9, eos_id=1, key=jax.random.key(0))
DRAW |= MODEL | dict(prompt=TOKENS, max_new_tokens=3, lengths=LENGTHS)
ARGUMENTS = {
    "ssd_step": STEP,
    "ssd_recurrent": SEQUENCE,
    "ssd_quadratic": SEQUENCE,
    "ssd_chunked": SEQUENCE | dict(chunk_size=4),
    "segsum": dict(log_a=SEQUENCE["dt"]),
    "decay_mask": dict(log_a=SEQUENCE["dt"]),
    "init_params": dict(config=CONFIG, key=jax.random.key(0), dtype=jnp.float32),
    "init_cache": dict(config=CONFIG, batch_size=2, dtype=jnp.float32),
    "forward": MODEL | dict(tokens=TOKENS, lengths=LENGTHS),
    "prefill": MODEL | dict(tokens=TOKENS, cache=init_cache(CONFIG, 2)),
    "decode_step": MODEL | dict(token=TOKENS[:, 0], cache=init_cache(CONFIG, 2)),
    "generate": DRAW | dict(cache=init_cache(CONFIG, 2)),
    "stream": DRAW | dict(cache=init_cache(CONFIG, 2), block=2),
    "load": dict(source="tiny", dtype=jnp.float32, revision=None),
    "save": MODEL | dict(folder="never written"),
    "compile_for": dict(fn=jnp.sin, target="cpu", donate_argnums=()),
    "Mamba2Config": dataclasses.asdict(CONFIG),
}
FINE = {  # (argument, what is wrong elsewhere)
    *((name, "nothing") for name in ("D", "h0", "lengths", "cache", "revision")),
    *((name, "nothing") for name in ("top_k", "top_p", "eos_id", "donate_argnums")),
    *((field.name, "a huge number") for field in dataclasses.fields(Mamba2Config)),
    ("temperature", "a huge number"),
    ("log_a", "six axes"),
    ("folder", "text"),
    ("revision", "text"),
    ("donate_argnums", "a list"),
}
NEEDED = {("decode_step", "cache", "nothing")}
CASES = [
    (function, argument, wrong)
    for function, arguments in ARGUMENTS.items()
    for argument in arguments
    for wrong in WRONG
    if (argument, wrong) not in FINE or (function, argument, wrong) in NEEDED
]


@pytest.mark.parametrize("function", ARGUMENTS)
def test_a_wrong_argument_is_named(function):
    for name, argument, wrong in CASES:
        if name == function:
            arguments = ARGUMENTS[function] | {argument: WRONG[wrong]}
            with pytest.raises((ValueError, OSError)) as caught:
                getattr(ssdlib, function)(**arguments)
            assert str(caught.value).startswith(f"{argument}: "), (argument, wrong)


def test_parameters_of_another_model_are_named():
    for change in (dict(n_layers=3), dict(d_model=36), dict(vocab_size=60)):
        config = dataclasses.replace(CONFIG, **change)
        with pytest.raises(ValueError, match=r"params: .* is \(2, 61, 24\); config as"):
            ssdlib.forward(PARAMS, config, TOKENS)
