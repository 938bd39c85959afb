"""Attention in blocks on a TPU that skips what the mask rules out (JAX's splash attention kernel).

All groups of a denoiser call lie one after another in a single sequence: a query sees keys of its own group and of no
later time, which is static and skips whole blocks, and of its own segment, which is data (padded text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from nd_jax.models.kernel_work import scope

LANES = 128
"""Sequences are padded to a multiple of this."""
BLOCKS = (512, 256, 128)
"""Sizes of a tile that are tried, largest first."""
PADDING = -1
"""Segment of what fills a sequence up; it reads itself."""


@dataclass(frozen=True, eq=False)
class Order(masks.Mask):
    """The static mask of several groups side by side: each group's times, and how many of its last tokens ask.

    Nothing of size queries x keys is kept; the kernel's tables are made tile by tile.
    """

    times: tuple[tuple[int, ...], ...]
    asking: tuple[int, ...]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @cached_property
    def _keys(self) -> np.ndarray:
        """[group, time] of every key."""
        rows = [(group, time) for group, times in enumerate(self.times) for time in times]
        rows += [(len(self.times), 0)] * (self.size[1] - len(rows))
        return np.array(rows, np.int32)

    @cached_property
    def _queries(self) -> np.ndarray:
        pairs = zip(self.times, self.asking, strict=True)
        rows = [(group, time) for group, (times, n) in enumerate(pairs) for time in times[len(times) - n :]]
        rows += [(len(self.times), 0)] * (self.size[0] - len(rows))
        return np.array(rows, np.int32)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self._queries[index[0]][:, None], self._keys[index[1]][None]
        return (queries[..., 0] == keys[..., 0]) & (queries[..., 1] >= keys[..., 1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple:
        return self.times, self.asking, self.size


def padded_sizes(queries: int, keys: int) -> tuple[int, int]:
    """The lengths that both sequences are filled up to; there is filling among the keys for filled queries to read."""
    return -(-queries // LANES) * LANES, (keys // LANES + 1) * LANES


def splash_attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    times: tuple[tuple[int, ...], ...],
    asking: tuple[int, ...],
    segments: Int[Array, "b k"],
    *,
    interpret: bool = False,
) -> Float[Array, "b q h*d"]:
    """Attention of all groups at once, as ``attention.attend`` gives it under their masks.

    Args:
        q, k, v: heads of the groups' tokens, group after group; ``q`` only of those that ask.
        times: of every group's tokens, which have to be known before compiling.
        asking: how many of each group's last tokens stand in ``q``.
        segments: of all keys, group after group; queries read keys of their own segment.
        interpret: run the kernel's program on any platform, slowly.
    """
    batch, length, heads, dim = q.shape
    own, start = [], 0
    for group, n in zip(times, asking, strict=True):
        start += len(group)
        own.append(segments[:, start - n : start])
    sizes = padded_sizes(length, k.shape[1])
    ids = [_fill(each, size) for each, size in zip((jnp.concatenate(own, axis=1), segments), sizes, strict=True)]
    ids = [jnp.broadcast_to(each, (batch, each.shape[1])) for each in ids]
    mask = masks.MultiHeadMask([Order(times, asking, sizes)] * heads)
    attend = kernel.make_splash_mha(
        mask, block_sizes=_blocks(*sizes), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q, k, v = (
        _fill(jnp.swapaxes(x, 1, 2), size, axis=2)
        for x, size in zip((q * dim**-0.5, k, v), (sizes[0], sizes[1], sizes[1]), strict=True)
    )
    with jax.named_scope(scope(batch * heads * dim * visited_pairs(times, asking))):
        out = jax.vmap(lambda q, k, v, a, b: attend(q, k, v, kernel.SegmentIds(a, b)))(q, k, v, *ids)
    return jnp.swapaxes(out[:, :, :length], 1, 2).reshape(batch, length, -1)


def _fill(x: Array, size: int, axis: int = 1) -> Array:
    widths = [(0, size - x.shape[axis]) if dim == axis else (0, 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=PADDING if jnp.issubdtype(x.dtype, jnp.integer) else 0)


def _blocks(queries: int, keys: int) -> kernel.BlockSizes:
    q, k = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    return kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=k,
        use_fused_bwd_kernel=True,
    )


def visited_pairs(times: Sequence[tuple[int, ...]], asking: Sequence[int]) -> int:
    """Pairs of a query and a key in tiles that the kernel computes: what its arithmetic is counted by."""
    return _visited(tuple(times), tuple(asking))


@cache
def _visited(times: tuple[tuple[int, ...], ...], asking: tuple[int, ...]) -> int:
    length, keys = padded_sizes(sum(asking), sum(map(len, times)))
    order, blocks = Order(times, asking, (length, keys)), _blocks(length, keys)
    tiles = sum(
        bool(order[slice(i, i + blocks.block_q), slice(j, j + blocks.block_kv)].any())
        for i in range(0, length, blocks.block_q)
        for j in range(0, keys, blocks.block_kv)
    )
    return tiles * blocks.block_q * blocks.block_kv
