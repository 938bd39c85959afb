"""Which blocks matter, and taking some out (paper, section on block pruning).

Block influence of block k, separately for image and text tokens: ``BI = 1 - E[cos(token in, token out)]``, over
prompts, samples, every denoising step and both guidance branches. The last block has no text output and is never a
candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.mmdit import MMDiTConfig


def cosine_distance(one: Float[Array, "... d"], two: Float[Array, "... d"]) -> Float[Array, ...]:
    """``1 - cos`` token by token, float32, with a gradient everywhere.

    Half the squared distance of the unit vectors is the same number without its cancellation: never below 0, and 0
    for equal tokens.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))

    return 0.5 * jnp.sum(jnp.square(unit(one) - unit(two)), axis=-1)


def one_minus_cosine(
    before: Float[Array, "b l d"], after: Float[Array, "b l d"], weight: Float[Array, "b l"]
) -> Float[Array, 2]:
    """Weighted sum over tokens of ``1 - cos(before, after)``, and the sum of the weights."""
    return jnp.stack([jnp.sum(weight * cosine_distance(before, after)), jnp.sum(weight)])


def influence_reducer(image_weight: Float[Array, "b l"], text_weight: Float[Array, "b s"]):
    """What the denoiser runs inside its scan: per block, [2, 2] = (image, text) x (sum, weight); padding weighs 0."""

    def reduce(image_in: Array, image_out: Array, text_in: Array, text_out: Array) -> Float[Array, "2 2"]:
        return jnp.stack(
            [one_minus_cosine(image_in, image_out, image_weight), one_minus_cosine(text_in, text_out, text_weight)]
        )

    return reduce


@dataclasses.dataclass(frozen=True)
class BlockInfluence:
    """Mean influence of each removable block, in [0, 2]; 0 means that the block changes nothing.

    ``image`` and ``text`` are means over all tokens of all stages; ``by_stage`` holds each stage's own means, image
    first: a block may matter at one resolution only.
    """

    image: Float[np.ndarray, " k"]
    text: Float[np.ndarray, " k"]
    by_stage: Float[np.ndarray, "stages k 2"]

    @classmethod
    def from_sums(cls, sums: Float[Array, "stages k 2 2"]) -> BlockInfluence:
        """From ``influence_reducer``'s output added up over the calls of each stage."""
        sums = np.asarray(sums, np.float64)
        whole, by_stage = (s[..., 0] / np.maximum(s[..., 1], 1e-12) for s in (sums.sum(0), sums))
        return cls(whole[:, 0], whole[:, 1], by_stage)

    @property
    def score(self) -> Float[np.ndarray, " k"]:
        """Mean of both, each scaled to a largest value of 1: the two are uncorrelated and of different size."""
        return sum(x / (x.max() or 1.0) for x in (self.image, self.text)) / 2


# ---- choice


def choose_blocks(score: Float[np.ndarray, " k"], count: int, protect: Collection[int] = ()) -> tuple[int, ...]:
    """The ``count`` blocks with the lowest score, in ascending order of index; ``protect`` names blocks to keep.

    Raises UserError when fewer than ``count`` blocks may go, and for a block to protect that there is not.
    """
    candidates = _candidates(score, protect)
    if not 0 <= count <= len(candidates):
        raise UserError(
            f"prune: {count} blocks to remove, expected 0 to {len(candidates)} ({len(score)} blocks may go, "
            f"{len(set(protect))} protected; the last block never is a candidate)"
        )
    return tuple(sorted(candidates[:count]))


def choose_below(score: Float[np.ndarray, " k"], threshold: float, protect: Collection[int] = ()) -> tuple[int, ...]:
    """The blocks whose score is below ``threshold``, in ascending order; ``protect`` names blocks to keep.

    Raises UserError for a threshold that is not finite, and for a block to protect that there is not.
    """
    if not np.isfinite(threshold):
        raise UserError(f"prune: threshold {threshold}, expected a finite number")
    return tuple(sorted(k for k in _candidates(score, protect) if score[k] < threshold))


def random_score(blocks: int, seed: int) -> Float[np.ndarray, " k"]:
    """Scores that make the choice a random one: the baseline of every other score."""
    return np.random.Generator(np.random.Philox(seed)).permutation(blocks).astype(np.float64)


def _candidates(score: Float[np.ndarray, " k"], protect: Collection[int]) -> list[int]:
    """Blocks that may go, lowest score first."""
    unknown = sorted(set(protect) - set(range(len(score) + 1)))
    if unknown:
        raise UserError(f"prune: blocks {unknown} to protect, expected numbers from 0 to {len(score)}")
    return [k for k in np.argsort(score, kind="stable").tolist() if k not in set(protect)]


# ---- removal


def kept_blocks(blocks: int, drop: Sequence[int]) -> Int[np.ndarray, " k"]:
    """Which of ``blocks`` removable blocks stay when ``drop`` go.

    Raises UserError for the last block (number ``blocks``), unknown or repeated indices.
    """
    wrong = [k for k in drop if not 0 <= k < blocks]
    if wrong or len(set(drop)) != len(drop):
        raise UserError(
            f"prune: blocks {sorted(drop)}, expected distinct numbers from 0 to {blocks - 1}; block {blocks} is the "
            "last one and has no text output, so it stays"
        )
    return np.array([k for k in range(blocks) if k not in set(drop)], np.int32)


def population(blocks: int, drops: Sequence[Sequence[int]]) -> Int[np.ndarray, "p k"]:
    """Candidates, one list of kept blocks for each set of blocks to drop; the denoiser's ``kept`` takes a row of it.

    Raises UserError unless all drop equally many, as one program for all of them needs.
    """
    if len({len(drop) for drop in drops}) != 1:
        raise UserError(f"prune: candidates drop {sorted({len(d) for d in drops})} blocks; expected equally many each")
    return np.stack([kept_blocks(blocks, drop) for drop in drops])


def ragged_population(blocks: int, drops: Sequence[Sequence[int]]) -> Int[np.ndarray, "p blocks"]:
    """Candidates that need not drop equally many: kept blocks, filled up with -1. The denoiser takes a row of it as
    ``kept`` together with the whole network's ``known`` tokens."""
    filled = np.full((len(drops), blocks), -1, np.int32)
    for row, drop in zip(filled, drops, strict=True):
        kept = kept_blocks(blocks, drop)
        row[: len(kept)] = kept
    return filled


def remove_blocks(
    config: MMDiTConfig, params: Params, drop: Sequence[int]
) -> tuple[MMDiTConfig, Params, tuple[int, ...]]:
    """The denoiser without blocks ``drop``: config, parameters, and the original indices of the blocks that stay.

    Surviving blocks are the same bits. Raises UserError for the last block, unknown or repeated indices.
    """
    depth = config.num_layers - 1
    keep = kept_blocks(depth, drop)
    blocks = jax.tree.map(lambda x: jnp.take(x, keep, axis=0), params["blocks"])
    smaller = dataclasses.replace(config, num_layers=len(keep) + 1)
    return smaller, {**params, "blocks": blocks}, (*keep.tolist(), depth)
