"""Other models through the same form: each against the loop of its own paper."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_recurrences as loops
import pytest
from inputs import enable_x64

import ssdlib.quadratic
from ssdlib import decay_mask, ssd_chunked, ssd_recurrent
from ssdlib.beyond.matrix_decay import delta_net, gla
from ssdlib.beyond.scalar_decay import (
    linear_attention,
    mamba3,
    mlstm,
    retention,
    simple_gla,
)

b, H, P, N = 2, 3, 4, 6


def inputs(T, seed=0):
    """Everything that any of the models reads, in the ranges of its paper."""
    rng = np.random.default_rng(seed)
    normal, uniform = rng.standard_normal, rng.uniform
    k = normal((b, T, H, N))
    return {
        "q": normal((b, T, H, N)) / np.sqrt(N),
        "k": k,
        "unit_k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal((b, T, H, P)),
        "log_a": -np.exp(uniform(np.log(1e-4), np.log(5), (b, T, H))),
        "log_a_vector": np.log(1 / (1 + np.exp(-normal((b, T, H, N))))) / 16,
        "log_i": normal((b, T, H)),
        "log_f": -np.log1p(np.exp(-(normal((b, T, H)) + 2))),
        "beta": uniform(0, 1, (b, T, H)),
        "dt": np.exp(uniform(np.log(1e-3), np.log(1e-1), (b, T, H))),
        "A": -uniform(1, 16, (b, T, H)),
        "lam": uniform(0, 1, (b, T, H)),
        "angle": np.pi * uniform(-1, 1, (b, T, H, 2)),
    }


def features(w):
    return np.where(w > 0, w + 1, np.exp(np.minimum(w, 0)))  # elu + 1


MODELS = {  # ours, its arguments, the loop; a state of the same shape unless noted
    "linear attention": (linear_attention, "q k v", loops.linear_attention),
    "simple GLA": (simple_gla, "q k v log_a", loops.simple_gla),
    "mLSTM": (mlstm, "q k v log_i log_f", loops.mlstm),
    "Mamba-3": (mamba3, "v dt A lam k q angle", loops.mamba3),
    "GLA": (gla, "q k v log_a_vector", loops.gla),
    "DeltaNet": (delta_net, "q unit_k v beta", loops.delta_net),
    "normalized linear attention": (
        partial(linear_attention, normalize=True),
        "phi_q phi_k v",
        loops.normalized_linear_attention,
    ),
    "RetNet": (retention, "q k v", None),
}
each_model = pytest.mark.parametrize("name", MODELS)


def case(name, T, seed=0, dtype=jnp.float32):
    """The model, its arguments as jax arrays, and a state of random numbers."""
    model, names, loop = MODELS[name]
    values = inputs(T, seed)
    values |= {f"phi_{w}": features(values[w]) for w in "qk"}
    args = [jnp.asarray(values[n], dtype) for n in names.split()]
    return model, args, loop


@partial(jax.jit, static_argnums=(0, 2))
def run(name, args, Q, state=None):
    past = () if state is None else (state,)
    return MODELS[name][0](*args, *past, **{chunk_argument(name): Q})


def state_arrays(state):
    return [v for v in jax.tree.leaves(state) if v.dtype != jnp.int32]


def chunk_argument(name):
    return "sub_chunk" if name == "GLA" else "chunk_size"


def retention_loop(q, k, v, start=0):
    rows = [
        [
            loops.retention(
                *(np.float64(w[i, :, j]) for w in (q, k, v)), head=j, start=start
            )
            for j in range(v.shape[2])
        ]
        for i in range(len(v))
    ]
    return np.moveaxis(np.array(rows), 1, 2), None


def definition(name, loop, args):
    return retention_loop(*args) if loop is None else loops.over_heads(loop, *args)


@each_model
def test_a_model_equals_the_loop_of_its_paper_in_float32(name):
    _, args, loop = case(name, 23)  # as below, to compile it once
    y_star, _ = definition(name, loop, args)
    y, _ = run(name, args, 8)
    assert y.dtype == jnp.float32
    assert oracle.error(y, y_star) <= 2e-6


@each_model
def test_a_model_equals_the_loop_of_its_paper_in_float64(name):
    with enable_x64(True):
        _, args, loop = case(name, 37, dtype=jnp.float64)
        y_star, _ = definition(name, loop, args)
        y, _ = run(name, args, 8)
        assert y.dtype == jnp.float64
        assert oracle.error(y, y_star) <= 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "linear attention",
        "normalized linear attention",
        "simple GLA",
        "GLA",
        "DeltaNet",
    ],
)
def test_a_model_goes_on_from_any_state_and_returns_the_last(name):
    _, args, loop = case(name, 23)
    rows = P + (name == "normalized linear attention")
    h0 = np.random.default_rng(1).uniform(0.1, 1, (b, H, rows, N)).astype(np.float32)
    y_star, h_star = loops.over_heads(loop, *args, S0=h0)
    y, h = run(name, args, 8, jnp.asarray(h0))
    assert oracle.error(y, y_star) <= 2e-6
    assert oracle.error(h, h_star) <= 2e-6


def test_mamba3_returns_the_state_of_its_paper_turned_back_by_all_angles():
    _, args, loop = case("Mamba-3", 23)
    _, h_star = loops.over_heads(loop, *args)
    _, state = run("Mamba-3", args, 8)
    complex_h = np.asarray(h_star).view(complex)
    turn = np.pad(np.float64(state.angle), ((0, 0), (0, 0), (0, N // 2 - 2)))
    back = (complex_h * np.exp(-1j * turn)[:, :, None]).view(float)
    assert oracle.error(state.h, back) <= 2e-6


@each_model
def test_a_model_run_token_by_token_equals_chunked(name):
    _, args, _ = case(name, 23)
    y, state = run(name, args, 8)
    args = list(map(np.asarray, args))
    at, ys = None, []
    for t in range(23):
        y_t, at = run(name, [w[:, t : t + 1] for w in args], 8, at)
        ys.append(y_t)
    assert oracle.error(np.concatenate(ys, axis=1), y) <= 4e-6
    for ours, theirs in zip(state_arrays(at), state_arrays(state), strict=True):
        assert oracle.error(ours, theirs) <= 4e-6


@each_model
def test_a_model_carries_its_state_across_a_split(name):
    _, args, _ = case(name, 23)
    y, state = run(name, args, 8)
    args = list(map(np.asarray, args))
    y1, mid = run(name, [w[:, :13] for w in args], 8)
    y2, end = run(name, [w[:, 13:] for w in args], 8, mid)
    assert oracle.error(np.concatenate([y1, y2], axis=1), y) <= 4e-6
    for ours, theirs in zip(state_arrays(end), state_arrays(state), strict=True):
        assert oracle.error(ours, theirs) <= 4e-6


@each_model
def test_no_output_of_a_model_depends_on_a_later_token(name):
    _, args, _ = case(name, 23)
    _, other, _ = case(name, 23, seed=1)
    mixed = [
        jnp.concatenate([u[:, :12], w[:, 12:]], 1)
        for u, w in zip(args, other, strict=True)
    ]
    y, changed = run(name, args, 8)[0], run(name, mixed, 8)[0]
    assert oracle.error(changed[:, :12], y[:, :12]) <= 1e-6
    assert oracle.error(changed[:, 12:], y[:, 12:]) > 0.1


@each_model
def test_gradients_of_a_model_in_chunks_equal_those_token_by_token(name):
    model, args, _ = case(name, 13)
    weights = jnp.asarray(inputs(13, seed=2)["v"], jnp.float32)

    def loss(args, Q):
        return (model(*args, **{chunk_argument(name): Q})[0] * weights).sum()

    slopes = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, theirs in zip(slopes(args, 5), slopes(args, 1), strict=True):
        assert np.isfinite(ours).all()
        assert oracle.error(ours, theirs) <= 1e-5


@each_model
def test_without_the_decay_mask_a_model_is_wrong(name):
    """The checks above can fail: the mask carries every model's decay and causality."""
    model, args, loop = case(name, 23)
    y_star, _ = definition(name, loop, args)

    def no_mask(hi, lo):
        return jnp.ones((*hi.shape, hi.shape[-1]))

    how = {chunk_argument(name): 8}
    with mock.patch.object(ssdlib.quadratic, "mask", no_mask):
        y, _ = jax.jit(partial(model, **how))(*args)
    assert oracle.error(y, y_star) > 1e-2


# --- against code that we did not write -----------------------------------------------

GOLDEN = np.load(Path(__file__).parent / "golden" / "recurrences.npz")


def beside_other_code(name):
    """Our outputs for the inputs of others' code: fla, transformers or mamba3-jax."""
    w = {n: jnp.asarray(GOLDEN[n]) for n in GOLDEN}
    q, k, v = w["q"] / np.sqrt(N).astype(np.float32), w["k"], w["v"]
    log_f = -jax.nn.softplus(-w["forget_gate"])
    turn = -jnp.tanh(w["angle_projection"]) * np.pi * w["dt"][..., None]
    gates = w["dt"], w["A"], w["lam"]
    gamma = jnp.log1p(-jnp.exp2(-5 - jnp.arange(H, dtype=jnp.float32)))
    return jax.jit(
        {
            "y_linear_attention": lambda: linear_attention(q, k, v),
            "y_normalized": lambda: linear_attention(abs(q), abs(k), v, normalize=True),
            "y_simple_gla": lambda: simple_gla(q, k, v, w["log_a"]),
            "y_retention_unrotated": lambda: simple_gla(q, k, v, gamma),
            "y_gla": lambda: gla(q, k, v, w["log_a_vector"]),
            "y_delta_net": lambda: delta_net(q, k, v, w["beta"], chunk_size=8),
            "y_mlstm": lambda: mlstm(q, k, v, w["input_gate"], log_f, chunk_size=8),
            "y_mamba3": lambda: mamba3(v, *gates, k, w["q"], turn, chunk_size=8),
        }[name]
    )()


@pytest.mark.parametrize(
    "name", [n for n in GOLDEN if n.startswith("y_") and not n.endswith("state")]
)
def test_a_model_equals_other_implementations(name):
    ours, state = beside_other_code(name)
    assert oracle.error(ours, GOLDEN[name]) <= 4e-6
    if name == "y_mamba3":
        assert oracle.error(state.h, GOLDEN["y_mamba3_state"]) <= 4e-6


# --- what is particular to one model --------------------------------------------------


def test_lightning_attention_is_simple_gla_with_one_decay_per_head():
    _, (q, k, v, _), loop = case("simple GLA", 21)
    slopes = jnp.asarray([0.5, 0.25, 0.125])
    per_token = jnp.broadcast_to(-slopes, (b, 21, H))
    y_star, _ = loops.over_heads(loop, q, k, v, per_token)
    y, h = simple_gla(q, k, v, -slopes, chunk_size=8)
    assert oracle.error(y, y_star) <= 2e-6
    last = [w[:, 20:] for w in (q, k, v)]
    _, before = simple_gla(*(w[:, :20] for w in (q, k, v)), -slopes, chunk_size=8)
    assert oracle.error(simple_gla(*last, -slopes, before)[0], y_star[:, 20:]) <= 2e-6
    assert h.shape == (b, H, P, N)


def test_mamba3_without_trapezoid_and_angle_is_mamba2():
    _, (x, dt, A, lam, B, C, angle), _ = case("Mamba-3", 21)
    y, state = mamba3(x, dt, A[0, 0], lam * 0 + 1, B, C, angle * 0, chunk_size=8)
    y_star, h_star = oracle.ssd(x, dt, A[0, 0], B, C)
    assert oracle.error(y, y_star) <= 2e-6
    assert oracle.error(state.h, h_star) <= 2e-6


def test_keys_and_queries_of_a_model_may_be_shared_by_a_group_of_heads():
    _, (q, k, v, log_a), loop = case("simple GLA", 21)
    one = [w[:, :, :1] for w in (q, k)]
    y, _ = simple_gla(*one, v, log_a, chunk_size=8)
    all_heads = [jnp.repeat(w, H, axis=2) for w in one]
    y_star, _ = loops.over_heads(loop, *all_heads, v, log_a)
    assert oracle.error(y, y_star) <= 2e-6


@pytest.mark.parametrize("size", [30, 300, -300])
def test_mlstm_is_exact_where_its_input_gate_overflows_a_float(size):
    """exp(300) is no float32. Extended precision holds it, so the loop still can.

    Keys and queries are positive here: n · q then does not cancel. Where it does, y is
    ill-conditioned, and a float32 loop of the same equations loses as many digits.
    """
    _, (q, k, v, log_i, log_f), loop = case("mLSTM", 37)
    q, k = jnp.abs(q), jnp.abs(k)
    often = jnp.asarray(np.arange(37) % 5 == 2, jnp.float32)
    log_i = log_i + size * often[None, :, None]
    args = q, k, v, log_i, log_f
    y_star, _ = loops.over_heads(loop, *args)
    for Q in (1, 8):
        y, state = run("mLSTM", args, Q)
        assert oracle.error(y, y_star) <= 2e-6
        assert np.isfinite(state.h).all()


def test_mlstm_does_not_depend_on_the_maximum_that_it_keeps():
    """A state (h, m) stands for exp(m) h: any other m with h rescaled is the same."""
    _, args, _ = case("mLSTM", 26)
    _, mid = run("mLSTM", [w[:, :13] for w in args], 8)
    moved = mid._replace(h=mid.h * jnp.exp(3.0), m=mid.m - 3)
    late = [w[:, 13:] for w in args]
    (y, _), (other, _) = (run("mLSTM", late, 8, state) for state in (mid, moved))
    assert oracle.error(other, y) <= 2e-6


def test_a_log_decay_above_zero_is_exact_until_its_exponential_overflows():
    """segsum needs no sign; exp(segsum) does, as soon as a sum exceeds 88."""
    rng = np.random.default_rng(0)
    log_a = jnp.asarray(rng.uniform(-0.5, 1.5, 60), jnp.float32)
    exact = np.exp(oracle.segment_sums(log_a))
    seen = np.tril(np.ones((60, 60), bool))
    assert (
        np.abs(np.asarray(decay_mask(log_a)) / np.where(seen, exact, 1) - 1)[seen].max()
        <= 1e-5
    )
    assert np.isinf(decay_mask(jnp.full(100, 1.0)).max())


def test_gla_turns_to_nan_where_a_sub_chunk_is_too_long_for_its_decays():
    _, (q, k, v, log_a), loop = case("GLA", 32)
    results = []
    for extra in np.linspace(0, 12, 25):  # passes every sum of decays near overflow
        strong = log_a.at[..., 0].add(-np.float32(extra))
        y, _ = run("GLA", (q, k, v, strong), 16)
        y_star, _ = loops.over_heads(loop, q, k, v, strong)
        results.append(bool(np.isnan(y).any()) or oracle.error(y, y_star))
    assert results[0] <= 2e-6
    assert results[-1] is True
    assert all(r is True or r <= 1e-5 for r in results)  # NaN, or right
    y, _ = run("GLA", (q, k, v, strong), 2)
    assert oracle.error(y, y_star) <= 4e-6


def test_a_decay_rate_per_token_equals_the_definition_in_every_form():
    _, (x, dt, A, _, B, C, _), _ = case("Mamba-3", 21)
    h0 = jnp.ones((b, H, P, N))
    y_star, h_star = loops.over_heads(
        loops.simple_gla, C, B, dt[..., None] * x, dt * A, S0=h0
    )
    for form in (ssd_recurrent, partial(ssd_chunked, chunk_size=8)):
        y, h = form(x, dt, A, B, C, h0=h0)
        assert oracle.error(y, y_star) <= 2e-6
        assert oracle.error(h, h_star) <= 2e-6


@pytest.mark.usefixtures("as_user")
def test_bad_input_to_a_model_is_named():
    q, k, v = (jnp.ones((b, 5, H, n)) for n in (N, N, P))
    with pytest.raises(ValueError, match=r"k: shape .* must be \(b=2, T=5, G, N\)"):
        simple_gla(q, k[:, :, 0], v, jnp.zeros(H))
    with pytest.raises(ValueError, match=r"log_f: shape"):
        mlstm(q, k, v, jnp.zeros((b, 5, H)), jnp.zeros((b, 5)))
    with pytest.raises(ValueError, match="k: G = 2 groups must divide the H = 3"):
        simple_gla(q[:, :, :2], k[:, :, :2], v, jnp.zeros(H))
    with pytest.raises(ValueError, match="q: N = 5 channels; rotation needs an even"):
        retention(q[..., :5], k[..., :5], v)
    with pytest.raises(ValueError, match="angle: S = 4; it must be at most N/2"):
        dt = jnp.ones((b, 5, H))
        mamba3(v, dt, -dt, dt, k, q, jnp.ones((b, 5, H, 4)))
    with pytest.raises(ValueError, match="sub_chunk: 0; it must be an integer of"):
        gla(q, k, v, -k, sub_chunk=0)
