"""Which blocks matter, and taking some out (paper, section on block pruning).

Block influence of block k, separately for image and text tokens: ``BI = 1 - E[cos(token in, token out)]``, over
prompts, samples, every denoising step and both guidance branches. The last block has no text output and is never a
candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.mmdit import MMDiTConfig


def one_minus_cosine(
    before: Float[Array, "b l d"], after: Float[Array, "b l d"], weight: Float[Array, "b l"]
) -> Float[Array, 2]:
    """Weighted sum over tokens of ``1 - cos(before, after)``, and the sum of the weights.

    Half the squared distance of the unit vectors is the same number without its cancellation: never below 0, and 0
    for equal tokens.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    distance = 0.5 * jnp.sum(jnp.square(unit(before) - unit(after)), axis=-1)
    return jnp.stack([jnp.sum(weight * distance), jnp.sum(weight)])


def influence_reducer(image_weight: Float[Array, "b l"], text_weight: Float[Array, "b s"]):
    """What the denoiser runs inside its scan: per block, [2, 2] = (image, text) x (sum, weight); padding weighs 0."""

    def reduce(image_in: Array, image_out: Array, text_in: Array, text_out: Array) -> Float[Array, "2 2"]:
        return jnp.stack(
            [one_minus_cosine(image_in, image_out, image_weight), one_minus_cosine(text_in, text_out, text_weight)]
        )

    return reduce


@dataclasses.dataclass(frozen=True)
class BlockInfluence:
    """Mean influence of each removable block, in [0, 2]; 0 means that the block changes nothing."""

    image: Float[np.ndarray, " k"]
    text: Float[np.ndarray, " k"]

    @classmethod
    def from_sums(cls, sums: Float[Array, "k 2 2"]) -> BlockInfluence:
        """From ``influence_reducer``'s output added up over calls."""
        sums = np.asarray(sums, np.float64)
        means = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
        return cls(means[:, 0], means[:, 1])

    @property
    def score(self) -> Float[np.ndarray, " k"]:
        """Mean of both, each scaled to a largest value of 1: the two are uncorrelated and of different size."""
        return sum(x / (x.max() or 1.0) for x in (self.image, self.text)) / 2


def choose_blocks(score: Float[np.ndarray, " k"], count: int, protect: Sequence[int] = ()) -> tuple[int, ...]:
    """The ``count`` blocks with the lowest score, in ascending order of index; ``protect`` names blocks to keep.

    Raises UserError when fewer than ``count`` blocks may go.
    """
    candidates = [k for k in np.argsort(score, kind="stable").tolist() if k not in set(protect)]
    if not 0 <= count <= len(candidates):
        raise UserError(
            f"prune: {count} blocks to remove, expected 0 to {len(candidates)} ({len(score)} blocks may go, "
            f"{len(set(protect))} protected; the last block never is a candidate)"
        )
    return tuple(sorted(candidates[:count]))


def remove_blocks(
    config: MMDiTConfig, params: Params, drop: Sequence[int]
) -> tuple[MMDiTConfig, Params, tuple[int, ...]]:
    """The denoiser without blocks ``drop``: config, parameters, and the original indices of the blocks that stay.

    Surviving blocks are the same bits. Raises UserError for the last block, unknown or repeated indices.
    """
    depth = config.num_layers - 1
    wrong = [k for k in drop if not 0 <= k < depth]
    if wrong or len(set(drop)) != len(drop):
        raise UserError(
            f"prune: blocks {sorted(drop)}, expected distinct numbers from 0 to {depth - 1}; block {depth} is the last "
            "one and has no text output, so it stays"
        )
    keep: Int[np.ndarray, " k"] = np.array([k for k in range(depth) if k not in set(drop)], np.int32)
    blocks = jax.tree.map(lambda x: jnp.take(x, keep, axis=0), params["blocks"])
    smaller = dataclasses.replace(config, num_layers=len(keep) + 1)
    return smaller, {**params, "blocks": blocks}, (*keep.tolist(), depth)
