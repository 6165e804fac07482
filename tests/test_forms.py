"""One map, three programs: each form against the float64 oracle and the others."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import REGIMES, enable_x64, ssd_inputs
from jax.test_util import check_grads

import ssdlib.quadratic
from ssdlib import ssd_chunked, ssd_quadratic, ssd_recurrent, ssd_step
from ssdlib.chunked import ssd_in_spans

recurrent, quadratic = jax.jit(ssd_recurrent), jax.jit(ssd_quadratic)
chunked = jax.jit(ssd_chunked, static_argnames="chunk_size")
in_spans = jax.jit(ssd_in_spans, static_argnums=(0, 1))
# Compiled, as one program takes a fraction of what its operations take one by one.
FORMS = {
    "recurrent": recurrent,
    "quadratic": quadratic,
    "chunked, Q=1": partial(chunked, chunk_size=1),
    "chunked, Q=7": partial(chunked, chunk_size=7),
    "chunked, Q=T": partial(chunked, chunk_size=29),
    "chunked, Q>T": partial(chunked, chunk_size=64),
    "chunked, 3 spans": partial(in_spans, 4, 3),
}
GROUPS = {"G=1": (4, 1), "1<G<H": (4, 2), "G=H": (4, 4), "H=1": (1, 1)}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@each_form
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("H", "G"), GROUPS.values(), ids=GROUPS.keys())
def test_every_form_equals_the_oracle_in_float32(form, regime, H, G):
    inputs = ssd_inputs(29, H=H, G=G, regime=regime)
    for ours, theirs in zip(form(*inputs), oracle.ssd(*inputs), strict=True):
        assert oracle.error(ours, theirs) <= 2e-6


@each_form
@pytest.mark.parametrize("regime", REGIMES)
def test_every_form_equals_the_oracle_in_float64(form, regime):
    with enable_x64(True):
        inputs = ssd_inputs(29, regime=regime, dtype=jnp.float64)
        for ours, theirs in zip(form(*inputs), oracle.ssd(*inputs), strict=True):
            assert ours.dtype == jnp.float64
            assert oracle.error(ours, theirs) <= 1e-12


@each_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_dtype_of_x_alone_decides_how_sums_are_kept(form, dtype):
    other = jnp.float64 if dtype == jnp.float32 else jnp.float32
    with enable_x64(True):
        x, *rest = ssd_inputs(29, dtype=other)
        y, h = form(x.astype(dtype), *rest)
    assert y.dtype == h.dtype == dtype


@each_form
def test_without_skip_and_without_initial_state(form):
    x, dt, A, B, C, _, _ = ssd_inputs(29)
    for ours, theirs in zip(
        form(x, dt, A, B, C), oracle.ssd(x, dt, A, B, C), strict=True
    ):
        assert oracle.error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_chunked])
def test_a_form_that_is_not_compiled_equals_the_oracle(form):
    inputs = ssd_inputs(29)
    how = {"chunk_size": 7} if form is ssd_chunked else {}
    for ours, theirs in zip(form(*inputs, **how), oracle.ssd(*inputs), strict=True):
        assert oracle.error(ours, theirs) <= 2e-6


@each_form
def test_bfloat16_inputs_keep_decays_and_state_in_float32(form):
    inputs = ssd_inputs(29, dtype=jnp.bfloat16)
    y_star, h_star = oracle.ssd(*(v.astype(jnp.float32) for v in inputs))
    y, h = form(*inputs)
    y_ref, _ = recurrent(*inputs)
    assert y.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert oracle.error(h, h_star) <= 2e-6
    limit = min(3e-2, 2 * oracle.error(y_ref.astype(jnp.float32), y_star))
    assert oracle.error(y.astype(jnp.float32), y_star) <= limit


@pytest.mark.parametrize("T", [512, 2048])
def test_float32_error_does_not_grow_with_length(T):
    inputs = ssd_inputs(T, b=1, H=2, G=1, regime="mixed decay")
    for form in (quadratic, chunked):
        for ours, theirs in zip(form(*inputs), oracle.ssd(*inputs), strict=True):
            assert oracle.error(ours, theirs) <= 2e-6


@settings(max_examples=25, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 29, 40]),  # few programs of the recurrence
    Q=st.integers(1, 48),
    spans=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    regime=st.sampled_from(list(REGIMES)),
)
def test_chunked_equals_recurrent_for_every_size(T, Q, spans, seed, regime):
    inputs = ssd_inputs(T, seed=seed, regime=regime)
    ours, theirs = in_spans(Q, spans, *inputs), recurrent(*inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert oracle.error(a, b) <= 4e-6


@settings(max_examples=15, deadline=None)
@given(T=st.sampled_from([2, 9, 30]), data=st.data())
def test_any_split_with_the_state_carried_equals_the_whole(T, data):
    cut = data.draw(st.integers(1, T - 1))
    x, dt, A, B, C, D, h0 = map(np.asarray, ssd_inputs(T))  # NumPy cuts, not XLA
    y, h = chunked(x, dt, A, B, C, D, h0, chunk_size=8)
    y1, h1 = chunked(
        x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, chunk_size=8
    )
    y2, h2 = chunked(
        x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, h1, chunk_size=8
    )
    assert oracle.error(np.concatenate([y1, y2], axis=1), y) <= 4e-6
    assert oracle.error(h2, h) <= 4e-6


@each_form
def test_no_output_depends_on_a_later_input(form):
    """But for dt in the last bit: sums of decays are split by a chunk's total."""
    x, dt, A, B, C, D, h0 = ssd_inputs(29)
    t = 13
    y, _ = form(x, dt, A, B, C, D, h0)
    x2, dt2, B2, C2 = (v.at[:, t + 1 :].set(9.0) for v in (x, dt, B, C))
    y2, _ = form(x2, dt, A, B2, C2, D, h0)
    np.testing.assert_array_equal(y[:, : t + 1], y2[:, : t + 1])
    assert np.abs(y[:, t + 1 :] - y2[:, t + 1 :]).max() > 0.1
    y3, _ = form(x2, dt2, A, B2, C2, D, h0)
    assert oracle.error(y3[:, : t + 1], y[:, : t + 1]) <= 5e-7


@each_form
def test_a_token_of_dt_zero_changes_no_state(form):
    """The padding rule: chunks and batches are filled up with dt = 0."""
    x, dt, A, B, C, D, h0 = ssd_inputs(29)
    _, h = form(x[:, :20], dt[:, :20], A, B[:, :20], C[:, :20], D, h0)
    _, padded = form(x, dt.at[:, 20:].set(0), A, B, C, D, h0)
    assert oracle.error(padded, h) <= 1e-6


@each_form
def test_a_row_of_a_batch_equals_the_row_alone(form):
    x, dt, A, B, C, D, h0 = map(np.asarray, ssd_inputs(29, b=3))
    y, h = form(x, dt, A, B, C, D, h0)
    for i in range(3):
        row = [v[i : i + 1] for v in (x, dt, B, C, h0)]
        y_i, h_i = form(row[0], row[1], A, row[2], row[3], D, row[4])
        assert oracle.error(y_i[0], y[i]) <= 1e-6
        assert oracle.error(h_i[0], h[i]) <= 1e-6


def test_steps_equal_the_whole():
    x, dt, A, B, C, D, h = map(np.asarray, ssd_inputs(29))
    step = jax.jit(ssd_step)
    y_star, h_star = oracle.ssd(x, dt, A, B, C, D, h)
    for t in range(29):
        y_t, h = step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        assert oracle.error(y_t, y_star[:, t]) <= 5e-6
    assert oracle.error(h, h_star) <= 2e-6


@partial(jax.jit, static_argnums=0)
def slopes(Q, *inputs):
    """Of a sum over y and h, for all inputs, in chunks of Q or token by token."""
    weights = np.random.default_rng(1).standard_normal(inputs[0].shape)

    def f(*inputs):
        form = ssd_recurrent if Q is None else partial(ssd_chunked, chunk_size=Q)
        y, h = form(*inputs)
        return (y * weights.astype(np.float32)).sum() + (h**2).sum()

    return jax.grad(f, argnums=tuple(range(7)))(*inputs)


@pytest.mark.parametrize("Q", [1, 7, 64])
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_of_chunked_equal_those_of_recurrent(Q, regime):
    inputs = ssd_inputs(23, regime=regime)
    for a, b in zip(slopes(Q, *inputs), slopes(None, *inputs), strict=True):
        assert np.isfinite(a).all()
        assert oracle.error(a, b) <= 1e-5


def test_gradients_of_quadratic_equal_finite_differences():
    with enable_x64(True):
        inputs = ssd_inputs(9, b=1, H=2, G=1, dtype=jnp.float64)
        check_grads(jax.jit(ssd_quadratic), inputs, order=1, modes=["fwd", "rev"])


def test_vmap_adds_an_axis():
    inputs = ssd_inputs(13)
    A, D = inputs[2], inputs[5]
    rows = [v[:, None] for i, v in enumerate(inputs) if i not in (2, 5)]

    def one(x, dt, B, C, h0):
        return ssd_chunked(x, dt, A, B, C, D, h0, chunk_size=4)

    y, h = jax.jit(jax.vmap(one))(*rows)
    y_star, h_star = oracle.ssd(*inputs)
    assert oracle.error(y[:, 0], y_star) <= 2e-6
    assert oracle.error(h[:, 0], h_star) <= 2e-6


def test_B_and_C_are_never_repeated_for_each_head():
    """The trace holds no array with a token, head and state axis but the state's."""
    T, H, N = 32, 6, 5
    inputs = ssd_inputs(T, b=1, H=H, G=2, N=N, P=3)
    for form in (ssd_recurrent, ssd_quadratic, partial(ssd_chunked, chunk_size=8)):
        text = str(jax.make_jaxpr(form)(*inputs))
        for tokens in (T, 8):
            for heads in (f"{H}", "2,3"):
                assert f"[1,{tokens},{heads},{N}]" not in text
                assert f"[{tokens},1,{heads},{N}]" not in text


# --- the checks can fail --------------------------------------------------------------


def one_token_late(sums):
    return jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1)


RIGHT = ssdlib.quadratic.mask
MUTANTS = {
    "no mask": lambda hi, lo: jnp.exp(hi[..., None, :] - hi[..., :, None]),
    "decay shifted by one": lambda hi, lo: RIGHT(*map(one_token_late, (hi, lo))),
    "diagonal lost": lambda hi, lo: jnp.triu(RIGHT(hi, lo), 1),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_broken_mask_is_noticed(monkeypatch, mutant):
    inputs = ssd_inputs(29)
    monkeypatch.setattr(ssdlib.quadratic, "mask", mutant)
    for form in (ssd_quadratic, partial(ssd_chunked, chunk_size=7)):
        y, _ = form(*inputs)
        assert oracle.error(y, oracle.ssd(*inputs)[0]) > 1e-2


# --- bad input ------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 9)}, r"dt: shape \(2, 9\); it must be \(b=2, T=9, H=4\)"),
        ({"A": (5,)}, r"A: shape \(5,\); it must be \(H=4\)"),
        ({"C": (2, 9, 2, 6)}, r"C: shape .* N=5"),
        ({"B": (2, 9, 3, 5), "C": (2, 9, 3, 5)}, "B: G = 3 groups must divide"),
        ({"D": (3,)}, "D: shape"),
        ({"h0": (1, 4, 3, 5)}, "h0: shape"),
        ({"x": (2, 0, 4, 3)}, "dt: shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    names = ("x", "dt", "A", "B", "C", "D", "h0")
    inputs = dict(zip(names, ssd_inputs(9), strict=True))
    inputs |= {name: jnp.ones(shape) for name, shape in change.items()}
    for form in (ssd_recurrent, ssd_quadratic, ssd_chunked):
        with pytest.raises(ValueError, match=message):
            form(**inputs)


@pytest.mark.usefixtures("as_user")
def test_empty_sequences_integer_inputs_and_empty_chunks_are_named():
    x, dt, A, B, C, D, h0 = ssd_inputs(9)
    with pytest.raises(ValueError, match="x: dtype int32; it must be floating"):
        ssd_chunked(x.astype(jnp.int32), dt, A, B, C)
    with pytest.raises(ValueError, match="x: T = 0 tokens"):
        ssd_chunked(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])
    with pytest.raises(ValueError, match="chunk_size: 0; it must be"):
        ssd_chunked(x, dt, A, B, C, chunk_size=0)
    with pytest.raises(ValueError, match="x_t: shape"):
        ssd_step(h0, x, dt, A, B, C, D)


# --- exact resets ---------------------------------------------------------------------

RESETS = {"-inf": -np.inf, "-1e12": -1e12, "lowest": float(np.finfo(np.float32).min)}


def with_resets(value):
    """Inputs with A per token: ordinary decays, and a reset at a few tokens."""
    x, dt, _, B, C, D, h0 = ssd_inputs(29)
    rng = np.random.default_rng(1)
    log_a = -np.exp(rng.uniform(np.log(1e-3), np.log(2.0), dt.shape))
    log_a[:, [5, 6, 17]] = value
    log_a[0, 0] = value
    one = jnp.ones_like(dt)
    return x, one, jnp.asarray(log_a, jnp.float32), B, C, D, h0


def oracle_of_tokens(x, dt, log_a, B, C, D, h0):
    """The loop of the oracle, with a decay of its own at every token."""
    ys, h = [], np.asarray(h0, np.float64)
    log_a = np.asarray(log_a, np.float64)
    for t in range(x.shape[1]):
        a = np.exp(log_a[:, t])
        cut = [np.asarray(v, np.float64)[:, t : t + 1] for v in (x, dt, B, C)]
        # The oracle decays the state by exp(0): the decay is applied before.
        y, h = oracle.ssd(
            cut[0], cut[1], np.zeros(x.shape[2]), *cut[2:], D, h * a[..., None, None]
        )
        ys.append(y)
    return np.concatenate(ys, axis=1), h


@each_form
@pytest.mark.parametrize("value", RESETS.values(), ids=RESETS.keys())
def test_an_infinite_decay_resets_the_state_exactly(form, value):
    inputs = with_resets(value)
    for ours, theirs in zip(form(*inputs), oracle_of_tokens(*inputs), strict=True):
        assert oracle.error(ours, theirs) <= 2e-6


@each_form
def test_one_huge_step_resets_the_state_exactly(form):
    x, dt, A, B, C, D, h0 = ssd_inputs(29)
    dt = dt.at[:, 9].set(1e30)
    x = x.at[:, 9].set(0)  # what it would write is 1e30 times x
    for ours, theirs in zip(
        form(x, dt, A, B, C, D, h0), oracle.ssd(x, dt, A, B, C, D, h0), strict=True
    ):
        assert oracle.error(ours, theirs) <= 2e-6


def test_a_long_row_of_strong_decays_leaves_each_token_its_own_input():
    """What is left out of the coarse sums stays small, whatever the length."""
    x, dt, _, B, C, D, h0 = ssd_inputs(3000, b=1, H=1, G=1)
    log_a = jnp.full_like(dt, -1000.06)
    y, h = ssdlib.ssd_quadratic(x, jnp.ones_like(dt), log_a, B, C, D, h0)
    own = (B * C).sum(-1)[..., None] * x + D[None, None, :, None] * x
    assert oracle.error(y, own) <= 1e-6
    assert oracle.error(h, jnp.einsum("bhp,bhn->bhpn", x[:, -1], B[:, -1])) <= 1e-6


@partial(jax.jit, static_argnums=0)
def slopes_of_squares(form, x, dt, A, B, C, D, h0):
    def loss(x, dt, A, B, C, h0):
        y, h = form(x, dt, A, B, C, D, h0)
        return (y**2).sum() + (h**2).sum()

    return jax.grad(loss, argnums=tuple(range(6)))(x, dt, A, B, C, h0)


@each_form
@pytest.mark.parametrize("value", RESETS.values(), ids=RESETS.keys())
def test_gradients_through_a_reset_are_finite_and_those_of_the_recurrence(form, value):
    inputs = with_resets(value)
    pair = (slopes_of_squares(f, *inputs) for f in (form, recurrent))
    for ours, theirs in zip(*pair, strict=True):
        assert np.isfinite(ours).all()
        assert oracle.error(ours, theirs) <= 1e-5


@each_form
def test_documents_in_one_row_are_computed_as_if_each_were_alone(form):
    x, dt, A, B, C, D, _ = ssd_inputs(29)
    first = np.zeros(29, bool)
    first[[0, 7, 8, 20]] = True  # first tokens of documents
    per_token = jnp.where(first[None, :, None], -jnp.inf, A[None, None])
    # dt A = -inf needs dt > 0, as softplus always gives.
    y, h = form(x, dt, jnp.broadcast_to(per_token, dt.shape), B, C, D)
    starts = [*np.flatnonzero(first), 29]
    for start, end in itertools.pairwise(starts):
        cut = slice(start, end)
        alone, h_alone = oracle.ssd(x[:, cut], dt[:, cut], A, B[:, cut], C[:, cut], D)
        assert oracle.error(y[:, cut], alone) <= 2e-6
    assert oracle.error(h, h_alone) <= 2e-6


@pytest.mark.parametrize("value", RESETS.values(), ids=RESETS.keys())
def test_segment_sums_beside_a_reset_are_as_exact_as_without_it(value):
    log_a = np.array([-0.5, -0.25, value, -1e-3, -2.0, value, -0.125], np.float32)
    want, at = oracle.segment_sums(log_a), np.cumsum(log_a < -1000)
    if value < -1e30:
        want = np.where(at[:, None] == at[None, :], want, -np.inf)
    got = np.asarray(ssdlib.segsum(jnp.asarray(log_a)))
    assert (np.isneginf(got) == np.isneginf(want)).all()
    below = np.isfinite(want)
    np.testing.assert_allclose(got[below], want[below], 1e-6)


@pytest.mark.parametrize("strongest", [0.1, 1e-3])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_segment_sums_of_sixteen_bits_are_those_of_float32_rounded(dtype, strongest):
    log_a = jnp.asarray(-np.random.default_rng(0).uniform(0, strongest, 40), dtype)
    got = ssdlib.segsum(log_a)
    assert got.dtype == dtype
    want = oracle.segment_sums(log_a.astype(jnp.float32))
    below = np.isfinite(want)
    scale = np.abs(want[below]).max()
    apart = np.abs(np.asarray(got, np.float64)[below] - want[below]).max()
    assert apart <= float(jnp.finfo(dtype).eps) * scale


def test_a_gradient_keeps_what_enters_a_span_and_not_every_product():
    T = 4096
    shapes = dict(
        x=(1, T, 4, 32), dt=(1, T, 4), A=(4,), B=(1, T, 1, 32), C=(1, T, 1, 32)
    )
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]

    def total(*args):
        return ssd_chunked(*args, chunk_size=64)[0].sum()

    read, differentiate = (
        jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for f in (total, jax.grad(total, argnums=range(5)))
    )
    assert differentiate < 4 * read
