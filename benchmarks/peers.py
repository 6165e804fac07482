"""The implementations that compare.py measures: it starts this file once for each.

Each is set as its makers advise: a cache, greedy tokens, logits of the last position
alone. Imports wait until a worker needs them, since every peer is optional.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from gguf_file import write_gguf
from workers import Limits, Ours, Worker, answer


class Mamba2Jax(Worker):
    """mamba2-jax: its cached step in one compiled loop, its head on the last token."""

    packages = "mamba2-jax", "flax"

    def load(self):
        import jax
        import mamba2_jax
        from flax import nnx
        from mamba2_jax.params import load_pytorch_weights
        from safetensors.numpy import load_file

        names = "vocab_size", "hidden_size", "num_hidden_layers", "state_size"
        names += "head_dim", "chunk_size", "conv_kernel", "layer_norm_epsilon"
        config = mamba2_jax.Mamba2Config(**{name: self.sizes[name] for name in names})
        model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
        tensors = load_file(Path(self.job["folder"]) / "model.safetensors")
        tensors = {
            k.replace("embeddings.", "embedding."): v for k, v in tensors.items()
        }
        load_pytorch_weights(model, tensors, strict=True)
        graph, self.state = nnx.split(model)
        if "chunk1" in self.job["name"]:  # a step then pads to 1 token, not to 256
            for layer in model.backbone.layers:
                layer.mixer.chunk_size = 1
        step_graph = nnx.split(model)[0]

        def call(graph, state, tokens, cache=None):
            model = nnx.merge(graph, state).backbone
            out = model(tokens, cache=cache)
            logits = out["last_hidden_state"][:, -1] @ model.embedder.embedding[:].T
            return logits, out["cache"]

        def loop(state, token, cache, n):
            def step(_, carry):
                logits, cache = call(step_graph, state, carry[0][:, None], carry[1])
                return logits.argmax(-1).astype("int32"), cache

            return jax.lax.fori_loop(0, n, step, (token, cache))[0]

        self.call = jax.jit(partial(call, graph))
        self.step = jax.jit(partial(call, step_graph))
        self.loop = jax.jit(loop)

    def read(self, tokens):
        logits, self.cache = self.call(self.state, tokens)
        return logits.block_until_ready()

    def feed(self, token):
        return self.step(self.state, token[:, None], self.cache)[0]

    def greedy(self, n):
        self.loop(self.state, self.tokens[:, -1], self.cache, n).block_until_ready()


class Transformers(Worker):
    """transformers with its cache, eager; or its step through torch.compile."""

    packages = "torch", "transformers"

    def load(self):
        import torch
        import transformers

        torch.set_num_threads(self.job["threads"])
        dtype = getattr(torch, self.job["dtype"])
        load = transformers.Mamba2ForCausalLM.from_pretrained
        self.torch = torch
        self.model = self.step = load(self.job["folder"], dtype=dtype).eval()
        if "compile" in self.job["name"]:
            import torch._inductor.config

            torch._inductor.config.freezing = True  # weights packed for the CPU
            self.step = torch.compile(self.model, dynamic=False)

    def read(self, tokens):
        tokens = self.torch.from_numpy(tokens).long()
        with self.torch.inference_mode():
            out = self.model(tokens, use_cache=True, logits_to_keep=1)
        self.cache = out.cache_params
        return out.logits[:, -1].numpy()

    def _next(self, token):
        out = self.step(token[:, None], cache_params=self.cache, use_cache=True)
        return out.logits[:, -1]

    def feed(self, token):
        with self.torch.inference_mode():
            return self._next(self.torch.from_numpy(token).long()).numpy()

    def greedy(self, n):
        with self.torch.inference_mode():
            token = self.torch.from_numpy(self.tokens[:, -1]).long()
            for _ in range(n):
                token = self._next(token).argmax(-1)
            return token.numpy()


class LlamaCpp(Worker):
    """llama.cpp through the C functions of llama-cpp-python."""

    packages = "llama-cpp-python", "gguf"

    def load(self):
        import llama_cpp as C

        path = Path(self.job["folder"]) / f"{self.job['dtype']}.gguf"
        write_gguf(Path(self.job["folder"]), path, self.job["dtype"])
        b, T = self.tokens.shape
        self.C, self.V = C, self.sizes["vocab_size"]
        self.model = C.llama_model_load_from_file(
            str(path).encode(), C.llama_model_default_params()
        )
        settings = C.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = 2**20, b
        settings.n_batch = b * T
        settings.n_threads = settings.n_threads_batch = self.job["threads"]
        self.context = C.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path.name}")
        self.batch = C.llama_batch_init(b * T, 0, 1)

    def _run(self, tokens):
        """Logits (b, V) of each row's last token; rows go on from where they are."""
        (b, T), batch = tokens.shape, self.batch
        batch.n_tokens = b * T
        for i, token in enumerate(tokens.ravel().tolist()):
            row, t = divmod(i, T)
            batch.token[i], batch.pos[i] = token, self.position + t
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = t == T - 1
        if self.C.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.position += T
        last = [
            self.C.llama_get_logits_ith(self.context, row * T + T - 1)
            for row in range(b)
        ]
        return np.stack([np.ctypeslib.as_array(p, (self.V,)) for p in last])

    def read(self, tokens):
        self.C.llama_memory_clear(self.C.llama_get_memory(self.context), True)
        self.position = 0
        return self._run(tokens)

    def feed(self, token):
        return self._run(token[:, None])

    def greedy(self, n):
        token = self.tokens[:, -1]
        for _ in range(n):
            token = self._run(token[:, None]).argmax(-1)


class Mlx(Worker):
    """mlx-lm on the CPU, steps queued ahead as its own generation does."""

    packages = "mlx", "mlx-lm"

    def load(self):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        c, self.mx = self.sizes, mx
        more = {"intermediate_size": c["num_heads"] * c["head_dim"]}
        more |= {"time_step_rank": "auto", "time_step_limit": [0.0, float("inf")]}
        self.model, _ = load_model(Path(self.job["folder"]), model_config=more)
        self.model.set_dtype(getattr(mx, self.job["dtype"]))
        mx.eval(self.model.parameters())

    def _next(self, tokens):
        backbone = self.model.backbone
        hidden = backbone(tokens, self.cache)[:, -1]
        return backbone.embeddings.as_linear(hidden).astype(self.mx.float32)

    def read(self, tokens):
        self.cache = self.model.make_cache()
        return np.array(self._next(self.mx.array(tokens)))

    def feed(self, token):
        return np.array(self._next(self.mx.array(token[:, None])))

    def greedy(self, n):
        token = self.mx.array(self.tokens[:, -1])
        for _ in range(n):
            token = self._next(token[:, None]).argmax(-1)
            self.mx.async_eval(token)
        self.mx.eval(token)


PEERS = {  # name: (worker, dtypes of its weights)
    "ours": (Ours, ("float32", "bfloat16", "int8")),
    "mamba2-jax": (Mamba2Jax, ("float32",)),
    "mamba2-jax-chunk1": (Mamba2Jax, ("float32",)),
    "transformers": (Transformers, ("float32", "bfloat16")),
    "transformers-compile": (Transformers, ("float32", "bfloat16")),
    "llama.cpp": (LlamaCpp, ("float32", "bfloat16", "q8_0")),
    "mlx-lm": (Mlx, ("float32", "bfloat16")),
}
LIMITS = "XLA", "NumPy", "torch"


if __name__ == "__main__":
    if sys.argv[1:]:
        makers = {name: make for name, (make, _) in PEERS.items()}
        answer(makers | dict.fromkeys(LIMITS, Limits))
