"""The definitions as NumPy float64 loops. Imports nothing from ssdlib."""

import numpy as np


def ssd(x, dt, A, B, C, D=None, h0=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ and y_t = h_t C_t + D x_t."""
    x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    y = np.zeros((b, T, H, P))
    h = np.zeros((b, H, P, N)) if h0 is None else np.array(h0, np.float64)
    for i, t, k in np.ndindex(b, T, H):
        g = k * G // H
        h[i, k] *= np.exp(dt[i, t, k] * A[k])
        h[i, k] += dt[i, t, k] * np.outer(x[i, t, k], B[i, t, g])
        y[i, t, k] = h[i, k] @ C[i, t, g]
        if D is not None:
            y[i, t, k] += float(D[k]) * x[i, t, k]
    return y, h


def segment_sums(log_a):
    """S_ts = Σ_{s < j <= t} log_a_j, each added up by itself; -inf above."""
    log_a = np.asarray(log_a, np.float64)
    T = log_a.shape[-1]
    S = np.full((*log_a.shape, T), -np.inf)
    for t in range(T):
        for s in range(t + 1):
            S[..., t, s] = log_a[..., s + 1 : t + 1].sum(-1)
    return S


def error(y, y_star):
    """max|y - y*| / max|y*|."""
    y, y_star = np.asarray(y, np.float64), np.asarray(y_star, np.float64)
    return np.abs(y - y_star).max() / np.abs(y_star).max()
