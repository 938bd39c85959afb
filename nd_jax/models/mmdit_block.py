"""One block of the diffusion transformer: joint attention over text and image with separate weights for each."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nd_jax.models.norms import AdaLayerNorm, LayerNorm, RMSNorm, modulate


QK_NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
xavier = nnx.initializers.xavier_uniform()


class JointAttention(nnx.Module):
    """Projections and per-head q/k norms; ``to_*`` and ``norm_*`` act on image tokens, ``add_*`` on text."""

    def __init__(self, config, *, last: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.width

        def linear():
            return nnx.Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.to_out = linear()
        if not last:
            self.to_add_out = linear()
        if config.qk_norm is not None:
            norm = QK_NORMS[config.qk_norm]
            self.norm_q, self.norm_k = (norm(config.attention_head_dim, rngs=rngs) for _ in range(2))
            self.norm_add_q, self.norm_add_k = (norm(config.attention_head_dim, rngs=rngs) for _ in range(2))


class FeedForward(nnx.Module):
    """Linear to four times the width, tanh GELU, linear back."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Token-wise."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """adaLN-zero, joint attention, adaLN-zero, feed forward. The ``last`` block updates image tokens only."""

    def __init__(self, config, *, last: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = AdaLayerNorm(config.width, 6, dtype=dtype, rngs=rngs)
        self.norm1_context = AdaLayerNorm(config.width, 2 if last else 6, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, last=last, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, dtype=dtype, rngs=rngs)
        if not last:
            self.ff_context = FeedForward(config.width, dtype=dtype, rngs=rngs)
