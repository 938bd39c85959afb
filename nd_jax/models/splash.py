"""Attention in blocks on a TPU that skips what the mask rules out (JAX's splash attention kernel).

All groups of a denoiser call lie in a single sequence: a query sees keys of its own group and of no later time, which
is static and skips whole blocks, and of its own segment, which is data (padded text).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from nd_jax.models.attention import SEEN, Placed
from nd_jax.models.kernel_work import scope

LANES = 128
"""Sequences are padded to a multiple of this."""
BLOCKS = (512, 256, 128)
"""Sizes of a tile that are tried, largest first."""
PADDING = -1
"""Segment of what fills a sequence up; it reads itself."""


@dataclass(frozen=True, eq=False)
class Order(masks.Mask):
    """The static mask: a query reads keys of its own group and of no later time.

    Nothing of size queries x keys is kept; the kernel's tables are made tile by tile.
    """

    queries: Int[np.ndarray, "q 2"]
    keys: Int[np.ndarray, "k 2"]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.queries), len(self.keys)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.queries[index[0]][:, None], self.keys[index[1]][None]
        return (queries[..., 0] == keys[..., 0]) & (queries[..., 1] >= keys[..., 1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple:
        return self.queries.tobytes(), self.keys.tobytes()


def padded_sizes(queries: int, keys: int) -> tuple[int, int]:
    """The lengths that both sequences are filled up to; there is filling among the keys for filled queries to read."""
    return -(-queries // LANES) * LANES, (keys // LANES + 1) * LANES


def splash_attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    asked: Placed,
    known: Placed,
    *,
    interpret: bool = False,
) -> Float[Array, "b q h*d"]:
    """Attention of all groups at once, as ``attention.attend`` gives it under their masks.

    Args:
        q, k, v: heads of the groups' tokens, in any order.
        asked: of the queries: places and segments [B, Q].
        known: likewise of the keys; queries read keys of their own segment.
        interpret: run the kernel's program on any platform, slowly.
    """
    batch, length, heads, dim = q.shape
    sizes = padded_sizes(length, k.shape[1])
    ids = [_fill(each.segments, size) for each, size in zip((asked, known), sizes, strict=True)]
    ids = [jnp.broadcast_to(each, (batch, each.shape[1])) for each in ids]
    order = _order(asked.places, known.places)
    mask = masks.MultiHeadMask([order] * heads)
    attend = kernel.make_splash_mha(
        mask,
        block_sizes=_blocks(*sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SEEN,
        interpret=interpret,
    )
    q, k, v = (
        _fill(jnp.swapaxes(x, 1, 2), size, axis=2)
        for x, size in zip((q * dim**-0.5, k, v), (sizes[0], sizes[1], sizes[1]), strict=True)
    )
    with jax.named_scope(scope(batch * heads * dim * _visited(order))):
        out = jax.vmap(lambda q, k, v, a, b: attend(q, k, v, kernel.SegmentIds(a, b)))(q, k, v, *ids)
    return jnp.swapaxes(out[:, :, :length], 1, 2).reshape(batch, length, -1)


def _fill(x: Array, size: int, axis: int = 1) -> Array:
    widths = [(0, size - x.shape[axis]) if dim == axis else (0, 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=PADDING if jnp.issubdtype(x.dtype, jnp.integer) else 0)


def _order(asked: Int[np.ndarray, "q 2"], known: Int[np.ndarray, "k 2"]) -> Order:
    """The mask of sequences that are filled up with tokens of a group of their own."""
    own = max(asked[:, 0].max(), known[:, 0].max()) + 1
    sizes = padded_sizes(len(asked), len(known))
    filled = [
        np.concatenate([places, np.full((size - len(places), 2), (own, 0), np.int32)])
        for places, size in zip((asked, known), sizes, strict=True)
    ]
    return Order(*filled)


def _blocks(queries: int, keys: int) -> kernel.BlockSizes:
    """Tiles of both passes. Gradients of queries have a kernel of their own: the fused one would write a part of them
    for every tile of keys, masked or not, gigabytes that are then summed."""
    q, k = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    return kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=k,
        block_q_dq=q,
        block_kv_dq=k,
    )


def visited_pairs(asked: Int[np.ndarray, "q 2"], known: Int[np.ndarray, "k 2"]) -> int:
    """Pairs of a query and a key in tiles that the kernel computes: what its arithmetic is counted by."""
    return _visited(_order(asked, known))


@cache
def _visited(order: Order) -> int:
    blocks = _blocks(*order.shape)
    tiles = sum(
        bool(order[slice(i, i + blocks.block_q), slice(j, j + blocks.block_kv)].any())
        for i in range(0, order.shape[0], blocks.block_q)
        for j in range(0, order.shape[1], blocks.block_kv)
    )
    return tiles * blocks.block_q * blocks.block_kv
