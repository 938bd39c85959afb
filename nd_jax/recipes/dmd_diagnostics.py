"""What a run of distribution matching tells of itself: sizes by row, gathered over the whole batch afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.pyramid.resample import latent_pyramid
from nd_jax.pyramid.targets import per_sample_loss
from nd_jax.recipes.dmd_loss import Reduction, cauchy_loss, mean_size


def frame_at(
    latents: Float[Array, "b u h w c"], unit: Int[Array, " b"], level: int, stages: int
) -> Float[Array, "b 1 h_i w_i c"]:
    """The clean latent frame of each row's ``unit``, at a resolution level; frame 0 before unit 0."""
    index = jnp.maximum(unit, 0).reshape(-1, 1, 1, 1, 1)
    return jnp.take_along_axis(latent_pyramid(latents, stages)[level], index, axis=1)


PLAIN = ("direction", "teacher_error", "fake_error")
"""Told as means over all rows."""


def motion_ratio(found: Float[Array, ...], truth: Float[Array, ...], counts: Float[Array, ...]) -> Float[Array, ""]:
    """Change from the previous frame in predictions, relative to that in the data, over rows that count.

    ``found`` and ``truth`` are mean absolute changes by row. 1 moves as much as the data (and is told when no row
    counts), 0 stands still: what a student loses first when its history is not its own.
    """
    return (jnp.sum(counts * found) + 1e-6) / (jnp.sum(counts * truth) + 1e-6)


def row_sizes(
    *,
    teacher: Sequence[Array],
    fake: Sequence[Array],
    target: Sequence[Array],
    clean: Sequence[Array],
    truth: Sequence[Array],
    before: Sequence[Array],
    data_before: Sequence[Array],
    reduction: Reduction,
) -> dict[str, Float[Array, "b g"]]:
    """Mean absolute values by row, from one array per column.

    ``direction`` of ``v_teacher - v_fake``; ``teacher_error`` and ``fake_error`` of their distances from the renoised
    predictions' own velocity ``target``; ``motion`` of the changes from the frame ``before``, which is the student's
    own where its history is, and ``data_motion`` of those in the data; ``cauchy`` of that term's gradient, times the
    sample's size. And ``clean_error``, the mean square of the predictions' distances from the data.
    """
    pairs = {
        "direction": (teacher, fake),
        "teacher_error": (teacher, target),
        "fake_error": (fake, target),
        "motion": (clean, before),
        "data_motion": (truth, data_before),
    }
    sizes = {name: [mean_size(a - b) for a, b in zip(*pair, strict=True)] for name, pair in pairs.items()}
    regress = jax.grad(lambda z, z_i: jnp.sum(cauchy_loss(z, z_i, reduction)))
    sizes["clean_error"] = [per_sample_loss(z, z_i) for z, z_i in zip(clean, truth, strict=True)]
    sizes["cauchy"] = [mean_size(regress(z, z_i)) * z[0].size for z, z_i in zip(clean, truth, strict=True)]
    return {name: jnp.stack(columns, axis=1) for name, columns in sizes.items()}


def summary(
    sizes: dict[str, Any],
    weight: Float[Array, "b g"],
    unit: Int[Array, "b g"],
    from_data: Float[Array, " b"],
    *,
    stages: Sequence[int],
    cauchy_weight: float,
) -> dict[str, Any]:
    """Metrics of the whole batch from ``row_sizes``, by stage where that says more; ``stages`` are the columns'.

    ``from_data`` is 0 for rows of the student's own, whose motion is told apart from that of the others (1 where there
    are none) and which have no data to be compared with. ``pull`` is how hard each term draws at a value of the clean
    prediction, times the sample's size.
    """
    by_stage = {name: {} for name in (*PLAIN, "clean_error", "motion", "own_motion")}
    data = from_data[:, None]
    for stage in sorted(set(stages)):
        columns = np.flatnonzero(np.equal(stages, stage))
        part, later = {name: values[:, columns] for name, values in sizes.items()}, (unit[:, columns] > 0) * 1.0
        told = {name: jnp.mean(part[name]) for name in PLAIN}
        told["clean_error"] = jnp.sum(data * part["clean_error"]) / jnp.maximum(len(columns) * jnp.sum(data), 1)
        told["motion"] = motion_ratio(part["motion"], part["data_motion"], later * data)
        told["own_motion"] = motion_ratio(part["motion"], part["data_motion"], later * (1 - data))
        for name, value in told.items():
            by_stage[name][f"stage_{stage}"] = value
    pulls = {"matching": weight * sizes["direction"], "cauchy": cauchy_weight * data * sizes["cauchy"]}
    weights = {"mean": jnp.mean(weight), "max": jnp.max(weight)}
    return {**by_stage, "pull": jax.tree.map(jnp.mean, pulls), "weight": weights}
