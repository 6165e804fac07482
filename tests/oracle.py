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


def softplus(v):
    return np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)


def silu(v):
    return v / (1 + np.exp(-v))


def rms_norm(v, weight, eps, groups=1):
    out = np.empty_like(v)
    for part in np.split(np.arange(v.shape[-1]), groups):
        mean_square = (v[..., part] ** 2).mean(-1, keepdims=True)
        out[..., part] = v[..., part] / np.sqrt(mean_square + eps)
    return out * weight


def mamba2(tensors, config, tokens):
    """Logits (T, V) of one row and the state of every layer, from a checkpoint.

    `tensors` and `config` are read as `transformers` stores them, by name.
    """
    w = {name: np.asarray(v, np.float64) for name, v in tensors.items()}
    H, P, G = config["num_heads"], config["head_dim"], config["n_groups"]
    N, K, eps = (
        config["state_size"],
        config["conv_kernel"],
        config["layer_norm_epsilon"],
    )
    low, high = config["time_step_limit"]
    high = np.inf if isinstance(high, dict) else high
    r = w["backbone.embeddings.weight"][tokens]
    T, states = len(tokens), []
    for i in range(config["num_hidden_layers"]):
        p = {k.split(".", 3)[3]: v for k, v in w.items() if f".layers.{i}." in k}
        u = rms_norm(r, p["norm.weight"], eps)
        u = u @ p["mixer.in_proj.weight"].T + p.get("mixer.in_proj.bias", 0)
        z, xBC, dt = np.split(u, np.cumsum([H * P, H * P + 2 * G * N]), axis=-1)
        past = np.concatenate([np.zeros((K - 1, xBC.shape[1])), xBC])
        conv = np.zeros_like(xBC)
        for t in range(T):
            for k in range(K):
                conv[t] += past[t + k] * p["mixer.conv1d.weight"][:, 0, k]
        conv = silu(conv + p.get("mixer.conv1d.bias", 0))
        x, B, C = np.split(conv, np.cumsum([H * P, G * N]), axis=-1)
        dt = np.clip(softplus(dt + p["mixer.dt_bias"]), low, high)
        y, h = ssd(
            x.reshape(1, T, H, P),
            dt[None],
            -np.exp(p["mixer.A_log"]),
            B.reshape(1, T, G, N),
            C.reshape(1, T, G, N),
            p["mixer.D"],
        )
        y = y.reshape(T, H * P) * silu(z)
        y = rms_norm(y, p["mixer.norm.weight"], eps, G)
        r = r + y @ p["mixer.out_proj.weight"].T + p.get("mixer.out_proj.bias", 0)
        states.append(h[0])
    head = w.get("lm_head.weight", w["backbone.embeddings.weight"])
    return rms_norm(r, w["backbone.norm_f.weight"], eps) @ head.T, states
