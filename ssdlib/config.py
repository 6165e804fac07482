"""The sizes of a Mamba-2 model, with their dimension letters; the published five.

Source of the presets: config.json of state-spaces/mamba2-130m, -370m, -780m, -1.3b and
-2.7b.
"""

import math
from dataclasses import dataclass

from ssdlib._checks import check_fields, is_number

__all__ = ["PRESETS", "Mamba2Config"]


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 language model. Frozen and hashable: a static jit argument.

    Raises ValueError if a size is not a positive integer, a switch not a bool, if the
    groups do not divide the heads, or if time_step_limit is not 0 <= low <= high.
    """

    vocab_size: int  # V
    d_model: int  # width of the residual stream
    n_layers: int
    n_heads: int  # H
    head_dim: int = 64  # P
    d_state: int = 128  # N
    n_groups: int = 1  # G, groups of heads that share B and C
    d_conv: int = 4  # taps of the causal convolution
    chunk_size: int = 256  # Q
    tie_embeddings: bool = True  # the head reuses the embedding matrix
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)  # dt is clipped to it

    def __post_init__(self):
        check_fields(self)
        if self.n_heads % self.n_groups:
            raise ValueError(
                f"n_groups: {self.n_groups}; it must divide n_heads = {self.n_heads}"
            )
        limit = self.time_step_limit
        pair = isinstance(limit, tuple) and len(limit) == 2
        if not pair or not all(map(is_number, limit)) or not 0 <= limit[0] <= limit[1]:
            raise ValueError(
                f"time_step_limit: {limit!r}; it must be (low, high), 0 <= low <= high"
            )
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps: {self.norm_eps!r}; it must be between 0 and 1")
        # Numbers of Python: an array has no hash.
        object.__setattr__(self, "norm_eps", float(self.norm_eps))
        object.__setattr__(self, "time_step_limit", tuple(map(float, limit)))

    @property
    def d_inner(self) -> int:
        """Width of the SSM input, H P."""
        return self.n_heads * self.head_dim

    @property
    def d_xBC(self) -> int:
        """Channels that pass the convolution: x, B and C side by side, H P + 2 G N."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @classmethod
    def tiny(cls, **changes) -> "Mamba2Config":
        """Sizes for tests: small, with two groups; fields given are set otherwise."""
        sizes = dict(vocab_size=61, d_model=24, n_layers=2, n_heads=4, head_dim=12)
        sizes |= dict(d_state=10, n_groups=2, chunk_size=8)
        return cls(**(sizes | changes))

    @classmethod
    def preset(cls, name: str) -> "Mamba2Config":
        """A published model: "130m", "370m", "780m", "1.3b" or "2.7b"."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"name: {name!r}; it must be one of {', '.join(PRESETS)}")
        d_model, n_layers = PRESETS[name]
        H = 2 * d_model // 64
        return cls(vocab_size=50288, d_model=d_model, n_layers=n_layers, n_heads=H)


PRESETS = {  # name: (d_model, n_layers); all have d_inner = 2 d_model, P = 64, N = 128
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}
