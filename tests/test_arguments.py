"""A wrong argument of a public function raises a ValueError that names it, at once."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import ssd_inputs

import ssdlib
from ssdlib import Mamba2Config, init_cache, init_params
from ssdlib.beyond import transformer
from ssdlib.scale import sharding
from ssdlib.serve import speculate

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
BASE = dict(config=transformer.AttentionConfig.like(CONFIG))
RIVAL = BASE | dict(params=transformer.init_params(BASE["config"], jax.random.key(0)))
ROOM = transformer.init_cache(BASE["config"], 2, 9)
LIMITS = {k: v for k, v in DRAW.items() if k not in (*MODEL, "lengths")}
MESH = sharding.make_mesh()
OVER = dict(params=sharding.shard_by_head(PARAMS, CONFIG, MESH), config=CONFIG)
OVER |= dict(mesh=MESH)
EVERYWHERE = sharding.init_cache(CONFIG, MESH, 2)
QKV = {name: np.full((2, 5, 3, 4), 0.5, np.float32) for name in "qkv"}
GATE, QKV_STATE = (
    np.full((2, 5, 3), 0.5, np.float32),
    np.zeros((2, 3, 4, 4), np.float32),
)
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
    "fork": dict(cache=init_cache(CONFIG, 2), n=3),
    "rewind": MODEL
    | dict(tokens=TOKENS, caches=[init_cache(CONFIG, 2)], position=np.int64(3)),
    "save_cache": dict(
        path="never written", cache=init_cache(CONFIG, 2), config=CONFIG
    ),
    "speculate": DRAW
    | dict(draft=speculate.ModelDraft(PARAMS, CONFIG), k=2)
    | dict(cache=init_cache(CONFIG, 2), draft_cache=init_cache(CONFIG, 2)),
    "load": dict(source="tiny", dtype=jnp.float32, revision=None),
    "save": MODEL | dict(folder="never written"),
    "compile_for": dict(fn=lambda: 1, target="cpu", donate_argnums=()),
    "Mamba2Config": dataclasses.asdict(CONFIG),
    "evaluate.evaluate": MODEL | dict(tokens=TOKENS[0], piece=3),
    "evaluate.next_token_loss": dict(
        logits=np.zeros((2, 5, 61), np.float32), targets=TOKENS
    ),
    "beyond.transformer.init_params": BASE
    | dict(key=jax.random.key(0), dtype="float32"),
    "beyond.transformer.init_cache": BASE
    | dict(batch_size=2, max_len=9, dtype=jnp.float32),
    "beyond.transformer.forward": RIVAL | dict(tokens=TOKENS),
    "beyond.transformer.prefill": RIVAL | dict(tokens=TOKENS, cache=ROOM),
    "beyond.transformer.decode_step": RIVAL | dict(token=TOKENS[:, 0], cache=ROOM),
    "beyond.transformer.generate": RIVAL | LIMITS | dict(cache=ROOM),
    "beyond.transformer.stream": RIVAL | LIMITS | dict(cache=ROOM, block=2),
    "scale.sharding.make_mesh": dict(data=1, seq=1, model=1, devices=jax.devices()),
    "scale.sharding.local_config": dict(config=CONFIG, mesh=MESH),
    "scale.sharding.shard_by_head": MODEL | dict(mesh=MESH),
    "scale.sharding.shard_as_is": dict(tree=PARAMS, mesh=MESH),
    "scale.sharding.load": dict(
        source="tiny", mesh=MESH, dtype=jnp.float32, revision=None
    ),
    "scale.sharding.init_cache": dict(
        config=CONFIG, mesh=MESH, batch_size=2, dtype=jnp.float32
    ),
    "scale.parallel.prefill": OVER
    | dict(tokens=TOKENS, cache=EVERYWHERE, lengths=LENGTHS),
    "scale.parallel.decode_step": OVER | dict(token=TOKENS[:, 0], cache=EVERYWHERE),
    "scale.parallel.scatter_cache": dict(
        cache=init_cache(CONFIG, 2), config=CONFIG, mesh=MESH
    ),
    "scale.parallel.gather_cache": dict(cache=EVERYWHERE, config=CONFIG, mesh=MESH),
    "scale.parallel.bytes_sent": dict(config=CONFIG, mesh=MESH, b=2, T=5, itemsize=4),
    "beyond.scalar_decay.linear_attention": QKV | dict(h0=QKV_STATE, chunk_size=4),
    "beyond.scalar_decay.simple_gla": QKV
    | dict(log_a=-GATE, h0=QKV_STATE, chunk_size=4),
    "beyond.scalar_decay.retention": QKV | dict(state=None, chunk_size=4),
    "beyond.scalar_decay.mlstm": QKV | dict(log_i=-GATE, log_f=-GATE, chunk_size=4),
    "beyond.scalar_decay.mamba3": dict(
        **{k: QKV["q"] for k in ("x", "B", "C")},
        **{k: GATE for k in ("dt", "A", "lam")},
        **dict(angle=QKV["q"][..., :2], state=None, chunk_size=4),
    ),
    "beyond.matrix_decay.gla": QKV | dict(log_a=-QKV["k"], h0=QKV_STATE, sub_chunk=4),
    "beyond.matrix_decay.delta_net": QKV | dict(beta=GATE, h0=QKV_STATE, chunk_size=4),
    **{
        f"measure.roofline.{name}": dict(config=CONFIG, b=2, T=5)
        for name in ("recurrent", "quadratic", "chunked", "prefill", "forward")
    },
    "measure.roofline.decode": dict(config=CONFIG, b=2, itemsize=4),
    "measure.roofline.parameters": dict(config=CONFIG),
    "measure.roofline.with_chunks_of": dict(platform="cpu", config=CONFIG),
    "measure.record.writable": dict(folder="never written"),
    "compiler.targets.attached": dict(target="cpu"),
    "scale.parallel.compile_over": dict(
        config=CONFIG, mesh=MESH, b=2, T=5, dtype=jnp.float32
    ),
}
FINE = {  # (argument, what is wrong elsewhere)
    *((name, "nothing") for name in ("D", "h0", "lengths", "cache", "revision")),
    *(
        (name, "nothing")
        for name in (
            "draft",
            "draft_cache",
            "top_k",
            "top_p",
            "eos_id",
            "donate_argnums",
        )
    ),
    *((field.name, "a huge number") for field in dataclasses.fields(Mamba2Config)),
    ("temperature", "a huge number"),
    ("log_a", "six axes"),
    ("folder", "text"),
    ("path", "text"),
    ("caches", "a list"),
    ("revision", "text"),
    ("donate_argnums", "a list"),
    ("devices", "nothing"),
    ("folder", "nothing"),
    ("platform", "text"),
    ("name", "text"),
    ("state", "nothing"),
}
NEEDED = {
    ("save", "folder", "nothing"),
    ("decode_step", "cache", "nothing"),
    *((name, "cache", "nothing") for name in ("fork", "save_cache")),
    *(
        (f"scale.parallel.{name}_cache", "cache", "nothing")
        for name in ("scatter", "gather")
    ),
}
CASES = [
    (function, argument, wrong)
    for function, arguments in ARGUMENTS.items()
    for argument in arguments
    for wrong in WRONG
    if (argument, wrong) not in FINE or (function, argument, wrong) in NEEDED
    if (function, wrong) != ("compiler.targets.attached", "nothing")
]


def public(name):
    module, _, function = f"ssdlib.{name}".rpartition(".")
    return getattr(importlib.import_module(module), function)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_right_arguments_are_accepted(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public(function)(**ARGUMENTS[function])


@pytest.mark.parametrize("function", ARGUMENTS)
def test_a_wrong_argument_is_named(function):
    for name, argument, wrong in CASES:
        if name == function:
            arguments = ARGUMENTS[function] | {argument: WRONG[wrong]}
            with pytest.raises((ValueError, OSError)) as caught:
                public(function)(**arguments)
            assert str(caught.value).startswith(f"{argument}: "), (argument, wrong)


def test_parameters_of_another_model_are_named():
    for change in (dict(n_layers=3), dict(d_model=36), dict(vocab_size=60)):
        config = dataclasses.replace(CONFIG, **change)
        with pytest.raises(ValueError, match=r"params: .* is \(2, 61, 24\); config as"):
            ssdlib.forward(PARAMS, config, TOKENS)
