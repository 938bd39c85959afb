"""What a run of distribution matching tells of itself: sizes by row, gathered over the whole batch afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.pyramid.resample import latent_pyramid
from nd_jax.recipes.dmd_loss import Reduction, cauchy_loss, mean_size


def previous_frame(
    latents: Float[Array, "b u h w c"], unit: Int[Array, " b"], level: int, stages: int
) -> Float[Array, "b 1 h_i w_i c"]:
    """The clean latent frame before each row's ``unit``, at a resolution level; frame 0 before unit 0."""
    index = jnp.maximum(unit - 1, 0).reshape(-1, 1, 1, 1, 1)
    return jnp.take_along_axis(latent_pyramid(latents, stages)[level], index, axis=1)


def motion_ratio(found: Float[Array, ...], truth: Float[Array, ...], unit: Int[Array, ...]) -> Float[Array, ""]:
    """Change from the previous frame in predictions, relative to that in the data, over rows with a history.

    ``found`` and ``truth`` are mean absolute changes by row. 1 moves as much as the data (and is told when no row has
    a history), 0 stands still: what a student loses first when its history is not its own.
    """
    later = (unit > 0).astype(jnp.float32)
    return (jnp.sum(later * found) + 1e-6) / (jnp.sum(later * truth) + 1e-6)


def row_sizes(
    *,
    teacher: Sequence[Array],
    fake: Sequence[Array],
    target: Sequence[Array],
    clean: Sequence[Array],
    truth: Sequence[Array],
    before: Sequence[Array],
    reduction: Reduction,
) -> dict[str, Float[Array, "b g"]]:
    """Mean absolute values by row, from one array per column.

    ``direction`` of ``v_teacher - v_fake``; ``teacher_error`` and ``fake_error`` of their distances from the renoised
    predictions' own velocity ``target``; ``motion`` and ``data_motion`` of the changes from the frame ``before``;
    ``cauchy`` of that term's gradient, times the sample's size.
    """
    pairs = {
        "direction": (teacher, fake),
        "teacher_error": (teacher, target),
        "fake_error": (fake, target),
        "motion": (clean, before),
        "data_motion": (truth, before),
    }
    sizes = {name: [mean_size(a - b) for a, b in zip(*pair, strict=True)] for name, pair in pairs.items()}
    regress = jax.grad(lambda z, z_i: jnp.sum(cauchy_loss(z, z_i, reduction)))
    sizes["cauchy"] = [mean_size(regress(z, z_i)) * z[0].size for z, z_i in zip(clean, truth, strict=True)]
    return {name: jnp.stack(columns, axis=1) for name, columns in sizes.items()}


def summary(
    sizes: dict[str, Any],
    weight: Float[Array, "b g"],
    unit: Int[Array, "b g"],
    *,
    stages: Sequence[int],
    cauchy_weight: float,
) -> dict[str, Any]:
    """Metrics of the whole batch from ``row_sizes``, by stage where that says more; ``stages`` are the columns'.

    ``pull`` is how hard each term draws at a value of the clean prediction, times the sample's size.
    """
    by_stage = {name: {} for name in ("direction", "teacher_error", "fake_error", "motion")}
    for stage in sorted(set(stages)):
        columns = np.flatnonzero(np.equal(stages, stage))
        part = {name: values[:, columns] for name, values in sizes.items()}
        moved = {"motion": motion_ratio(part["motion"], part["data_motion"], unit[:, columns])}
        for name, told in by_stage.items():
            told[f"stage_{stage}"] = moved[name] if name in moved else jnp.mean(part[name])
    pulls = {"matching": weight * sizes["direction"], "cauchy": cauchy_weight * sizes["cauchy"]}
    weights = {"mean": jnp.mean(weight), "max": jnp.max(weight)}
    return {**by_stage, "pull": jax.tree.map(jnp.mean, pulls), "weight": weights}
