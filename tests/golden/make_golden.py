"""What another implementation computes: transformers' Mamba2ForCausalLM, on the CPU.

    python tests/golden/make_golden.py           print ours against it (live, recorded)
    python tests/golden/make_golden.py --write   run it and write the .npz files

The tests import this file for the checkpoints, so only `reference` needs torch and
transformers. A checkpoint is written from scratch: no code of ssdlib is part of it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent
TINY = GOLDEN.parent.parent / "ssdlib" / "tiny"
STEPS = 64  # greedy tokens
ARRAYS = "logits", "conv", "h", "steps"
BASE = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=12,
    state_size=10,
    n_groups=1,
    conv_kernel=4,
    chunk_size=8,
    expand=2,
    tie_word_embeddings=True,
    use_conv_bias=True,
    use_bias=False,
)
LIMIT = [0.02, 0.05]  # dt lies between 0.001 and 0.1 without it
CASES = {  # name: what differs from BASE; no chunk size divides the length
    "one_group": {},
    "two_groups": dict(n_groups=2, chunk_size=7),
    "eight_groups": dict(num_heads=8, head_dim=6, n_groups=8, chunk_size=16),
    "odd_sizes": dict(
        hidden_size=15, num_heads=5, head_dim=6, state_size=9, conv_kernel=3
    ),
    "untied_head": dict(tie_word_embeddings=False, n_groups=2, chunk_size=256),
    "biases": dict(use_bias=True, use_conv_bias=False, chunk_size=5),
    "time_step_limit": dict(time_step_limit=LIMIT),
    "width_of_130m": dict(
        vocab_size=256,
        hidden_size=768,
        num_heads=24,
        head_dim=64,
        state_size=128,
        chunk_size=256,
    ),
    "shipped": None,  # the trained model in ssdlib/tiny, on English text
}


def write_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint in the transformers layout, the same on every machine."""
    if CASES[name] is None:
        return TINY
    config = BASE | CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    fixed = dict(model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    fixed |= dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])
    (folder / "config.json").write_text(json.dumps(config | fixed))
    save_file(
        {k: v.astype(np.float32) for k, v in tensors(config, name).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def tensors(config: dict, name: str) -> dict[str, np.ndarray]:
    """Random weights, by the generator that NumPy promises never to change."""
    rng = np.random.RandomState(sum(map(ord, name)))
    d, H, V = config["hidden_size"], config["num_heads"], config["vocab_size"]
    d_inner = H * config["head_dim"]
    d_xBC = d_inner + 2 * config["n_groups"] * config["state_size"]

    def matrix(rows, columns):
        return rng.standard_normal((rows, columns)) / np.sqrt(columns)

    def near_one(n):
        return 1 + 0.1 * rng.standard_normal(n)

    out = {"backbone.embeddings.weight": 1.5 * matrix(V, d)}
    for i in range(config["num_hidden_layers"]):
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H))
        layer = {
            "norm.weight": near_one(d),
            "mixer.in_proj.weight": matrix(d_inner + d_xBC + H, d),
            "mixer.conv1d.weight": matrix(d_xBC, config["conv_kernel"])[:, None],
            "mixer.dt_bias": dt + np.log(-np.expm1(-dt)),  # inverse of softplus
            "mixer.A_log": np.log(rng.uniform(1, 16, H)),
            "mixer.D": near_one(H),
            "mixer.norm.weight": near_one(d_inner),
            "mixer.out_proj.weight": matrix(d, d_inner),
        }
        if config["use_conv_bias"]:
            layer["mixer.conv1d.bias"] = 0.1 * rng.standard_normal(d_xBC)
        if config["use_bias"]:
            rows = len(layer["mixer.in_proj.weight"])
            layer["mixer.in_proj.bias"] = 0.1 * rng.standard_normal(rows)
            layer["mixer.out_proj.bias"] = 0.1 * rng.standard_normal(d)
        out |= {f"backbone.layers.{i}.{k}": v for k, v in layer.items()}
    out["backbone.norm_f.weight"] = near_one(d)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix(V, d)
    return out


def prompt(name: str) -> np.ndarray:
    """Tokens (b, T) that a case reads; T is no multiple of its chunk size."""
    if name == "shipped":
        return passage(name)[:, 3000:3301]
    shape = (1, 301) if name == "width_of_130m" else (2, 53)
    vocab_size = (BASE | CASES[name])["vocab_size"]
    return np.random.RandomState(7).randint(0, vocab_size, shape)


def passage(name: str) -> np.ndarray:
    """Tokens (b, T) whose perplexity is taken: a text for the model that knows any."""
    if name != "shipped":
        return prompt(name)
    text = (TINY.parent.parent / "LICENSE").read_bytes()[:4001]
    return np.frombuffer(text, np.uint8).astype(np.int64)[None]


def reference(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Logits, final cache, greedy steps and perplexity by transformers, float32."""
    import torch
    from transformers import Mamba2ForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, text = torch.as_tensor(prompt(name)), torch.as_tensor(passage(name))
    with torch.no_grad():
        out = model(ids, use_cache=True)
        log_p = torch.log_softmax(model(text).logits[:, :-1].double(), -1)
        nats = -log_p.gather(-1, text[:, 1:, None]).mean()
        # Its cached step does not clamp dt (transformers 5.23.0), so where that matters
        # every token is generated from the whole text. Without a mask, generate guesses
        # one from the padding token.
        cached = np.isinf(model.config.time_step_limit[1])
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            use_cache=bool(cached),
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    layers = out.cache_params.layers
    K = model.config.conv_kernel - 1
    conv = [v.conv_states[0][..., -K:].transpose(1, 2) for v in layers]
    h = [v.recurrent_states[0] for v in layers]
    return {
        "logits": out.logits.numpy(),
        "conv": torch.stack(conv).numpy(),
        "h": torch.stack(h).numpy(),
        "steps": torch.stack(greedy.logits, 1).numpy(),  # that chose the tokens
        "greedy": greedy.sequences[:, ids.shape[1] :].numpy(),
        "nats": nats.numpy(),
    }


def record(values: dict) -> dict:
    """The part that is kept in a file: of large states, every 16th column."""
    h = values["h"]
    return values | {"h": h[..., ::16] if h.nbytes > 2**18 else h}


def ours(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The same by ssdlib: forward, prefill, decode_step, generate and evaluate."""
    import jax
    import jax.numpy as jnp

    import ssdlib
    from ssdlib.evaluate import evaluate

    jax.config.update("jax_default_matmul_precision", "highest")
    params, config = ssdlib.load(folder)
    tokens = prompt(name)
    logits, cache = ssdlib.prefill(params, config, tokens)
    greedy = ssdlib.generate(params, config, tokens, STEPS).tokens
    steps, last = [logits], cache
    for t in range(STEPS - 1):
        logits, last = ssdlib.decode_step(params, config, greedy[:, t], last)
        steps.append(logits)
    nats = [evaluate(params, config, row, piece=20).loss for row in passage(name)]
    return {
        "logits": np.asarray(ssdlib.forward(params, config, tokens)),
        "conv": np.asarray(jnp.moveaxis(cache.conv, 1, 0)),
        "h": np.asarray(jnp.stack(cache.h)),
        "steps": np.asarray(jnp.stack(steps, 1)),
        "greedy": np.asarray(greedy),
        "nats": np.mean(nats),
    }


def compare(mine: dict, theirs: dict) -> dict[str, float]:
    """max|y - y*| / max|y*| of arrays; tokens that are equal; perplexity, relative."""
    if theirs["h"].shape != mine["h"].shape:
        mine = record(mine)
    out = {
        key: float(np.abs(mine[key] - theirs[key]).max() / np.abs(theirs[key]).max())
        for key in ARRAYS
    }
    out["argmax"] = float(
        (mine["logits"].argmax(-1) == theirs["logits"].argmax(-1)).mean()
    )
    out["greedy"] = int((mine["greedy"] == theirs["greedy"]).all(0).cumprod().sum())
    out["perplexity"] = float(np.abs(np.expm1(mine["nats"] - theirs["nats"])))
    return out


def main() -> int:
    """Write the files, or print the table; 1 if a case misses the limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the .npz files")
    write = parser.parse_args().write
    try:
        import torch
        import transformers

        live = f"transformers {transformers.__version__}, torch {torch.__version__}"
    except ModuleNotFoundError:
        live = None
    print(f"live: {live or 'not installed; only the recorded values are compared'}")
    row = "{:16} {:>9}" + " {:>8}" * 7
    print(row.format("case", "against", *ARRAYS, "argmax", "greedy", "ppl"))
    failed = False
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            folder, rows = write_checkpoint(Path(folder), name), {}
            mine = ours(folder, name)
            if live:
                rows["live"] = reference(folder, name)
            if write:
                kept = record(rows["live"]) | {"prompt": prompt(name)}
                np.savez_compressed(GOLDEN / f"{name}.npz", **kept)
            rows["recorded"] = dict(np.load(GOLDEN / f"{name}.npz"))
        for kind, theirs in rows.items():
            e = compare(mine, theirs)
            numbers = [f"{e[k]:.1e}" for k in ARRAYS]
            numbers += [f"{e['argmax']:.1%}", f"{e['greedy']}/{STEPS}"]
            print(row.format(name, kind, *numbers, f"{e['perplexity']:.1e}"))
            failed |= max(e[key] for key in ARRAYS) > 1e-5
            failed |= e["greedy"] < STEPS or e["argmax"] < 1 or e["perplexity"] > 1e-4
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
