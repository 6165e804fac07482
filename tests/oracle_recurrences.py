"""Other recurrences as NumPy float64 loops, from their papers' equations.

Imports nothing from ssdlib. Each loop handles one batch row and one head, forms the
state literally, and returns (y, last state). `over_heads` runs it for all of them.
"""

import numpy as np


def over_heads(loop, *arrays, **more):
    """Call loop for every batch row and head of arrays (b, T, H, ...) and stack.

    A `more` array is (b, H, ...): an initial state.
    """
    arrays = [np.asarray(v, np.float64) for v in arrays]
    more = {k: np.asarray(v, np.float64) for k, v in more.items()}
    b, _, H = arrays[0].shape[:3]
    runs = [
        [
            loop(*(v[i, :, j] for v in arrays), **{k: v[i, j] for k, v in more.items()})
            for j in range(H)
        ]
        for i in range(b)
    ]
    pick = [[np.stack([run[n] for run in row]) for row in runs] for n in range(2)]
    y, state = (np.stack(v) for v in pick)
    return np.moveaxis(y, 1, 2), state


def linear_attention(q, k, v, S0=None):
    """Katharopoulos et al. 2020: s_t = s_{t-1} + k_t v_tᵀ, y_t = q_tᵀ s_t."""
    s = np.zeros((k.shape[1], v.shape[1])) if S0 is None else S0.T.copy()
    y = np.zeros_like(v)
    for t in range(len(v)):
        s += np.outer(k[t], v[t])
        y[t] = q[t] @ s
    return y, s.T


def normalized_linear_attention(q, k, v, S0=None):
    """The same with z_t = z_{t-1} + k_t and y_t = q_tᵀ s_t / q_tᵀ z_t."""
    s, z = np.zeros((k.shape[1], v.shape[1])), np.zeros(k.shape[1])
    if S0 is not None:
        s, z = S0[:-1].T.copy(), S0[-1].copy()
    y = np.zeros_like(v)
    for t in range(len(v)):
        s, z = s + np.outer(k[t], v[t]), z + k[t]
        y[t] = q[t] @ s / (q[t] @ z)
    return y, np.vstack([s.T, z])


def simple_gla(q, k, v, log_a, S0=None):
    """S_t = a_t S_{t-1} + k_t v_tᵀ, y_t = q_tᵀ S_t, a_t a number."""
    return gla(q, k, v, np.repeat(log_a[:, None], k.shape[1], axis=1), S0)


def gla(q, k, v, log_a, S0=None):
    """Yang et al. 2023: S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, y_t = q_tᵀ S_t."""
    S = np.zeros((k.shape[1], v.shape[1])) if S0 is None else S0.T.copy()
    y = np.zeros_like(v)
    for t in range(len(v)):
        S = np.diag(np.exp(log_a[t])) @ S + np.outer(k[t], v[t])
        y[t] = q[t] @ S
    return y, S.T


def retention(q, k, v, head, start=0):
    """Sun et al. 2023: y_n = Σ_{m<=n} γ^(n-m) (Q_n e^{inθ}) (K_m e^{imθ})† v_m.

    Pairs of channels are complex numbers. No recurrence here: the sum itself.
    """
    gamma, half = 1 - 2.0 ** (-5 - head), q.shape[1] // 2
    theta = 10_000 ** -np.linspace(0, 1, half)
    n = start + np.arange(len(q))
    turn = np.exp(1j * n[:, None] * theta)
    Q = (q[:, 0::2] + 1j * q[:, 1::2]) * turn
    K = (k[:, 0::2] + 1j * k[:, 1::2]) * turn
    y = np.zeros_like(v)
    for t in range(len(v)):
        for s in range(t + 1):
            y[t] += gamma ** (t - s) * (Q[t] @ K[s].conj()).real * v[s]
    return y


def mlstm(q, k, v, log_i, log_f):
    """Beck et al. 2024, without stabilizer: the gates are exponentiated as they are.

    In extended precision, so that exp(log_i) may be large. y only: the library's
    state is divided by exp(m).
    """
    q, k, v, log_i, log_f = (np.longdouble(w) for w in (q, k, v, log_i, log_f))
    C = np.zeros((v.shape[1], k.shape[1]), np.longdouble)
    n = np.zeros(k.shape[1], np.longdouble)
    y = np.zeros_like(v)
    for t in range(len(v)):
        i, f = np.exp(log_i[t]), np.exp(log_f[t])
        C = f * C + i * np.outer(v[t], k[t])
        n = f * n + i * k[t]
        y[t] = C @ q[t] / max(abs(n @ q[t]), 1)
    return np.float64(y), np.float64(C / np.exp(log_i.max()))


def mamba3(x, dt, A, lam, B, C, angle):
    """Lahoti et al. 2026: trapezoidal rule, and pairs of channels as complex numbers.

    h_t = a_t e^{iθ_t} h_{t-1} + (1-λ_t) dt_t a_t e^{iθ_t} u_{t-1} + λ_t dt_t u_t with
    u_t = x_t ⊗ B_t, y_t = Re(h_t C_t†); channels without an angle have θ = 0.
    """
    pairs = B.shape[1] // 2
    theta = np.pad(angle, ((0, 0), (0, pairs - angle.shape[1])))
    B, C = (w[:, 0::2] + 1j * w[:, 1::2] for w in (B, C))
    h = np.zeros((x.shape[1], pairs), complex)
    y = np.zeros_like(x)
    for t in range(len(x)):
        a = np.exp(dt[t] * A[t]) * np.exp(1j * theta[t])
        before = np.outer(x[t - 1], B[t - 1]) if t else 0 * h
        h = a * h + (1 - lam[t]) * dt[t] * a * before
        h = h + lam[t] * dt[t] * np.outer(x[t], B[t])
        y[t] = (h @ C[t].conj()).real
    return y, h.view(float)


def delta_net(q, k, v, beta, S0=None):
    """Yang et al. 2024: S_t = S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y = S q."""
    S = np.zeros((v.shape[1], k.shape[1])) if S0 is None else S0.copy()
    y = np.zeros_like(v)
    for t in range(len(v)):
        S = S @ (np.eye(k.shape[1]) - beta[t] * np.outer(k[t], k[t]))
        S = S + beta[t] * np.outer(v[t], k[t])
        y[t] = S @ q[t]
    return y, S
